"""Saved adapters: PEFT folders, checked by their configuration and the header of their weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.files import read_json, write_json
from training_lens.utils.formatting import suggest_path
from training_lens.utils.integrity import require_intact
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Shapes = dict[str, tuple[int, ...]]

NEEDED = ("r", "lora_alpha", "target_modules")
TARGETS = ("target_modules", "target_parameters")  # one of them may be empty
# Keys of an adapter's configuration that `PeftSection` has, too, or that do not change what it computes.
PLAIN = {
    *(*NEEDED, "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora"),
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "lora_dropout", "modules_to_tie", "peft_type", "peft_version"),
    *("revision", "target_parameters", "task_type", "trainable_token_indices"),
}
# Always written: the adapter's kind and base, for programs that read the file without PEFT.
NAMING = {*NEEDED, "peft_type", "task_type", "base_model_name_or_path"}
ON_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_adapter(folder: Path) -> Path:
    """The folder, after checking that it holds an adapter's two files.

    Raises:
        AdapterError: a file is missing; only safetensors weights are read.
        DamagedFileError: a file differs from what the run or checkpoint around it recorded.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            unsafe = " (adapter_model.bin may run code when opened: convert it)" if any(folder.glob("*.bin")) else ""
            raise AdapterError(f"{folder} is not an adapter folder: {name} is missing{unsafe}.")
    require_intact(folder)
    return folder


def require_finite(folder: Path) -> None:
    """Refuse an adapter with NaN or infinity in its weights or its scale.

    Raises:
        AdapterError: names the first tensor or key; or a file is broken.
    """
    import torch

    config = read_config(folder)
    scales = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    wrong = [name for name, scale in scales.items() if isinstance(scale, float) and not math.isfinite(scale)]
    with _open_weights(folder) as file:
        names = list(file.keys())
        wrong += [name for name in names if not torch.isfinite(file.get_tensor(name).float()).all()]
    if wrong:
        raise AdapterError(
            f"the adapter in {folder} is not finite: {len(wrong)} of its tensors or scales hold NaN or infinity, the "
            f"first is {wrong[0]}. Use an earlier checkpoint of its run, or train it again with a lower training.lr."
        )


def adapter_folder(reference: str) -> Path:
    """The adapter folder that `peft.from_adapter` names: itself, or artifacts/adapter of a run folder.

    Raises:
        AdapterError: there is no such folder, or files are missing.
    """
    path = expand_home(reference)
    if path.is_file():
        raise AdapterError(f"peft.from_adapter: '{reference}' is a file. Give the folder of an adapter, or of a run.")
    if not path.is_dir():
        raise AdapterError(f"peft.from_adapter: no folder '{reference}'.{suggest_path(path)}")
    run = RunFolder(path)
    if run.metadata.is_dir() and not (path / CONFIG).is_file():
        if not run.adapter.is_dir():
            raise AdapterError(
                f"peft.from_adapter: the run '{reference}' has no adapter yet. To finish it: training-lens train "
                f"--resume {reference}"
            )
        if run.scaled.is_dir():
            logger.info(
                "peft.from_adapter: training continues from the adapter as trained, not times %g", run.adapter_scale
            )
        path = run.adapter
    try:
        return require_adapter(path)
    except AdapterError as error:
        raise AdapterError(f"peft.from_adapter: {error}") from None


def adopt_saved_settings(peft: PeftSection) -> PeftSection:
    """The section completed from the adapter of `from_adapter`: rank, alpha, targets, variant, patterns.

    What neither sets stays unset.

    Raises:
        AdapterError: there is no such adapter, or it is not a plain LoRA or DoRA.
        ConfigurationError: the section sets another value than the adapter has.
    """
    if peft.from_adapter is None:
        return peft
    folder = adapter_folder(peft.from_adapter)
    saved = _read_section(read_config(folder), folder)
    given = peft.model_dump(include=peft.model_fields_set)
    problems = [
        f"peft.{key}: given {given[key]!r}, but the adapter in {folder} has {value!r}; leave it out, or leave "
        "peft.from_adapter out to start anew"
        for key, value in saved.items()
        if key in given and _sort_list(given[key]) != _sort_list(value)
    ]
    if problems:
        raise ConfigurationError(problems)
    return PeftSection.model_validate({**given, **saved})


