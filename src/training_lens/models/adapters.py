"""LoRA and DoRA adapters on a frozen base, through PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.utils.formatting import nearest


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model with adapter; tied weights count once."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


def target_names(model: Any, asked: str | list[str]) -> list[str]:
    """The names of the modules to adapt, shortened to their last part: ['down_proj', 'gate_proj', ...].

    Raises:
        AdapterError: a name that no linear layer has; lists what there is and the nearest.
    """
    head = model.get_output_embeddings()
    linear = {
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
    }
    if asked == "auto":
        if not linear:
            raise AdapterError("peft.target_modules: the model has no linear layers to adapt.")
        return sorted(linear)
    names = {n for n, _ in model.named_modules()}
    for name in asked:
        if not any(n == name or n.endswith(f".{name}") for n in names):
            close = nearest(name, linear)
            hint = f" Did you mean '{close}'?" if close else ""
            raise AdapterError(
                f"peft.target_modules: no module is called '{name}'.{hint} Linear layers: {', '.join(sorted(linear))}."
            )
    return sorted(asked)


def attach(model: Any, peft: PeftSection) -> Any:
    """The model with a fresh adapter: B is zero, so it computes exactly what the base does. Adapters are float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=target_names(model, peft.target_modules),
        use_dora=peft.use_dora,
    )
    adapted = get_peft_model(model, config)
    for _, parameter in trainable(adapted):
        parameter.data = parameter.data.float()
    return adapted


def trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that training changes, in the model's order."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def count_parameters(model: Any) -> ParameterCount:
    """Trainable and total parameters."""
    parameters = list(model.parameters())  # each tensor once, also where weights are tied
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's format (safetensors), into a folder that is there."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def load_adapter(model: Any, folder: Path, *, training: bool = False) -> Any:
    """The base model with the saved adapter of `folder`.

    Raises:
        AdapterError: the folder lacks files, or the adapter does not fit this base.
    """
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} is no adapter folder: {name} is missing.")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=training)
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise AdapterError(f"the adapter in {folder} does not fit this base model: {error}") from error
    return adapted.train(training)


def restore_adapter(model: Any, folder: Path) -> None:
    """Put a saved adapter's weights into an adapter that is attached already.

    Raises:
        AdapterError: a tensor is missing or has another shape.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    lost = [key for key in result.missing_keys if "lora_" in key]
    if lost or result.unexpected_keys:
        raise AdapterError(
            f"{folder}: does not fit the run's adapter (missing {lost}, unexpected {result.unexpected_keys})."
        )


@contextmanager
def base_only(model: Any, yes: bool = True) -> Iterator[None]:
    """Within the block the model computes as the base alone; with `yes` false, as it is."""
    if yes and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield
