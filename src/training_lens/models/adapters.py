"""LoRA and DoRA adapters on a frozen base, through PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.models import pissa
from training_lens.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    adapter_folder,
    check_fit,
    drop_defaults,
    read_config,
    require_adapter,
    require_finite,
    saved_shapes,
)
from training_lens.models.embedding_rows import (
    choose_trained_rows,
    embedding_modules,
    require_rows,
    require_same_rows,
    require_untargeted,
    require_wrapped,
    token_wrappers,
)
from training_lens.models.experts import (
    adapted_path,
    choose_expert_rank,
    choose_parameters,
    describe_targets,
    is_expert_adapter,
    target_name,
)
from training_lens.models.model_classes import is_found_by_type
from training_lens.models.omissions import Omission, is_linear
from training_lens.models.quantization import element_count
from training_lens.models.targets import check_targets, choose_targets, whole_modules
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model with adapter; tied weights count once."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


@dataclass(frozen=True)
class Adaptation:
    """Which modules of a base an adapter changes, read from the PEFT model, and which it leaves out, by reason."""

    adapted: tuple[str, ...]  # paths in the base, without modules that are trained whole
    left_out: tuple[Omission, ...]
    expert_rank: int | None = None  # of each expert in one parameter

    def as_json(self) -> dict[str, Any]:
        """As written to the run's metadata."""
        found = {"adapted": list(self.adapted), "left_out": [asdict(omission) for omission in self.left_out]}
        return found | ({"expert_rank": self.expert_rank} if self.expert_rank else {})

    @property
    def names(self) -> list[str]:
        """The last parts of the adapted paths, sorted; of experts in one parameter with their module's."""
        return sorted({target_name(path) for path in self.adapted})

    def __str__(self) -> str:
        experts = f"; each expert at rank {self.expert_rank}" if self.expert_rank else ""
        return f"{len(self.adapted)} modules: {', '.join(self.names)}{experts}"


def log_adaptation(adaptation: Adaptation) -> None:
    """Log what is adapted, and a line for each reason why modules are not."""
    logger.info("the adapter takes %s", adaptation)
    for omission in adaptation.left_out:
        logger.info("not adapted: %s", omission)


def describe_adapter(peft: PeftSection) -> str:
    """The kind of adapter in a few words: 'rslora+dora, pissa start, r=16'."""
    parts = [peft.variant + ("+dora" if peft.use_dora else "")]
    if peft.init == "pissa":
        parts.append("pissa start")
    parts.append(f"r={peft.r}" + (" (rank_pattern besides)" if peft.rank_pattern else ""))
    if peft.modules_to_save:
        parts.append(f"{', '.join(peft.modules_to_save)} whole")
    if peft.lora_plus_ratio:
        parts.append(f"B at {peft.lora_plus_ratio:g} x lr")
    if peft.from_adapter:
        parts.append(f"continuing from {peft.from_adapter}")
    return ", ".join(parts)


