"""An initial config file from the schema: every key with its description, most of them commented out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from training_lens.config.keys import section_model
from training_lens.config.schema import TrainingConfig

# No key of an experiment preset: the file would override a preset on the command line.
LIVE = ("model.id", "data.train", "data.val_ratio", "output.experiment_name")
WIDTH = 100
HEAD = """\
# Training Lens. A line with '#' right before a key is that key at its default: take the '#' away to change it.
# Check: training-lens validate --config {file}    Train: training-lens train --config {file}
"""


def render_skeleton(values: Mapping[str, Any], file: str = "config.yaml") -> str:
    """A YAML config: `values` (by dotted key) and the keys of `LIVE` are set, all others commented out."""
    return HEAD.format(file=file) + "".join(_render_section(TrainingConfig, values, ""))


def _render_section(section: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", section_model(field)
        if inner:
            yield f"\n{_render_comment(inner.__doc__ or '', indent)}{indent}{name}:\n"
            yield from _render_section(inner, values, f"{key}.")
        else:
            value = json.dumps(values.get(key, field.default), ensure_ascii=False)  # JSON is YAML
            off = "" if key in values or key in LIVE else "#"
            yield f"{_render_comment(field.description or '', indent)}{indent}{off}{name}: {value}\n"


def _render_comment(text: str, indent: str) -> str:
    return "".join(f"{indent}# {line}\n" for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False))
