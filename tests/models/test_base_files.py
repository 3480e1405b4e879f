"""A tokenizer that was not changed is written as the base has it; one that was, with that change alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from training_lens import embedded
from training_lens.models.base_files import save_tokenizer
from training_lens.utils.files import read_json, write_json

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def base(folder: Path, form: str) -> Path:
    """The embedded tokenizer in the form of several versions of transformers."""
    own = embedded.PATHS[embedded.MODEL]
    folder.mkdir()
    shutil.copy(own / "tokenizer.json", folder)
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokens = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"}
        for t in read_json(own / "tokenizer.json")["added_tokens"]
    }
    settings: dict[str, Any] = {**names, "added_tokens_decoder": tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    if form == "template in the config":
        settings["chat_template"] = "{{ 'old' }}"
    elif form == "several templates in the config":
        settings["chat_template"] = [{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in ("default", "tool_use")]
    elif form == "template in files":
        (folder / "chat_template.jinja").write_text("{{ 'old' }}\n", encoding="utf-8")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ 'tools' }}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "added_tokens.json", {token["content"]: int(index) for index, token in tokens.items()})
    return folder


FORMS = ["no template", "template in the config", "several templates in the config", "template in files"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_not_changed_stays_byte_for_byte(tmp_path: Path, form: str) -> None:
    own = base(tmp_path / "base", form)
    (own / "config.json").write_text("{}")  # of the model: not the tokenizer's
    (tmp_path / "out").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer("used", padding="max_length", max_length=8, truncation=True)  # settings of a call, not of the tokenizer
    save_tokenizer(tokenizer, tmp_path / "out", own)
    assert contents(tmp_path / "out") == {k: v for k, v in contents(own).items() if k != "config.json"}


@pytest.mark.parametrize("form", FORMS)
def test_another_template_is_put_where_the_base_has_its_own(tmp_path: Path, form: str) -> None:
    own = base(tmp_path / "base", form)
    (tmp_path / "out").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, tmp_path / "out", own)
    before, after = contents(own), contents(tmp_path / "out")
    places = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer_config.json"}
    assert {n: c for n, c in after.items() if n not in places} == {n: c for n, c in before.items() if n not in places}
    settings = read_json(tmp_path / "out/tokenizer_config.json")
    assert ("chat_template" in settings) == ("config" in form)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    rest = {**read_json(own / "tokenizer_config.json"), "chat_template": None}
    assert {**settings, "chat_template": None} == rest


def test_another_token_is_named_in_every_file_that_names_tokens(tmp_path: Path) -> None:
    own = base(tmp_path / "base", "no template")
    (tmp_path / "out").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    save_tokenizer(tokenizer, tmp_path / "out", own)
    after = {name: read_json(tmp_path / "out" / name) for name in contents(tmp_path / "out")}
    index = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert after["tokenizer_config.json"]["added_tokens_decoder"][str(index)]["content"] == "<|stop|>"
    assert after["added_tokens.json"]["<|stop|>"] == index
    assert after["special_tokens_map.json"]["eos_token"] == after["tokenizer_config.json"]["eos_token"] == "<|stop|>"
    assert after["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == index


def test_the_bases_code_is_neither_copied_nor_named_unless_it_is_trusted(tmp_path: Path) -> None:
    own = base(tmp_path / "base", "no template")
    settings = read_json(own / "tokenizer_config.json") | {"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}}
    write_json(own / "tokenizer_config.json", settings)
    (own / "tokenization_x.py").write_text("raise SystemExit")
    (tmp_path / "out").mkdir()
    save_tokenizer(AutoTokenizer.from_pretrained(own), tmp_path / "out", own)
    assert "tokenization_x.py" not in contents(tmp_path / "out")
    assert "auto_map" not in read_json(tmp_path / "out/tokenizer_config.json")
