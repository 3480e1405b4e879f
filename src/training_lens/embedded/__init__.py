"""What the package carries: a small base model with its tokenizer, and an instruction set in three domains.

Built by `tools/build_embedded_base.py` from text that the script writes itself.
"""

from __future__ import annotations

from pathlib import Path

MODEL = "embedded"
TRAIN = "embedded:train"
HELDOUT = "embedded:heldout"

_HERE = Path(__file__).parent
PATHS = {MODEL: _HERE / "base", TRAIN: _HERE / "train.jsonl", HELDOUT: _HERE / "heldout.jsonl"}


def resolve_name(name: str) -> str:
    """The path behind an embedded name; any other text as it is."""
    return str(PATHS[name]) if name in PATHS else name