def _sort_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        AdapterError: it is not a JSON object, or names a module that PEFT would import.
    """
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is no valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} holds no JSON object. Save the adapter again.")
    if misfit := find_type_error(CONFIG, config):
        raise AdapterError(f"{folder / CONFIG} has a wrong value. {misfit}. Save the adapter again.")
    if config.get("megatron_config"):
        raise AdapterError(
            f"{folder / CONFIG} has megatron_config, for which PEFT imports the module that megatron_core names: an "
            "adapter runs no code here. Leave it out."
        )
    return config


def drop_defaults(folder: Path) -> None:
    """Remove from adapter_config.json the keys at PEFT's defaults and PEFT's version.

    Each version of PEFT adds keys, and older ones refuse unknown keys or warn of them.
    """
    from peft import LoraConfig

    usual, settings = LoraConfig().to_dict(), read_config(folder)
    kept = {key: value for key, value in settings.items() if key in NAMING or value != usual.get(key)}
    kept.pop("peft_version", None)
    for key in TARGETS:
        if isinstance(kept.get(key), list):
            kept[key].sort()  # a set's order is another in each process
    write_json(folder / CONFIG, kept, verbatim=True)


def with_unit_scale(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration for these ranks by module, with alpha / rank = 1 in each: factors that hold their scale."""
    largest = max(ranks.values())
    # Longer paths first: PEFT takes the first key that a path ends with.
    others = {path: rank for path, rank in sorted(ranks.items(), key=lambda item: -len(item[0])) if rank != largest}
    kept = {key: value for key, value in settings.items() if key != "use_rslora"}
    return {**kept, "r": largest, "lora_alpha": largest, "rank_pattern": others, "alpha_pattern": dict(others)}


def _read_section(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The keys of `PeftSection` that an adapter's configuration sets, validated as a section."""
    require_plain(config, folder, "peft.from_adapter", "continue here")
    values = {
        "variant": "rslora" if config.get("use_rslora") else "lora",
        "init": "default",
        "use_dora": config.get("use_dora") or False,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "modules_to_save": config.get("modules_to_save") or [],
        "target_parameters": sorted(config.get("target_parameters") or []) or "none",
        "expert_rank": config["r"] if config.get("target_parameters") else None,
        **{key: config[key] for key in NEEDED},
    }
    try:
        section = PeftSection.model_validate(values).model_dump(include=set(values))
    except ConfigurationError as error:
        raise AdapterError(f"peft.from_adapter: {folder / CONFIG}: {error.problems[0]}. Save it again.") from error
    targets = section["target_modules"]
    return {**section, "target_modules": targets if isinstance(targets, str) else sorted(targets)}


def require_plain(config: dict[str, Any], folder: Path, key: str, doing: str, also: Collection[str] = ()) -> None:
    """Refuse an adapter that is not a plain LoRA or DoRA on the base's own weights.

    Args:
        key: the config key that named the adapter; `doing` is what other adapters cannot do; both for the message.
        also: keys that may be set besides those of `PeftSection`.

    Raises:
        AdapterError: another kind of adapter, PEFT options that change what it computes, or a missing key.
    """
    from peft import LoraConfig

    kind, start = config.get("peft_type"), str(config.get("init_lora_weights"))
    if kind != "LORA":
        raise AdapterError(f"{key}: {folder} holds a {kind} adapter; only LoRA and DoRA can {doing}.")
    if start.startswith(ON_OTHER_WEIGHTS):
        raise AdapterError(
            f"{key}: {folder} started as {start}, which changed the base's weights under it. Convert it to "
            "a plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
        )
    usual = LoraConfig().to_dict()
    others = [k for k, v in config.items() if k not in {*PLAIN, *also} and v and v != usual.get(k)]
    missing = [k for k in NEEDED if not config.get(k) and not (k in TARGETS and any(config.get(t) for t in TARGETS))]
    if others or missing:
        what = f"uses {', '.join(others)}" if others else f"does not say {', '.join(missing)}"
        raise AdapterError(f"{key}: {folder} {what}; only plain LoRA and DoRA adapters can {doing}.")


def saved_shapes(folder: Path) -> Shapes:
    """Names and shapes of the saved tensors, from the file's header.

    Raises:
        AdapterError: it is not a safetensors file.
    """
    with _open_weights(folder) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _open_weights(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is broken ({error}). Copy or save it again.") from error


def check_fit(folder: Path, wanted: Shapes, base: str) -> None:
    """Compare a saved adapter with the names and shapes of tensors that it must have on `base`.

    Raises:
        AdapterError: names or shapes differ, so it was trained on another base.
    """
    require_finite(folder)
    found = saved_shapes(folder)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        there, here = (shapes.get(wrong[0], "nothing") for shapes in (found, wanted))
        raise AdapterError(
            f"peft.from_adapter: {folder} is the adapter of another base: {len(wrong)} of its tensors do not fit "
            f"'{base}'; {wrong[0]} has {there}, this base takes {here}. Give the base that it was trained on."
        )
    origin = read_config(folder).get("base_model_name_or_path")
    if origin and origin != base:
        logger.warning("the adapter in %s was trained on '%s'; its shapes fit '%s' too", folder, origin, base)
