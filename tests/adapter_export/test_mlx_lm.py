"""mlx-lm computes with what was exported what the adapter computes; see `make test-mlx`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import VARIANTS

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter

pytest.importorskip("mlx_lm")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_computes_the_same_on_its_base(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    config, options = export_config(write_adapter(**VARIANTS[variant])), ExportOptions("mlx", tmp_path / "out")
    exported = export_adapter(config, options)
    assert exported.verification is not None and exported.verification.max_logit_difference < 1e-3
    assert exported.verification.greedy_agreement == 1 and not exported.report["not_computed"]
