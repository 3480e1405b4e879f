"""What the checks run on: models of random weights with the embedded tokenizer, the embedded rows, and run configs."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.data.batching import StepPlan
from training_lens.models.factory import load_model
from training_lens.training.adapted_base import build_trainer
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import free_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import hide_progress_bars

Found = dict[str, Any]  # what a check returns; its `summary` is its line in the table
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
}  # fmt: skip
MEDIUM = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_768,
}  # fmt: skip
LARGE = {  # Llama 3.2 1B
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
}  # fmt: skip
KINDS = ("Llama", "Qwen3", "Gemma2", "Gemma3Text", "Phi3")
TRACEBACK_LINES = 12
JOINED_ROWS = 8  # embedded rows in one row, so that a GPU has something to do


@dataclass(frozen=True)
class Settings:
    """Where the checks run, whether with small shapes, and a folder that they may fill."""

    device: torch.device
    small: bool
    folder: Path


def isolate(compute: Callable[[], Found]) -> Found:
    """What `compute` returns, with its status and seconds; if it raises, the error and its traceback's end."""
    started = time.perf_counter()
    try:
        found = {"status": "ok", **compute()}
    except Exception as error:
        lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
        found = {"status": "failed", "error": describe_error(error), "traceback": lines}
    free_memory()  # behind the except, which holds the tensors of what failed
    return {**found, "seconds": time.perf_counter() - started}


def build_model(settings: Settings, kind: str, dtype: torch.dtype, large: bool = False) -> Any:
    """A model of random weights on the device, always with the same ones: frozen, in evaluation mode."""
    sizes = SMALL if settings.small else LARGE if large else MEDIUM
    more: dict[str, Any] = {}
    if kind.startswith("Gemma"):
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(sizes["num_hidden_layers"])]
        more = {"sliding_window": 16 if settings.small else 256, "layer_types": kinds}
        more |= {} if settings.small else {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1}  # the embedded tokenizer's
    config = getattr(transformers, f"{kind}Config")(
        max_position_embeddings=4096, tie_word_embeddings=True, **sizes | special | more
    )
    torch.manual_seed(0)
    with settings.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def write_model(settings: Settings, large: bool = False) -> Path:
    """The folder of a Llama in bf16 with the embedded tokenizer, written once."""
    folder = settings.folder / ("large" if large else "base")
    if not folder.exists():
        with hide_progress_bars():
            build_model(settings, "Llama", torch.bfloat16, large).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(embedded.PATHS[embedded.MODEL]).save_pretrained(folder)
    return folder


def write_rows(settings: Settings) -> Path:
    """The file of the rows that runs train on, written once: embedded rows, on a GPU several of them joined in one."""
    path = settings.folder / "rows.jsonl"
    if not path.exists():
        lines = Path(embedded.PATHS[embedded.TRAIN]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[: 48 if settings.small else None]]
        joined = 1 if settings.small else JOINED_ROWS
        groups = [rows[i : i + joined] for i in range(0, len(rows), joined)]
        keys = ("instruction", "input", "output")
        written = [json.dumps({key: "\n".join(row[key] for row in group) for key in keys}) for group in groups]
        path.write_text("\n".join(written) + "\n", encoding="utf-8")
    return path


def configure(settings: Settings, run_id: str, large: bool = False, **sections: dict[str, Any]) -> TrainingConfig:
    """The config of a run of few steps; `sections` add to it."""
    config = TrainingConfig.model_validate({
        "model": {"id": str(write_model(settings, large)), "device": str(settings.device)},
        "data": {"train": [str(write_rows(settings))], "val_ratio": 0.1},
        "peft": {"r": 8},
        "training": {"max_steps": 4, "batch_size": 4 if settings.small else 16, "lr": 1e-3},
        "lens": {"report": False},
        "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
        "output": {"base_output_dir": str(settings.folder / "outputs"), "run_id": run_id},
    })  # fmt: skip
    return config.replace_keys(**sections)


def assemble(config: TrainingConfig) -> tuple[RunPlan, Trainer]:
    """The plan of a run and its trainer, outside of a run's folder."""
    plan = TrainingWrapper(config).plan()
    model = load_model(plan.config.model, plan.processes.device, plan.precision)
    return plan, build_trainer(plan, model, CheckpointManager(Path("unused"), plan.fingerprint))


def first_steps(trainer: Trainer, count: int) -> list[StepPlan]:
    return list(islice(trainer.schedule.iterate_steps(), count))
