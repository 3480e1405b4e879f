"""llama.cpp computes with what was exported what the adapter computes; see `make test-llama`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import VARIANTS

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.errors import MergeError
from training_lens.runs.run_folder import RunFolder

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("forked_python")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_computes_the_same_on_its_base(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    config, options = export_config(write_adapter(**VARIANTS[variant])), ExportOptions("gguf", tmp_path / "out")
    exported = export_adapter(config, options)
    assert exported.verification is not None and exported.verification.max_logit_difference < 1e-3
    assert exported.verification.greedy_agreement == 1 and not exported.report["not_computed"]


@pytest.mark.parametrize(("dtype", "limit"), [("f32", 1e-3), ("f16", 0.1)])
@pytest.mark.parametrize("peft", [VARIANTS["rslora, patterns"], {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_merged_model_computes_the_same(
    write_adapter: Callable[..., Path],
    export_config: Callable[..., Any],
    tmp_path: Path,
    peft: dict[str, Any],
    dtype: Any,
    limit: float,
) -> None:
    options = ExportOptions("gguf", tmp_path / "out", merged=True, dtype=dtype)
    exported = export_adapter(export_config(write_adapter(**peft)), options)
    assert exported.verification is not None and exported.verification.max_logit_difference < limit


def test_a_trained_run_answers_the_same_with_its_own_stop_tokens(
    own_run: RunFolder, run_config: Callable[..., Any]
) -> None:
    exported = export_adapter(run_config(own_run), ExportOptions("gguf"))
    assert exported.verification is not None and exported.verification.greedy_agreement == 1
    assert 'PARAMETER stop "<|end|>"' in (exported.output / "Modelfile").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_coarser_weights_answer_the_same(own_run: RunFolder, run_config: Callable[..., Any], dtype: Any) -> None:
    exported = export_adapter(run_config(own_run), ExportOptions("gguf", merged=True, dtype=dtype))
    assert exported.verification is not None and exported.verification.distance_share < 0.1


def test_a_file_that_llama_cpp_cannot_load_is_removed(
    own_run: RunFolder, run_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training_lens.adapter_export import gguf_files

    monkeypatch.setattr(gguf_files, "common_settings", lambda config: {"block_count": config.num_hidden_layers})
    with pytest.raises(MergeError, match=r"llama.cpp cannot load what was written"):
        export_adapter(run_config(own_run), ExportOptions("gguf", merged=True))
    assert not (own_run.exported / "gguf-merged").exists()
