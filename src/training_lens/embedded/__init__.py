"""The packaged data: a small base model with its tokenizer, and an instruction set in three domains.

`tools/build_embedded_base.py` builds both from text that it generates.
"""

from __future__ import annotations

from pathlib import Path

MODEL = "embedded"
TRAIN = "embedded:train"
HELDOUT = "embedded:heldout"

_HERE = Path(__file__).parent
PATHS = {MODEL: _HERE / "base", TRAIN: _HERE / "train.jsonl", HELDOUT: _HERE / "heldout.jsonl"}


def resolve_name(name: str) -> str:
    """The path of an embedded name; any other text unchanged."""
    return str(PATHS[name]) if name in PATHS else name
