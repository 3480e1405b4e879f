"""model.backend=unsloth is refused with every reason before anything loads.

The packages here are empty folders of that name; where there is a GPU and the real one, a run is compared, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.models.unsloth_backend import find_obstacles, require_supported_type, require_unsloth, start_backend
from training_lens.training.run import TrainingWrapper
from training_lens.utils.machine import describe_unsloth

Config = Callable[..., Any]
HAS_UNSLOTH = find_spec("unsloth") is not None
UNSLOTH = {"backend": "unsloth"}
CUDA = torch.device("cuda")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with packages of unsloth's names, which cannot be imported."""
    for name in ("unsloth", "unsloth_zoo"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("raise NotImplementedError('needs a GPU')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


@pytest.mark.skipif(HAS_UNSLOTH, reason="unsloth is installed")
def test_without_the_package_the_plan_says_how_to_install_it(small_config: Config) -> None:
    config = small_config()
    config = config.replace_keys(model=UNSLOTH)
    with pytest.raises(
        ConfigurationError, match=r"model.backend: unsloth is not installed: pip install --no-deps unsl"
    ):
        TrainingWrapper(config).plan()
    assert describe_unsloth("cuda") == "not installed: model.backend=unsloth is refused"


@pytest.mark.usefixtures("installed")
def test_everything_that_is_in_the_way_is_named_at_once() -> None:
    plain = TrainingConfig(model=UNSLOTH)
    assert find_obstacles(plain, CUDA) == []
    assert find_obstacles(plain, torch.device("mps")) == [
        "model.backend: unsloth needs a CUDA GPU, and this run computes on mps; give transformers"
    ]
    sections: dict[str, dict[str, Any]] = {
        "model": {"quantization": "8bit", "dtype": "fp32", "attention": "eager", "trust_remote_code": True},
        "data": {"new_tokens": ["<tool>"]},
        "peft": {"use_dora": True, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]},
        "training": {"precision": "fp32"},
    }
    keys = [f"{section}.{key}" for section, values in sections.items() for key in values]
    config = TrainingConfig(**{**sections, "model": {**sections["model"], **UNSLOTH}})
    with pytest.raises(ConfigurationError) as error:
        require_unsloth(config, CUDA, processes=2)
    assert sorted(line.split(":")[0] for line in error.value.problems) == sorted([*keys, "model.backend"])
    require_unsloth(config.replace_keys(model={"backend": "transformers"}), CUDA, processes=2)


def test_a_model_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigurationError, match=r"trains llama, mistral, .* here, and .* is a 'gpt2'"):
        require_supported_type(TrainingConfig(model={"id": str(tmp_path), **UNSLOTH}))


@pytest.mark.usefixtures("installed")
def test_it_is_not_imported_after_transformers() -> None:
    import transformers  # noqa: F401

    with pytest.raises(ConfigurationError, match=r"has to be imported before transformers.*'import unsloth' first"):
        start_backend(TrainingConfig(model=UNSLOTH), CUDA)


def test_it_is_imported_before_transformers_with_its_telemetry_off(installed: Path) -> None:
    """In a Python of its own, as a command starts: the import fails here, and is explained."""
    code = """
import os, sys, torch
from training_lens.cli import train
from training_lens.config.schema import TrainingConfig
from training_lens.models.unsloth_backend import start_backend
assert not {"transformers", "peft", "trl"} & sys.modules.keys()
try:
    start_backend(TrainingConfig(model={"backend": "unsloth"}), torch.device("cuda"))
except Exception as error:
    print(error)
print(os.environ["UNSLOTH_DISABLE_STATISTICS"], os.path.isabs(os.environ["UNSLOTH_COMPILE_LOCATION"]))
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said, environment = done.stdout.strip().splitlines()
    assert "installed and cannot be imported (NotImplementedError: needs a GPU)" in said, done.stderr
    assert environment == "1 True"


@pytest.mark.skipif(not (torch.cuda.is_available() and HAS_UNSLOTH), reason="needs a CUDA GPU and unsloth")
def test_losses_are_those_of_the_other_backend(small_config: Config, tmp_path: Path) -> None:
    losses = {}
    for backend in ("transformers", "unsloth"):
        config = small_config(model={"backend": backend, "device": "cuda"}, training={"max_steps": 10})
        config = config.replace_keys(output={"run_id": backend}, lens={"enabled": True})
        file = tmp_path / f"{backend}.json"
        file.write_text(config.model_dump_json(exclude_unset=True))
        command = [sys.executable, "-m", "training_lens", "train", "--config", str(file), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "unsloth_compiled_cache").exists()
        run = Path(json.loads(done.stdout.splitlines()[-1])["run_dir"])
        lines = map(json.loads, (run / "logs/metrics.jsonl").read_text().splitlines())
        losses[backend] = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses["unsloth"] == pytest.approx(losses["transformers"], rel=0.02)
