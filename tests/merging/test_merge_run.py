"""A merge is kept where it holds: else nothing but its report is left, and what was there before stays."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from training_lens import embedded
from training_lens.config.compose import validate_values
from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError, ConfigurationError, MergeError, OutputError
from training_lens.inference.session import open_run
from training_lens.merging import merge_run
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapters import attach, save_adapter
from training_lens.models.factory import load_model
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json, write_json

IDS = torch.arange(40, 72).view(2, 16)
EARLIER = {"made_by": "training-lens merge", "files": ["merge.json"]}


@pytest.fixture
def run(embedded_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to write into."""
    return RunFolder(Path(shutil.copytree(embedded_run.root, tmp_path / "run")))


@pytest.fixture
def few(tmp_path: Path) -> dict[str, Any]:
    """Three rows to check on, for what needs no more."""
    rows = embedded.PATHS[embedded.HELDOUT].read_text().splitlines(keepends=True)[:3]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    return {"data": {"validation": str(tmp_path / "few.jsonl")}}


def config(adapter: Path, **sections: Any) -> Any:
    return validate_values({"inference": {"adapter": str(adapter)}, **sections})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def corrupt(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"] *= 1.2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_a_merged_run_is_the_adapter_as_a_plain_folder(run: RunFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = merge_adapter(config(run.root), MergeOptions(dtype="fp32", max_shard_size="2MB"))
    assert merged.output == run.merged_model and merged.report["verified"] and merged.report["base_known"]
    assert merged.verification.max_logit_difference < 1e-4
    assert read_json(run.reports / "merge.json") == merged.report
    files = {p.name for p in run.merged_model.iterdir()}
    marks = {"made_by": "training-lens merge", "files": sorted(files)}
    assert read_json(run.merged_model / "merge.json") == merged.report | marks
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= files
    assert not [name for name in files if "adapter" in name or name.endswith(".py")]
    session = open_run(run)
    loaded = AutoModelForCausalLM.from_pretrained(run.merged_model)
    assert loaded.dtype == torch.float32 and (logits(loaded) - logits(session.model)).abs().max() < 1e-4
    ends = loaded.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == session.stop_ids
    own = embedded.PATHS[embedded.MODEL]
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    assert all((run.merged_model / name).read_bytes() == (own / name).read_bytes() for name in kept)
    tokenizer = AutoTokenizer.from_pretrained(run.merged_model)
    assert tokenizer.chat_template == session.tokenizer.chat_template


@pytest.mark.usefixtures("forked_python")
def test_a_corrupted_merge_is_removed_and_what_was_there_stays(run: RunFolder, few: dict[str, Any]) -> None:
    run.merged_model.mkdir()
    write_json(run.merged_model / "merge.json", EARLIER)
    with pytest.raises(MergeError, match=r"roundings: .*in model.layers.2.self_attn.v_proj.*it was removed.*reports/m"):
        merge_adapter(config(run.root, **few), MergeOptions(force=True), on_written=corrupt)
    report = read_json(run.reports / "merge.json")
    assert report["verified"] is False and not report["checks"][0]["ok"]
    assert read_json(run.merged_model / "merge.json") == EARLIER
    assert sorted(p.name for p in (run.root / "artifacts").iterdir()) == ["adapter", "merged", "tokenizer"]


@pytest.mark.slow
def test_a_number_type_too_coarse_for_the_update_is_refused(run: RunFolder, few: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match=r"logit distance.*Each weight is rightly rounded, and bf16 is too coarse"):
        merge_adapter(config(run.root, **few), MergeOptions(scale=0.01, dtype="bf16"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
def test_a_merge_that_cannot_be_loaded_is_removed(run: RunFolder, few: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match=r"cannot be loaded by AutoModelForCausalLM"):
        merge_adapter(
            config(run.root, **few), MergeOptions(), on_written=lambda folder: (folder / "model.safetensors").unlink()
        )
    assert "cannot be loaded" in read_json(run.reports / "merge.json")["error"] and not run.merged_model.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
def test_the_readme_of_a_bare_adapters_delta_makes_the_adapter(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: dict[str, Any]
) -> None:
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "bare"))
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": "someone/another-base"})
    options = MergeOptions(tmp_path / "out", delta=True, dtype="fp32", scale=0.5)
    with pytest.raises(AdapterError, match=r"trained on 'someone/another-base', and model.id is 'embedded'.*same-base"):
        merge_adapter(config(adapter, **few), options)
    report = merge_adapter(config(adapter, **few), replace(options, same_base=True)).report
    assert not report["base_known"] and report["rows"] == 3 and report["rows_from"] == f"of {few['data']['validation']}"
    assert len(load_file(tmp_path / "out/delta.safetensors")) == 35 and report["scale"] == 0.5
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(code, names)
    session = open_run(run)
    base = load_model(session.config.model, torch.device("cpu"), "fp32")
    layer = session.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    path = "model.layers.0.mlp.up_proj.weight"
    update = names["model"].get_parameter(path) - base.get_parameter(path)
    torch.testing.assert_close(update, 0.5 * layer.get_delta_weight("default").detach(), rtol=1e-3, atol=1e-6)


def test_a_base_that_changed_at_its_path_is_refused(run: RunFolder, tmp_path: Path) -> None:
    model = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))
    settings = read_json(run.metadata / "config.json")
    run.write_metadata("config.json", settings | {"model": settings["model"] | {"id": str(model)}})
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"another base than '.*model' is now: .*base.json says"):
        merge_adapter(config(run.root), MergeOptions())
    assert not run.merged_model.exists()


