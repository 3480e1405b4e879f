"""The chat templates of common model families, which the trl package carries."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="trl carries the templates")
TEMPLATES = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in sorted(resources.files("trl").joinpath("chat_templates").iterdir(), key=lambda f: f.name)
    if file.name.endswith(".jinja")
}
# What looks like a special token in a template becomes one of the tokenizer, as in the model that it belongs to.
SPECIAL = re.compile(
    r"<\|[^|>\n]{1,40}\|>|<\uff5c[^\uff5c>]{1,40}\uff5c>|<[a-z]+_of_[a-z]+>|<end_of_utterance>|<\|[a-z_]+>|<[a-z_]+\|>|</s>|\[/?INST\]"
)


def add_special_tokens(tokenizer: Any) -> None:
    """Give the tokenizer the special tokens that its chat template writes."""
    names = sorted(set(SPECIAL.findall(tokenizer.chat_template)))
    tokenizer.add_special_tokens({"additional_special_tokens": names})
