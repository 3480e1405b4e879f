"""Adapter folders of tiny bases, and the config that exports them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import adapt

from training_lens.models.adapters import save_adapter
from training_lens.runs.run_folder import RunFolder


@pytest.fixture
def write_adapter(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter of `tiny_base`, of these keys of the peft section, and gives its folder."""
    from transformers import AutoModelForCausalLM

    def write(name: str = "adapter", **peft: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_adapter(adapt(AutoModelForCausalLM.from_pretrained(tiny_base), **peft), folder)
        return folder

    return write


@pytest.fixture
def export_config(tiny_base: Path, few_rows: dict[str, Any]) -> Callable[..., Any]:
    """The config that exports an adapter folder of `tiny_base`, checked on a few rows."""
    from training_lens.config.compose import validate_values

    def build(adapter: Path, **sections: Any) -> Any:
        own = {"model": {"id": str(tiny_base)}, "data": {"validation": few_rows["validation"]}}
        return validate_values({"inference": {"adapter": str(adapter)}, **own, **sections})

    return build


@pytest.fixture
def run_config(few_rows: dict[str, Any]) -> Callable[..., Any]:
    """The config that exports a run, checked on a few rows."""
    from training_lens.config.compose import validate_values

    def build(run: RunFolder) -> Any:
        return validate_values({"inference": {"adapter": str(run.root)}, "data": few_rows})

    return build
