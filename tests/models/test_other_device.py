"""What holds on a device that is not the CPU, on a simulated one: a GPU's rules for tensors, with the CPU's numbers.

The device is torch's for the whole process, so these tests have a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
STEP = """
import json
import torch
from simulated_device import record_device, register
from tiny_models import tiny_model
from training_lens.config.schema import PeftSection
from training_lens.models.adapters import attach
from training_lens.models.fast.engine import Engine
from training_lens.utils.devices import get_device

ids = torch.arange(40).view(1, 40) % 97
mask = torch.ones_like(ids, dtype=torch.bool)

def take_step(device, **peft):
    torch.manual_seed(1)
    model = attach(tiny_model(num_hidden_layers=1), PeftSection(r=4, **peft))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    engine = Engine(model.to(device))
    for _ in range(2):  # the first pass compares the output layer, once
        model.zero_grad()
        with record_device() as recording:
            loss = engine.loss_sum(ids, mask, packed_lengths=(30, 10))
            loss.backward()
    gradients = [p.grad.to("cpu") for p in model.parameters() if p.requires_grad]
    return engine.can_pack, loss.detach().to("cpu"), gradients, recording

found = {}
device = register()
for name, peft in {"lora": {}, "dora": {"use_dora": True}}.items():
    plain, other = take_step(torch.device("cpu"), **peft), take_step(device, **peft)
    torch.testing.assert_close(other[1], plain[1])
    for a, b in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found[name] = {"packs": other[0], "operations": other[3].operations, "waits": dict(other[3].synchronizations)}
try:
    torch.ones(3, device=device) + torch.ones(3)
except RuntimeError as error:
    found["stray"] = str(error)
found["device"] = str(get_device("sim"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    child = subprocess.run(
        [sys.executable, "-c", STEP], cwd=TESTS, capture_output=True, text=True, check=False, timeout=240
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_packed_step_gives_the_loss_and_gradients_of_the_cpu(found: Any, kind: str) -> None:
    """Compared in the process; a tensor left on the CPU would have raised there."""
    assert found[kind]["packs"] and found[kind]["operations"] > 100


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_forward_and_backward_never_wait_for_the_device(found: Any, kind: str) -> None:
    assert found[kind]["waits"] == {}


def test_the_simulated_device_refuses_tensors_of_two_devices(found: Any) -> None:
    assert "expected all tensors to be on the same device" in found["stray"]


def test_any_device_that_torch_knows_can_be_named(found: Any) -> None:
    assert found["device"] == "sim"
