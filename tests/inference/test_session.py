"""What inference.adapter names is what answers: a run, a bare adapter, or a base alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from training_lens import embedded
from training_lens.config.compose import compose
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError, ModelLoadingError, TrainingLensError
from training_lens.inference.generator import answer
from training_lens.inference.session import Session, open_run, open_session
from training_lens.runs.run_folder import RunFolder

SETTINGS = InferenceSection(max_new_tokens=16)


def opened(run: RunFolder, adapter: Any, *overrides: str) -> Session:
    """As `infer` opens it, in the run's experiment."""
    base = ["output.base_output_dir=" + str(run.root.parents[3]), *overrides]
    return open_session(compose(None, base, {"inference": {"adapter": adapter}}))


def said(session: Session, base: bool = False) -> str:
    return answer(session, session.prompt_ids([Message("user", "Where is it?")], "hill"), SETTINGS, base=base)


def test_latest_an_id_and_a_folder_are_the_same_run(finished_run: RunFolder) -> None:
    for name in ("latest", finished_run.run_id, str(finished_run.root)):
        assert opened(finished_run, name).source == str(finished_run.root)


def test_a_bare_adapter_answers_as_its_run_and_takes_any_domain(embedded_run: RunFolder, tmp_path: Path) -> None:
    bare = shutil.copytree(embedded_run.adapter, tmp_path / "bare")
    session = opened(embedded_run, str(bare))
    assert said(session) == said(open_run(embedded_run)) != said(session, base=True)
    assert session.prompt_ids([Message("user", "Hi")], "never heard of")


@pytest.mark.slow
def test_the_base_alone_answers_as_the_base_of_a_run(embedded_run: RunFolder) -> None:
    session = opened(embedded_run, "none")
    assert (session.source, session.has_adapter) == ("embedded", False)
    assert said(session) == said(open_run(embedded_run), base=True)


def test_the_base_alone_takes_template_and_domains_of_the_config(finished_run: RunFolder) -> None:
    session = opened(finished_run, "none", "data.template=alpaca", "data.domain.style=hash")
    text = session.tokenizer.decode(session.prompt_ids([Message("user", "Hi")], "law"))
    assert "### Instruction:" in text and "[domain: law]" not in text and "] Hi" in text


def test_presets_choose_the_adapter() -> None:
    assert compose(None, ["inference=base"]).inference.adapter == "none"
    assert compose(None, ["inference=latest"]).inference.adapter == "latest"
    assert compose(None, ["inference=manual", "inference.adapter=x/y"]).inference.adapter == "x/y"
    with pytest.raises(ConfigurationError, match=r"^inference.adapter: no adapter is named; give inference.adapter="):
        compose(None, ["inference=manual"])
    with pytest.raises(ConfigurationError, match=r"there are: base, latest, manual. Did you mean 'base'"):
        compose(None, ["inference=bas"])


def test_what_is_not_there_is_named_with_what_is_near(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.adapter, tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    config = tmp_path / "wide/adapter_config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"base_model_name_or_path": "x"}))
    for name, message in (
        (finished_run.run_id[:-1] + "z", f"Did you mean '{finished_run.run_id}"),
        (str(tmp_path / "adaptor"), f"Did you mean '{tmp_path / 'adapter'}"),
        (str(tmp_path / "empty"), "holds neither adapter_config.json"),
        (str(tmp_path / "wide"), "adapter_model.safetensors is missing"),
    ):
        with pytest.raises(TrainingLensError, match=message):
            opened(finished_run, name)


def test_an_adapter_of_another_base_says_which(finished_run: RunFolder, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "base", vocab_size=1024)
    with pytest.raises(TrainingLensError, match=r"the adapter was trained on another base than"):
        opened(finished_run, str(finished_run.adapter), f"model.id={other}")


@pytest.mark.parametrize("text", ["half \udcff", "\ud83d", "a \ufdd00\ufdd1", "\ufdd2", "\ufdd3"])
def test_what_is_no_text_is_refused_wherever_it_stands(finished_run: RunFolder, text: str) -> None:
    session = opened(finished_run, "none")
    user, said = Message("user", "Hi"), Message("assistant", text)
    calls: list[Any] = [([Message("user", text)], None), ([user, said, user], None), ([user], text)]
    calls += [([Message("user", "Hi", text)], None), ([user], None, [{"function": {"name": text}}])]
    for arguments in calls:
        with pytest.raises(ConfigurationError, match=r"holds U\+[DF][0-9A-F]{3}, which is not text"):
            session.prompt_ids(*arguments)


def own_base(folder: Path, file: str, **values: Any) -> Path:
    """A copy of the embedded base with these values in one of its JSON files."""
    shutil.copytree(embedded.resolve_name("embedded"), folder)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(known | values))
    return folder


@pytest.mark.parametrize("eos", ["<|end|>", [1, "x"], [True]])
def test_end_tokens_that_are_no_ids_are_refused(finished_run: RunFolder, tmp_path: Path, eos: Any) -> None:
    base = own_base(tmp_path / "base", "generation_config.json", eos_token_id=eos)
    with pytest.raises(ModelLoadingError, match=r"generation_config.json of .* has eos_token_id .*, expected"):
        opened(finished_run, "none", f"model.id={base}")


def test_a_lacking_eos_is_said_before_the_template_fails_for_it(finished_run: RunFolder, tmp_path: Path) -> None:
    base = own_base(tmp_path / "base", "tokenizer_config.json", eos_token=None)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    with pytest.raises(ModelLoadingError, match="has no EOS token"):
        opened(finished_run, "none", f"model.id={base}", f"data.template={tmp_path / 't.jinja'}")


def test_positions_are_those_of_the_text_part(finished_run: RunFolder) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    text = {**small, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 16, "max_position_embeddings": 48}
    config = Gemma3Config(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14})
    session = replace(open_run(finished_run), model=Gemma3ForConditionalGeneration(config))
    assert session.positions == 48
