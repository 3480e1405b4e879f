"""A whole run on a device that is not the CPU: the same numbers, one wait a step, and memory that runs out.

The device is simulated (simulated_device.py) and torch's for the whole process, so the run has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # tests/models/test_other_device.py takes a step there
RUN = """
import gc, json, logging, sys
from pathlib import Path
from simulated_device import memory, record_device, register
register()
from tiny_models import save_tiny_model
import numpy as np
import torch
from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.schema import ModelSection
from training_lens.core.lens_store import LensStore
from training_lens.inference.decoder import build_decoder
from training_lens.models.adapters import load_adapter
from training_lens.models.factory import load_model
from training_lens.runs.run_folder import RunFolder

folder = Path(sys.argv[1])
base = ModelSection(id=str(save_tiny_model(folder / "base", vocab_size=8192, hidden_size=64, intermediate_size=128)))
rows = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(24)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))

class Lines(logging.Handler):
    lines = []
    def emit(self, record):
        self.lines.append(record.getMessage())

logging.getLogger("training_lens").addHandler(Lines())
logging.getLogger("training_lens").setLevel(logging.INFO)

def configure(device, name, **training):
    return TrainingConfig.model_validate({
        "model": {"device": device, "id": base.id},
        "data": {"train": [str(folder / "rows.jsonl")], "val_ratio": 0.2},
        "training": {"max_steps": 2, "batch_size": 8, "lr": 3e-3, **training},
        "peft": {"r": 4, "use_dora": True},
        "lens": {"report": False},
        "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
        "output": {"base_output_dir": str(folder / "outputs"), "run_id": name},
    })

def train(device, name, **training):
    with record_device() as recording:
        run = RunFolder(Path(TrainingWrapper(configure(device, name, **training)).train().run_dir))
    journal = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    lens = {}
    store = LensStore(run.lens)
    for table in store.tables():
        frame = store.pandas(table)
        numbers = frame.select_dtypes("number").drop(columns="seconds", errors="ignore")
        lens[table] = [len(frame), *(float(np.nansum(np.abs(numbers[c]))) for c in sorted(numbers))]
    return {
        "losses": [row["loss"] for row in journal if row["kind"] == "step"],
        "validation": [row["loss"] for row in journal if row["kind"] != "step" and "loss" in row],
        "lens": lens,
        "waits": dict(recording.synchronizations),
    }

device = torch.device("sim")
weights = sum(p.nbytes for p in load_model(base, torch.device("cpu"), "fp32").parameters())
found = {"cpu": train("cpu", "cpu")}
found["sim"] = train("sim", "sim", micro_batch_tokens=4096)

# A device with room for less than a whole step in one pass.
needed, before = memory.peak, memory.allocated
memory.peak = before
memory.capacity = before + int(weights + 0.8 * (needed - weights))
Lines.lines.clear()
found["small"] = train("sim", "small", micro_batch_tokens=4096)
found["small"]["lines"] = [line for line in Lines.lines if "out of memory" in line]
found["needed"], found["used"] = needed, memory.peak - before

# Answers: beside the weights, with no second copy of them where there is no room for one.
memory.capacity = 2**40
model = load_model(base, device, "fp32")
model = load_adapter(model, RunFolder(folder / "outputs/experiments/default/runs/sim").adapter).eval()
found["adapted"] = sum(m.get_base_layer().weight.nbytes for m in model.modules() if hasattr(m, "get_base_layer"))
ids = torch.arange(3, 11, device=device)[None]
with torch.no_grad():
    wanted = model(input_ids=ids, use_cache=False).logits[0]
for name, room in (("tight", int(1.1 * weights)), ("roomy", 2**40)):
    memory.capacity = memory.allocated + room
    before = memory.allocated
    decoder = build_decoder(model, False, ids)
    gc.collect()
    found[name] = {"held": memory.allocated - before, "stack": decoder.stack is not None}
    del decoder
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    call = [sys.executable, "-c", RUN, str(tmp_path_factory.mktemp("simulated"))]
    child = subprocess.run(call, cwd=TESTS, capture_output=True, text=True, check=False, timeout=500)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_losses_are_those_of_the_cpu(found: Any) -> None:
    assert found["sim"]["losses"] == pytest.approx(found["cpu"]["losses"], rel=1e-4)
    assert found["sim"]["validation"] == pytest.approx(found["cpu"]["validation"], rel=1e-4)


def test_the_lens_captures_what_it_captures_on_the_cpu(found: Any) -> None:
    """With DoRA, whose measures come from several places: every table, every column."""
    assert found["sim"]["lens"].keys() == found["cpu"]["lens"].keys()
    for table, sums in found["sim"]["lens"].items():
        assert sums == pytest.approx(found["cpu"]["lens"][table], rel=2e-2, abs=1e-3), table


def test_a_step_waits_for_the_device_once(found: Any) -> None:
    per_step = {place: n for place, n in found["sim"]["waits"].items() if "training/loop/trainer" in place}
    assert list(per_step.values()) == [2], per_step  # steps


def test_a_step_that_does_not_fit_starts_over_with_smaller_passes(found: Any) -> None:
    assert found["small"]["lines"], (found["needed"], found["used"])
    assert found["used"] < found["needed"]
    assert found["small"]["losses"] == pytest.approx(found["sim"]["losses"], rel=1e-4)


def test_decoding_holds_no_second_copy_of_the_weights_where_there_is_no_room(found: Any) -> None:
    """Where there is, the adapted layers are held once more, with the adapter merged."""
    assert found["tight"]["stack"] and found["roomy"]["stack"]
    assert found["tight"]["held"] < 0.25 * found["adapted"] < found["adapted"] == found["roomy"]["held"]
