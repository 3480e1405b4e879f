"""What is planted in folders from elsewhere: code that leaves a mark where it is run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

from training_lens import embedded
from training_lens.utils.files import read_json, write_json

MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
with Path({mark!r}).open("a") as file:
    file.write("model\\n")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TRACKER = """
from pathlib import Path
from training_lens.integrations import Tracker
with Path({mark!r}).open("a") as file:
    file.write("tracker\\n")

class Planted(Tracker):
    name = "planted"
    def require(self): pass
    def open(self): pass
    def log(self, records): pass
    def end(self): pass
"""
METRIC = """
from pathlib import Path
Path({mark!r}).touch()
def score(prediction, reference): return 1.0
"""


def plant_model(folder: Path, mark: Path) -> Path:
    """The embedded model with code of its own, also in its tokenizer's configuration."""
    shutil.copytree(embedded.resolve_name(embedded.MODEL), folder)
    config = read_json(folder / "config.json")
    ours = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_json(folder / "config.json", {**config, "model_type": "own", "auto_map": ours})
    (folder / "own.py").write_text(MODEL.format(mark=str(mark)))
    return folder


class Marking:
    """What writes the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Marking(mark))


def plant_pickles(folder: Path, mark: Path) -> None:
    """Pickles by all the names that a library might look for."""
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "train.pkl", "study.pkl", "sampler.pkl"):
        (folder / name).write_bytes(pickled(mark))


def look_at(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files in a folder, with when they were written and what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