def test_an_adapter_of_another_shape_is_refused(run: RunFolder, tmp_path: Path) -> None:
    other = {"model": {"id": str(save_tiny_model(tmp_path / "base", vocab_size=1024))}}
    with pytest.raises(AdapterError, match=r"does not fit this base model"):
        merge_adapter(
            config(shutil.copytree(run.adapter, tmp_path / "x"), **other), MergeOptions(tmp_path / "o", same_base=True)
        )


def test_an_adapter_that_changes_nothing_is_refused(run: RunFolder) -> None:
    from training_lens.config.schema import ModelSection, PeftSection

    model = load_model(ModelSection(), torch.device("cpu"), "fp32")
    (run.metadata / "hashes.json").unlink()
    save_adapter(attach(model, PeftSection(r=4)), run.adapter)
    with pytest.raises(AdapterError, match=r"computes exactly what its base does: nothing to merge"):
        merge_adapter(config(run.root), MergeOptions())


def test_what_no_merge_wrote_is_never_replaced(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigurationError, match=r"no merge wrote chapter.txt"):
            merge_adapter(config(run.root), MergeOptions(tmp_path / "thesis", force=force))
    run.merged_model.mkdir()
    write_json(run.merged_model / "merge.json", EARLIER)
    (run.merged_model / "NOTES.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"no merge wrote NOTES.txt. Move that away"):
        merge_adapter(config(run.root), MergeOptions(force=True))
    (run.merged_model / "NOTES.txt").unlink()
    with pytest.raises(ConfigurationError, match=r"holds a merged model already. Give --force"):
        merge_adapter(config(run.root), MergeOptions())


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("run/reports", "is the run's reports"),
        ("run/checkpoints/merged", "lies in the run's checkpoints"),
        ("run/artifacts/adapter", "is the adapter"),
        ("run", "holds the adapter"),
        ("linked/new", "lies in the run's logs"),
        ("base", "is the base model"),
        ("base/merged", "lies in the base model"),
    ],
)
def test_the_runs_and_the_bases_own_files_are_no_output(run: RunFolder, tmp_path: Path, output: str, said: str) -> None:
    (tmp_path / "linked").symlink_to(run.logs)
    model = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "base"))
    settings = read_json(run.metadata / "config.json")
    run.write_metadata("config.json", settings | {"model": settings["model"] | {"id": str(model)}})
    for folder in (run.reports, run.adapter, model):
        write_json(folder / "merge.json", EARLIER)
    with pytest.raises(ConfigurationError, match=f"--output .* {said} .*Give another folder"):
        merge_adapter(config(run.root), MergeOptions(tmp_path / output, force=True))


