"""A run with new tokens: it answers with them as text, resumes undisturbed, and every way out of it has them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slow_cases import mark_slow
from tiny_models import save_tiny_model

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.schema import ModelSection
from training_lens.data.examples import Message
from training_lens.errors import AdapterError, ConfigurationError, InterruptedRunError
from training_lens.inference.generator import answer
from training_lens.inference.session import Session, open_run, open_session
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.embedding_rows import required_rows
from training_lens.models.factory import load_model, load_tokenizer, read_facts
from training_lens.models.fast.token_rows import TokenRows
from training_lens.runs.run_folder import RunFolder
from training_lens.serve.served_models import load_models
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.files import read_json

Config = Callable[..., TrainingConfig]
TOKENS = ["<tool>", "</tool>"]
ROWS = [{"question": f"Call tool {i}.", "answer": f"<tool>{i}</tool>"} for i in range(8)]
LEARNED = {"epochs": 100, "batch_size": 8, "lr": 1e-2}  # so long that the answers are known by heart


def config_with_tokens(config: Config, data: dict[str, Any] | None = None, **sections: Any) -> TrainingConfig:
    rows = {"train": ROWS, "new_tokens": TOKENS, "template": "plain", **(data or {})}
    return config(**{"training": {"epochs": 3, "batch_size": 4}, "data": rows, **sections})


def train(config: TrainingConfig, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


@pytest.fixture(scope="module", params=["tied, with spare rows", mark_slow("apart, resized")])
def taught(
    request: pytest.FixtureRequest,
    small_config_in: Config,
    make_once: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """A run of a tiny model, or of the embedded one with other ends, that knows the rows by heart. To be added to."""

    def make(outputs: Path) -> None:
        model = {"id": str((save_tied if request.param.startswith("tied") else part_ends)(outputs / "base"))}
        train(config_with_tokens(lambda **s: small_config_in(outputs, **s), model=model, training=LEARNED))

    (root,) = make_once(f"taught {request.param}", make).glob("experiments/default/runs/*")
    return RunFolder(Path(shutil.copytree(root, tmp_path_factory.mktemp("taught") / root.name)))


def save_tied(folder: Path) -> Path:
    """A tiny model with one weight for embedding and output head, and more rows than its tokenizer has tokens."""
    return save_tiny_model(folder, vocab_size=1024, tie_word_embeddings=True, initializer_range=0.3)


def part_ends(folder: Path) -> Path:
    """The embedded model whose embedding and output head are two weights, with a row for each token alone."""
    model, tokenizer = load_model(ModelSection(), torch.device("cpu"), "fp32"), load_tokenizer(ModelSection())
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.resize_token_embeddings(required_rows(tokenizer), mean_resizing=False)
    shutil.copytree(embedded.PATHS[embedded.MODEL], folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model.save_pretrained(folder)
    return folder


def base_of(run: RunFolder) -> str:
    return str(run.read_metadata("config.json")["model"]["id"])


def count_rows(run: RunFolder) -> tuple[int, int]:
    """The rows of the embedding with new tokens and without, as the base's config says."""
    rows = read_facts(ModelSection(id=base_of(run))).vocabulary
    return max(rows, 661), rows


def ask(session: Session, question: str = "Call tool 3.") -> str:
    return answer(session, session.prompt_ids([Message("user", question)]), InferenceSection(max_new_tokens=12))


def choose(run: RunFolder, adapter: Path | str | None = None, **sections: Any) -> TrainingConfig:
    """The command line's settings for a run."""
    return TrainingConfig.model_validate({**sections, "inference": {"adapter": str(adapter or run.root)}})


def test_it_answers_with_the_tokens_as_text(taught: RunFolder) -> None:
    session = open_run(taught)
    text = ask(session)
    assert text == "<tool>3</tool>"
    assert session.tokenizer(text, add_special_tokens=False).input_ids[0] == session.tokenizer.convert_tokens_to_ids(
        "<tool>"
    )


def test_a_bare_adapter_needs_its_tokens_or_its_tokenizer(taught: RunFolder, tmp_path: Path) -> None:
    settings = {"model": {"id": base_of(taught)}, "data": {"new_tokens": TOKENS, "template": "plain"}}
    assert ask(open_session(choose(taught, taught.adapter, **settings))) == "<tool>3</tool>"
    bare: dict[str, Any] = {"model": {"id": base_of(taught)}, "data": {"template": "plain"}}
    with pytest.raises(AdapterError, match=r"has rows for new tokens up to id 660.*the data.new_tokens of its run"):
        open_session(choose(taught, taught.adapter, **bare))
    together = shutil.copytree(taught.adapter, tmp_path / "together")
    shutil.copytree(taught.tokenizer, together, dirs_exist_ok=True)
    assert ask(open_session(choose(taught, together, **bare))) == "<tool>3</tool>"