def _inject_adapter(model: Any, peft: PeftSection, new_ids: Sequence[int]) -> tuple[Any, tuple[Omission, ...]]:
    """`model`, which may be without weights, in PEFT's wrapper; and the modules that are left out."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

    size = peft.model_dump(include={"r", "lora_alpha", "rank_pattern", "alpha_pattern"})
    whole, tied = whole_modules(model, peft.modules_to_save)
    experts = choose_parameters(model, peft)
    names, left_out = choose_targets(model, peft, experts)
    told = describe_targets(model, experts, peft)
    size["rank_pattern"] = told.rank_pattern
    rows, is_tied = choose_trained_rows(model, new_ids, whole), len(embedding_modules(model)) == 1
    config = LoraConfig(
        task_type="CAUSAL_LM" if is_found_by_type(model) else None,  # None: PEFT then saves the base's class by name
        lora_dropout=peft.lora_dropout,
        target_modules=names,
        target_parameters=told.names or None,
        use_dora=peft.use_dora,
        use_rslora=peft.variant == "rslora",
        modules_to_save=whole or None,
        ensure_weight_tying=tied,
        trainable_token_indices=rows or None,
        **(pissa.double_rank(peft) if peft.init == "pissa" else size),
    )
    targets = {n: m for n, m in model.named_modules() if n and check_target_module_exists(config, n)}
    check_targets(model, targets, peft, experts)
    require_untargeted(rows, targets)
    # Conv1D keeps its weight as (in, out).
    config.fan_in_fan_out = any(is_linear(m) and not isinstance(m, torch.nn.Linear) for m in targets.values())
    try:
        with _filter_peft_warnings():
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, UserWarning) as error:
        raise AdapterError(f"peft: this model cannot take this adapter: {error}") from error
    different = sorted(set(adapted_modules(adapted)).symmetric_difference([*targets, *experts]))
    if different:
        raise AdapterError(
            f"peft.target_modules: PEFT adapts other modules of this model than it was asked to: {different[0]} and "
            f"{len(different) - 1} more. Name the modules, with their whole paths."
        )
    require_wrapped(adapted, rows, is_tied)
    return adapted, left_out


def attach(model: Any, peft: PeftSection, new_ids: Sequence[int] = ()) -> Any:
    """The model with its adapter in float32: a fresh one, or that of `from_adapter`.

    A fresh adapter computes exactly the base (DoRA and PiSSA up to rounding); under `base_only` the model always does.

    Args:
        new_ids: tokens whose rows of embedding and output head are trained, too.

    Raises:
        AdapterError: a module cannot be adapted, or the saved adapter does not fit.
    """
    adapted, _ = _inject_adapter(model, peft, new_ids)
    for _, parameter in trainable_parameters(adapted):
        parameter.data = parameter.data.float()
    _convert_whole_module_dtypes(adapted)
    if peft.from_adapter:
        require_same_rows(adapted, adapter_folder(peft.from_adapter))
        restore_adapter(adapted, adapter_folder(peft.from_adapter))
    elif peft.init == "pissa":
        pissa.start_from_principal_halves(adapted)
    return adapted


def _convert_whole_module_dtypes(adapted: Any) -> None:
    """Modules trained whole compute in float32, with inputs and outputs in the base's dtype, as LoRA layers do."""
    from peft.utils import ModulesToSaveWrapper

    def widen(_module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in given)

    for wrapper in adapted.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values() if dtype != torch.float32 else ():
                module.register_forward_pre_hook(widen)
                module.register_forward_hook(lambda _module, _given, result, dtype=dtype: result.to(dtype))


def check_adapter(skeleton: Any, peft: PeftSection, new_ids: Sequence[int] = ()) -> Adaptation:
    """What `attach` would adapt, tried on a model without weights (`factory.build_skeleton`), which is used up.

    Raises:
        AdapterError: see `attach`; a saved adapter is compared by the shapes in its header.
    """
    base = skeleton.name_or_path
    adapted, left_out = _inject_adapter(skeleton, peft, new_ids)
    if peft.from_adapter:
        require_same_rows(adapted, adapter_folder(peft.from_adapter))
        shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(adapted).items()}
        check_fit(adapter_folder(peft.from_adapter), shapes, base)
    _require_reloadable(adapted)
    has_experts = any(is_expert_adapter(m) for m in adapted.modules())
    rank = choose_expert_rank(adapted.config, peft) if has_experts else None
    return Adaptation(tuple(adapted_modules(adapted)), left_out, rank)


def _require_reloadable(adapted: Any) -> None:
    """Refuse an adapter that PEFT cannot load again, because it renames its tensors to names that the model lacks.

    Such an adapter would train, and have no effect wherever it is loaded.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(adapted, saved_tensors(adapted))
    lost = [*result.unexpected_keys, *_lost_keys(adapted, result.missing_keys)]
    if lost:
        raise AdapterError(
            f"peft: PEFT cannot load an adapter of a {type(adapted.get_base_model()).__name__} that it saved: it looks "
            f"for other names than those saved ({lost[0]}). Give the text model alone, or another base."
        )


def is_adapter_key(name: str) -> bool:
    """Whether a tensor of a PEFT model, or of its file, is a low-rank factor or a row of a new token."""
    return "lora_" in name or ".token_adapter.trainable_tokens_delta" in name


def _lost_keys(adapted: Any, missing: Sequence[str]) -> list[str]:
    """Those of the missing keys that an adapter's file should have; tied rows of new tokens are saved once."""
    tied = tuple(path for path, wrapper in token_wrappers(adapted) if wrapper.token_adapter.tied_adapter)
    return [key for key in missing if is_adapter_key(key) and not key.split(".token_adapter.")[0].endswith(tied)]