@pytest.mark.slow
def test_a_link_is_replaced_where_it_leads_and_strange_leftovers_stay(
    run: RunFolder, few: dict[str, Any], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    (disk / "earlier").mkdir(parents=True)
    write_json(disk / "earlier/merge.json", EARLIER)
    (tmp_path / "link").symlink_to(disk / "earlier")
    (disk / ".tmp-of-another-program").mkdir()
    os.utime(disk / ".tmp-of-another-program", (1, 1))
    merged = merge_adapter(config(run.root, **few), MergeOptions(tmp_path / "link", force=True))
    assert merged.output == disk / "earlier" and (tmp_path / "link/model.safetensors").is_file()
    assert sorted(p.name for p in disk.iterdir()) == [".tmp-of-another-program", "earlier"]


@pytest.mark.slow
def test_what_another_process_wrote_meanwhile_stays(run: RunFolder, few: dict[str, Any]) -> None:
    def meanwhile(_folder: Path) -> None:
        run.merged_model.mkdir()
        (run.merged_model / "theirs").write_text("theirs")

    with pytest.raises(OutputError, match=r"artifacts/merged: another process wrote there meanwhile"):
        merge_adapter(config(run.root, **few), MergeOptions(), on_written=meanwhile)
    assert [p.name for p in run.merged_model.iterdir()] == ["theirs"]


@pytest.mark.slow
def test_an_update_too_weak_for_the_other_limits_is_not_lost_unseen(run: RunFolder, few: dict[str, Any]) -> None:
    """A tenth of the update computes nearly what the base does; its weights decide, in bf16 too."""
    merged = merge_adapter(config(run.root, **few), MergeOptions(scale=0.1))
    assert merged.report["dtype"] == "bf16" and 0 < merged.verification.distance_share < 1
    weak = load_file(run.merged_model / "model.safetensors")

    def lose(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        base = load_file(embedded.PATHS[embedded.MODEL] / "model.safetensors")
        name = "model.layers.2.self_attn.v_proj.weight"
        assert not torch.equal(weights[name], base[name])
        save_file(weights | {name: base[name]}, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(MergeError, match=r"roundings: .*in model.layers.2.self_attn.v_proj.weight\)") as error:
        merge_adapter(config(run.root, **few), MergeOptions(scale=0.1, force=True), on_written=lose)
    assert "logit" not in str(error.value)  # which alone would have let it pass
    assert all(torch.equal(t, weak[n]) for n, t in load_file(run.merged_model / "model.safetensors").items())


@pytest.mark.parametrize(
    ("adapter", "options", "said"),
    [
        ("run", {"scale": 0.0}, "--scale 0: give a number other than 0"),
        ("run", {"scale": math.nan}, "--scale nan: give a number other than 0"),
        ("run", {"max_shard_size": "large"}, "--max-shard-size large: give a whole number above 0 and a unit"),
        ("run", {"max_shard_size": "-5GB"}, "--max-shard-size -5GB: give a whole number above 0"),
        ("run", {"max_shard_size": "0GB"}, "--max-shard-size 0GB: give a whole number above 0"),
        ("none", {}, "names no adapter to merge"),
        ("run/artifacts/adapter", {}, "a bare adapter has no run folder to merge into; give --output"),
    ],
)
def test_wrong_options_are_refused(
    run: RunFolder, adapter: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.root.parent)
    for file in (run.metadata / "hashes.json", *run.adapter.glob("*.safetensors")):
        file.unlink()  # refused before anything is loaded
    with pytest.raises(ConfigurationError, match=said):
        merge_adapter(validate_values({"inference": {"adapter": adapter}}), MergeOptions(**options))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
def test_a_quantized_run_merges_whole_alone(run: RunFolder, few: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    settings = read_json(run.metadata / "config.json")
    run.write_metadata("config.json", settings | {"model": settings["model"] | {"quantization": "4bit"}})
    with pytest.raises(ConfigurationError, match=r"--delta: the run trained on quantized weights"):
        merge_adapter(config(run.root, **few), MergeOptions(delta=True))
    merged = merge_adapter(config(run.root, **few), MergeOptions(dtype="fp32"))
    assert merged.report["quantization"] == "4bit" and merged.verification.max_logit_difference < 1e-4
    assert "quantization_config" not in read_json(run.merged_model / "config.json")


@pytest.mark.parametrize(
    ("asked", "on_gpu", "on_cpu", "chosen", "said"),
    [
        ("auto", 10**9, 10**9, "cuda", "takes about 11.1 MB of memory on cuda"),
        ("auto", 10**6, 10**9, "cpu", "computing on the CPU: cuda has 1.0 MB of memory free"),
        ("auto", 10**6, 10**6, "cpu", "takes about 11.1 MB of memory on cpu, and 1.0 MB are free"),
        ("cuda", 10**6, 10**9, "cuda", "takes about 11.1 MB of memory on cuda, and 1.0 MB are free"),
    ],
)
def test_a_merge_computes_where_the_base_fits_in_float32_and_says_what_it_takes(
    asked: str,
    on_gpu: int,
    on_cpu: int,
    chosen: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run trained on a GPU, of which only the free memory is known here."""
    monkeypatch.setattr(merge_run, "get_device", torch.device)
    monkeypatch.setattr(merge_run, "available_bytes", lambda device: on_gpu if device.type == "cuda" else on_cpu)
    with caplog.at_level("INFO", "training_lens"):
        assert merge_run.choose_device(ModelSection(device="cuda"), asked) == chosen
    assert said in caplog.text
