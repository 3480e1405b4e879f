"""Adapters on disk (by PEFT, by the HF Trainer, by hand), and recordings made of arrays through the real store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from training_lens.config.lens_section import LensSection
from training_lens.core import table_names as tables
from training_lens.core.lens_store import LensStore
from training_lens.core.lens_writer import LensWriter
from training_lens.core.recording import Recording
from training_lens.core.types import RUN, Captured, DataType, LensManifest, ModuleRecord

Columns = Mapping[str, Any]  # measure -> (steps, rows), or (steps, rows, any) of vectors; or its one row (steps,)
KINDS = {
    tables.GRADIENTS: DataType.ADAPTER_GRADIENTS,
    tables.OPTIMIZER: DataType.OPTIMIZER_STATE,
    tables.ACTIVATIONS: DataType.ACTIVATIONS,
    tables.DIVERGENCE: DataType.ACTIVATIONS,
    tables.LORA_ACTIVATIONS: DataType.LORA_ACTIVATIONS,
    tables.LOSS: DataType.LOSS,
    tables.EVALUATION: DataType.LOSS,
}


@pytest.fixture
def modules() -> tuple[ModuleRecord, ...]:
    """Two layers of q and v, and a head outside of them."""
    names = [(f"model.layers.{layer}.self_attn.{kind}_proj", layer, kind) for layer in (0, 1) for kind in ("q", "v")]
    found = [ModuleRecord(name, layer, kind, 4, 16, 16, 2.0) for name, layer, kind in names]
    return (*found, ModuleRecord("lm_head", None, "lm_head", 4, 16, 32, 2.0))


@pytest.fixture
def record(tmp_path: Path, modules: tuple[ModuleRecord, ...]) -> Callable[..., Recording]:
    """Writes tables and gives their recording: `record({"adapter_weights": (steps, {"norm_b": values})})`."""

    def write(
        content: Mapping[str, tuple[Any, Columns]],
        *,
        name: str = "run",
        of: tuple[ModuleRecord, ...] = modules,
        rows: Mapping[str, tuple[str, ...]] | None = None,
        snapshots: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
        cost: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        probe: Mapping[str, int] | None = None,
    ) -> Recording:
        kinds = {table: KINDS.get(table, DataType.ADAPTER_WEIGHTS) for table in content}
        manifest = LensManifest(of, tables=kinds, settings=settings or {}, probe=probe)
        writer = LensWriter(tmp_path / name, manifest, LensSection())
        for table, (steps, columns) in content.items():
            names = (rows or {}).get(table) or _rows(table, of)
            for i, step in enumerate(steps):
                writer.add(table, int(step), _captured(columns, i, names))
        for step, tensors in (snapshots or {}).items():
            writer.add(tables.SNAPSHOTS, step, Captured(tensors=tensors))
        writer.close(cost)
        return Recording(name, tmp_path / name, manifest, LensStore(tmp_path / name), "finished")

    return write


def _rows(table: str, of: tuple[ModuleRecord, ...]) -> tuple[str, ...]:
    whole = table in (tables.LOSS, tables.EVALUATION, tables.DIVERGENCE)
    return (RUN,) if whole else tuple(m.name for m in of)


def _captured(columns: Columns, i: int, names: tuple[str, ...]) -> Captured:
    taken = {measure: np.atleast_1d(np.asarray(values, float)[i]) for measure, values in columns.items()}
    scalars = {measure: torch.as_tensor(values) for measure, values in taken.items() if values.ndim == 1}
    vectors = {measure: [*torch.as_tensor(values)] for measure, values in taken.items() if values.ndim == 2}
    return Captured(scalars, vectors, rows=names)


@pytest.fixture
def llama() -> Any:
    return tiny_model(tie_word_embeddings=False).requires_grad_(True)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, saved."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trainer_output(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the HF Trainer leaves of six steps with a PEFT model: checkpoints 2, 4 and 6. For reading alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer") / "output"
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 16}, "use_rslora": True}
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **config)
    )
    rows = [{"input_ids": (ids := torch.randint(50, (12,)).tolist()), "labels": ids} for _ in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4]).train()
    return folder


@pytest.fixture(scope="session")
def run_without_captures(small_config_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of ours that was trained with the lens off. For reading alone."""
    from training_lens import TrainingWrapper
    from training_lens.runs.run_folder import RunFolder

    config = small_config_in(tmp_path_factory.mktemp("outputs"), data={"max_examples": 32}, peft={"r": 2})
    return RunFolder(Path(TrainingWrapper(config).train().run_dir))


@pytest.fixture
def save_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT folder with given A (rank, in), B (out, rank) and perhaps magnitude (out,) for each module."""

    def save(name: str, factors: Mapping[str, tuple[torch.Tensor, ...]], **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        for module, (a, b, *magnitude) in factors.items():
            path = f"base_model.model.{module}.lora_"
            tensors |= {f"{path}A.weight": a.clone(), f"{path}B.weight": b.clone()}
            tensors |= {f"{path}magnitude_vector": m for m in magnitude}
        save_file(tensors, folder / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder

    return save
