"""An export is kept where it holds: else nothing but its report is left, and what was there before stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_variants import VARIANTS
from safetensors.torch import load_file, save_file
from slow_cases import slow_but

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.errors import AdapterError, ConfigurationError, MergeError
from training_lens.merging.weight_update import load_updates
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json, write_json

WEIGHTS = "adapter_model.safetensors"
EARLIER = {"made_by": "training-lens export-adapter", "files": ["export.json"]}
pytestmark = pytest.mark.usefixtures("forked_python")


def read_naively(folder: Path) -> dict[str, torch.Tensor]:
    """dW of each module as a program reads it that knows one alpha and one rank, by the module's path."""
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert all(len(tensors[f"{path}.lora_A.weight"]) == config["r"] for path in paths)
    return {
        path.removeprefix("base_model.model."): scale
        * tensors[f"{path}.lora_B.weight"].double()
        @ tensors[f"{path}.lora_A.weight"].double()
        for path in paths
    }


@pytest.mark.parametrize("variant", slow_but(["rslora, patterns"], VARIANTS))
def test_a_plain_adapter_is_read_right_without_patterns_and_rslora(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    folder = write_adapter(**VARIANTS[variant])
    exported = export_adapter(export_config(folder), ExportOptions("plain", tmp_path / "out"))
    assert exported.report["verified"] and exported.report["max_logit_difference"] < 1e-4
    assert exported.report["weights_read_back"] and exported.report["answers_compared"]
    read = read_naively(exported.output)
    trained = {f"{path}.weight": update for path, update in read.items()}
    for name, update in load_updates(folder).items():
        if name in trained:
            change, _ = update.compute_change(torch.zeros_like(trained[name]), slice(None))
            torch.testing.assert_close(trained[name], change, rtol=0, atol=1e-6 * change.abs().max().item())
    config = read_json(exported.output / "adapter_config.json")
    assert not {"rank_pattern", "alpha_pattern", "init_lora_weights"} & config.keys() and not config["use_rslora"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda name, tensor: tensor * 1.001, r"largest error, in roundings: .*in model.layers"),
        (lambda name, tensor: None if "layers.1.mlp.up_proj" in name else tensor, r"missing or not .*up_proj"),
    ],
)
def test_a_damaged_export_is_removed_and_what_was_there_stays(
    own_run: RunFolder, damage: Callable[..., Any], said: str, run_config: Callable[..., Any]
) -> None:
    def change(folder: Path) -> None:
        tensors = {name: damage(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS, {"format": "pt"})

    output = own_run.exported / "plain"
    output.mkdir(parents=True)
    write_json(output / "export.json", EARLIER)
    with pytest.raises(MergeError, match=said):
        export_adapter(run_config(own_run), ExportOptions("plain", force=True), on_written=change)
    refused = read_json(own_run.reports / "export.json")
    assert not (refused["verified"] or refused["weights_read_back"] or refused["answers_compared"])
    assert read_json(output / "export.json") == EARLIER and [p.name for p in own_run.exported.iterdir()] == ["plain"]


def test_the_peft_form_is_the_runs_adapter_byte_for_byte(own_run: RunFolder, run_config: Callable[..., Any]) -> None:
    exported = export_adapter(run_config(own_run), ExportOptions("peft"))
    assert exported.output == own_run.exported / "peft" and read_json(own_run.reports / "export.json")["verified"]
    for name in ("adapter_config.json", WEIGHTS):
        assert (exported.output / name).read_bytes() == (own_run.adapter / name).read_bytes()
    files = {path.name for path in exported.output.iterdir()}
    assert read_json(exported.output / "export.json")["files"] == sorted(files)
    assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= files


@pytest.mark.slow
@pytest.mark.parametrize("peft", [VARIANTS["patterns"], {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_peft_form_takes_a_scale_of_every_kind_of_adapter(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path, peft: dict[str, Any]
) -> None:
    folder = write_adapter(**peft)
    exported = export_adapter(export_config(folder), ExportOptions("peft", tmp_path / "out", scale=0.5))
    assert exported.report["verified"] and exported.report["scale"] == 0.5
    assert exported.report["weights_read_back"] is (peft == VARIANTS["patterns"])  # the others are not low-rank
    assert (exported.output / WEIGHTS).read_bytes() != (folder / WEIGHTS).read_bytes()


def test_dora_is_refused_with_the_way_out(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_adapter(use_dora=True)
    with pytest.raises(AdapterError, match=r"adapted by DoRA.*Merge it: training-lens merge"):
        export_adapter(export_config(folder), ExportOptions("plain", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter", "options", "said"),
    [
        ("run", {"scale": 0.0}, "--scale 0: give a number other than 0"),
        ("run", {"scale": math.inf}, "--scale inf: give a number other than 0"),
        ("run", {"output": Path("run/artifacts/adapter")}, "is the adapter .* which stays"),
        ("run", {"output": Path("thesis"), "force": True}, "no export wrote chapter.txt"),
        ("none", {}, "names no adapter to export"),
        ("run/artifacts/adapter", {}, "a bare adapter has no run folder to export into; give --output"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    own_run: RunFolder, monkeypatch: pytest.MonkeyPatch, adapter: str, options: dict[str, Any], said: str
) -> None:
    from training_lens.config.compose import validate_values

    monkeypatch.chdir(own_run.root.parent)
    Path("run").symlink_to(own_run.root)
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("mine")
    for file in (own_run.metadata / "hashes.json", *own_run.adapter.glob("*.safetensors")):
        file.unlink()
    with pytest.raises(ConfigurationError, match=said):
        export_adapter(validate_values({"inference": {"adapter": adapter}}), ExportOptions("plain", **options))