@pytest.mark.usefixtures("forked_python")
def test_a_merged_model_answers_alike_without_this_package(taught: RunFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = merge_adapter(choose(taught), MergeOptions(dtype="fp32", force=True))
    tokenizer = AutoTokenizer.from_pretrained(merged.output)
    model = AutoModelForCausalLM.from_pretrained(merged.output)
    assert merged.report["untied"] is False
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == read_json(Path(base_of(taught)) / "config.json")["tie_word_embeddings"]
    assert len(embedding) == len(head) == model.config.vocab_size == count_rows(taught)[0] >= len(tokenizer)
    alone = open_session(choose(taught, "none", model={"id": str(merged.output)}, data={"template": "plain"}))
    assert ask(alone) == "<tool>3</tool>"
    with pytest.raises(AdapterError, match=r"--delta: embedding and output head got rows .* Merge it whole"):
        merge_adapter(choose(taught), MergeOptions(delta=True))


@pytest.mark.usefixtures("forked_python")
def test_exports_carry_the_rows_or_say_why_not(taught: RunFolder) -> None:
    kept = export_adapter(choose(taught), ExportOptions("peft"))
    rows, before = count_rows(taught)
    assert (f"base.resize_token_embeddings({rows})" in (kept.output / "README.md").read_text()) == (rows > before)
    scaled = export_adapter(choose(taught), ExportOptions("peft", scale=0.5, force=True))
    assert scaled.verification and scaled.verification.is_ok
    for form in ("plain", "mlx"):
        with pytest.raises(AdapterError, match=r"has rows of its own for new tokens .*training-lens merge writes"):
            export_adapter(choose(taught), ExportOptions(form))  # type: ignore[arg-type]


@pytest.mark.usefixtures("forked_python")
def test_gguf_has_the_tokens_in_the_merged_model_alone(taught: RunFolder) -> None:
    pytest.importorskip("gguf")
    from training_lens.adapter_export.gguf_package import read_values

    with pytest.raises(AdapterError, match=r"a GGUF adapter has no place for them.*--to gguf --merged"):
        export_adapter(choose(taught), ExportOptions("gguf"))
    merged = export_adapter(choose(taught), ExportOptions("gguf", merged=True, dtype="f32"))
    values = read_values(next(merged.output.glob("*.gguf")))
    assert list(values["tokenizer.ggml.tokens"])[659:661] == TOKENS
    assert list(values["tokenizer.ggml.token_type"])[659:661] == [4, 4]  # user-defined: shown as text, unlike control


def test_served_answers_are_those_of_infer(taught: RunFolder) -> None:
    models = load_models({"tools": choose(taught)})
    served = models.find_model("tools")
    assert not served.shares
    with pytest.raises(ConfigurationError, match="need the same rows; serve them apart, or merge one of them"):
        load_models({"tools": choose(taught), "plain": choose(taught, "none", model={"id": base_of(taught)})})


def test_a_cut_run_resumes_undisturbed(small_config: Config, tmp_path: Path) -> None:
    """On a model whose ends are apart, so that both have rows."""
    model = {"id": str(save_tiny_model(tmp_path / "apart", vocab_size=659, tie_word_embeddings=False))}
    whole = train(config_with_tokens(small_config, model=model))
    config = config_with_tokens(small_config, model=model, output={"run_id": "cut"})
    with pytest.raises(InterruptedRunError):
        train(config, _Stop(3))
    cut = RunFolder(whole.root.with_name("cut"))
    assert TrainingWrapper.resume(cut).status == "finished"
    files = ["artifacts/adapter/adapter_model.safetensors"]
    files += [str(file.relative_to(cut.root)) for file in max(cut.checkpoints.iterdir()).rglob("*.safetensors")]
    for name in files:
        one, other = load_file(whole.root / name), load_file(cut.root / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert sum("trainable_tokens_delta" in key for key in load_file(whole.root / files[0])) == 2


class _Stop(Callback):
    """Sends this process SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_plan_counts_each_token_and_warns_of_those_without_a_row(small_config: Config) -> None:
    config = config_with_tokens(small_config, {"new_tokens": [*TOKENS, "<never>"], "val_ratio": 0.0})
    found = {finding.code: finding for finding in TrainingWrapper(config).plan().findings}
    assert found["new_tokens"].severity == "warning" and "'<never>' in none of 8 rows" in found["new_tokens"].measured
    counts = found["new_tokens"].evidence["tokens"]
    assert counts["<tool>"] == {"occurrences": 8, "rows": 8, "learned": 8}
    assert counts["<never>"] == {"occurrences": 0, "rows": 0, "learned": 0}
    assert found["end_token"].severity == "fine"
    fine = TrainingWrapper(config_with_tokens(small_config)).plan().findings
    assert [f.severity for f in fine if f.code == "new_tokens"] == ["fine"]


def test_a_run_goes_on_from_an_adapter_with_the_same_tokens(taught: RunFolder, small_config: Config) -> None:
    sections: dict[str, Any] = {"model": {"id": base_of(taught)}, "peft": {"from_adapter": str(taught.root), "r": 4}}
    went_on = train(config_with_tokens(small_config, **sections, training={"max_steps": 1, "lr": 1e-6, "epochs": 1}))
    assert ask(open_run(went_on)) == "<tool>3</tool>"
    with pytest.raises(AdapterError, match="has rows for 2 new tokens, this run for 0"):
        TrainingWrapper(small_config(**sections)).plan()


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_quantized_base_trains_them(small_config: Config, tmp_path: Path, bits: str) -> None:
    """Its embedding and output head are not quantized."""
    pytest.importorskip("bitsandbytes")
    model = {"id": str(save_tied(tmp_path / "base")), "quantization": bits}
    run = train(config_with_tokens(small_config, model=model, training=LEARNED))
    assert ask(open_run(run)) == "<tool>3</tool>"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fast_path_computes_them(taught: RunFolder, precision: Any) -> None:
    """Training had a kernel for both ends, and decoding has them in its weights, also beside an unmerged adapter."""
    assert "2 modules with new tokens" in (taught.logs / "run.log").read_text()
    session = open_run(taught, precision=precision)
    assert ask(session) == "<tool>3</tool>"
    rows = TokenRows(session.model.get_input_embeddings())
    assert rows.is_active and rows.values.shape[0] == 2
    decoder = session.decoders.get_decoder(session.model, False, [1, 2, 3])
    assert decoder is not None and decoder.stack is not None