def saved_tensors(adapted: Any) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT model's adapter, by the names under which it is saved; nothing is copied."""
    from peft import get_peft_model_state_dict

    saved: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return saved


def adapted_modules(adapted: Any) -> list[str]:
    """Paths, in the base, of the modules and of the parameters of experts that carry a LoRA in a PEFT model."""
    from peft.tuners.lora import LoraLayer

    named = adapted.get_base_model().named_modules()
    return [adapted_path(path, m) for path, m in named if isinstance(m, LoraLayer)]


@contextmanager
def _filter_peft_warnings() -> Iterator[None]:
    """Silence PEFT's warnings about intended settings; untied weights and missing keys become errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT holds patterns against modules alone, and takes them for parameters of experts all the same.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("error", message="You have requested `ensure_weight_tying`")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def trainable_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that training changes, in the model's order."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def count_parameters(model: Any) -> ParameterCount:
    """Trainable and total parameters; each 4-bit weight counts as one."""
    parameters = list(model.parameters())  # each tensor once, also where weights are tied
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(trainable, sum(map(element_count, parameters)))


def save_adapter(model: Any, folder: Path | str) -> None:
    """Write the adapter in PEFT's format (safetensors), readable by older versions, into an existing folder."""
    folder = Path(folder)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    drop_defaults(folder)
    require_finite(folder)


def load_adapter(model: Any, folder: Path | str, *, training: bool = False) -> Any:
    """The base model with the saved adapter of `folder`.

    Raises:
        AdapterError: the folder lacks files, they are broken, or the adapter does not fit this base.
    """
    from peft import PeftModel

    folder = require_adapter(Path(folder))
    require_finite(folder)
    if not isinstance(read_config(folder).get("peft_type"), str):
        raise AdapterError(f"{folder / CONFIG} names no peft_type, so it is not of an adapter. Save it again.")
    tensors = sum(map(is_adapter_key, saved_shapes(folder)))
    require_rows(model, folder)
    try:
        with _filter_peft_warnings():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=training)
    except Exception as error:  # PEFT trusts the configuration: a wrong value there may raise anything
        raise AdapterError(f"the adapter in {folder} does not fit this base model: {describe_error(error)}") from error
    used = sum(is_adapter_key(name) for name, _ in adapted.named_parameters(remove_duplicate=False))
    if tensors > used:
        raise AdapterError(
            f"the adapter in {folder} does not fit this base model, which takes {used} of its {tensors} tensors. Give "
            "the base that it was trained on."
        )
    return adapted.train(training)


def restore_adapter(model: Any, folder: Path) -> None:
    """Load a saved adapter's weights into an attached adapter.

    Raises:
        AdapterError: a tensor is missing or has another shape.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    require_finite(folder)
    try:
        result = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    except (RuntimeError, KeyError) as error:
        raise AdapterError(f"{folder}: does not fit the run's adapter ({error}).") from error
    lost = _lost_keys(model, result.missing_keys)
    if lost or result.unexpected_keys:
        raise AdapterError(
            f"{folder}: does not fit the run's adapter (missing {lost}, unexpected {result.unexpected_keys})."
        )


@contextmanager
def base_only(model: Any, enabled: bool = True) -> Iterator[None]:
    """Within the block the model computes as the base alone; with `enabled` false, nothing changes."""
    if enabled and hasattr(model, "disable_adapter"):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        try:
            with model.disable_adapter():
                yield
        finally:
            for parameter in frozen:  # PEFT makes all of an adapter trainable when it switches it on again
                parameter.requires_grad_(False)
    else:
        yield
