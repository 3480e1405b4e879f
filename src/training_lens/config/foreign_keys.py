"""The keys of other trainers' flat configs and our keys for them. docs/coming-from.md shows this table."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from training_lens.utils.nested import nest_keys

Convert = Callable[[Any], Any]


UNSET: Any = object()  # the value of a key that stays at its default: that of `load_in_4bit: false`


@dataclass(frozen=True)
class ForeignKey:
    """Other trainers' names of `key`; `convert` returns our value, or raises a ValueError."""

    names: str  # separated by spaces
    key: str
    convert: Convert = lambda value: value
    values: str = ""  # how values are converted, for the docs


def _convert_switch(on: Any, off: Any = UNSET) -> Convert:
    """A converter of a bool to one of our values."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return on if value else off

    return convert


def _convert_choice(known: Mapping[str, str]) -> Convert:
    def convert(value: Any) -> Any:
        if str(value) not in known:
            raise ValueError(f"there is none like it here; expected one of {', '.join(known)}")
        return known[str(value)]

    return convert


def _convert_precision(name: str) -> Convert:
    switch = _convert_switch(name)
    return lambda value: "auto" if value == "auto" else switch(value)


def _convert_zero(value: Any) -> Any:
    return None if value == 0 and value is not False else value


def _check_share(value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        raise ValueError("a number of rows; give the share of the training rows, as data.val_ratio")
    return value


def _check_warmup(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        raise ValueError("a share of the steps; give it as training.warmup_ratio")
    return value


def _check_answers_only(value: Any) -> Any:
    if value is not True:
        raise ValueError("what is learned depends on the kind of rows there; give data.mask_prompt")
    return True


def _split_modules(value: Any) -> Any:
    """Names separated by commas as a list; `all` is `auto`; a regular expression is left as it is."""
    if value in ("all", "all-linear"):
        return "auto"
    if not isinstance(value, str) or re.search(r"[\\^$*+?()\[\]|]", value):
        return value
    return [name.strip() for name in value.split(",")]


OPTIMIZERS = {
    **dict.fromkeys(
        "adamw adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_hf "
        "paged_adamw paged_adamw_32bit".split(),
        "adamw",
    ),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
    "adafactor": "adafactor",
}
OPTIMIZER_NAMES = "; ".join(f"`{theirs}` is `{ours}`" for theirs, ours in OPTIMIZERS.items() if theirs != ours)
SCHEDULERS = {name: name for name in ("linear", "cosine", "cosine_with_restarts", "constant")}
SCHEDULERS["constant_with_warmup"] = "constant"
DTYPES = {"auto": "auto", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "fp32": "fp32", "fp16": "fp16"}
DTYPES["bf16"] = "bf16"
TRUNCATIONS = {"keep_start": "keep_start", "keep_end": "keep_end", "truncate": "keep_start", "drop": "drop"}
INITS = {"True": "default", "pissa": "pissa"}

TABLE = (
    ForeignKey("model_name model_name_or_path model_id base_model", "model.id"),
    ForeignKey("model_revision revision revision_of_model", "model.revision"),
    ForeignKey("max_length max_seq_length max_seq_len cutoff_len sequence_len", "model.seq_len"),
    ForeignKey("torch_dtype dtype", "model.dtype", _convert_choice(DTYPES), "`bfloat16` is `bf16`, and so on"),
    ForeignKey("device", "model.device"),
    ForeignKey("use_cpu no_cuda", "model.device", _convert_switch("cpu"), "true: `cpu`"),
    ForeignKey("trust_remote_code", "model.trust_remote_code"),
    ForeignKey("load_in_4bit", "model.quantization", _convert_switch("4bit"), "true: `4bit`"),
    ForeignKey("load_in_8bit", "model.quantization", _convert_switch("8bit"), "true: `8bit`"),
    ForeignKey(
        "quantization_bit", "model.quantization", _convert_choice({"4": "4bit", "8": "8bit"}), "4: `4bit`; 8: `8bit`"
    ),
    ForeignKey("train_data train_file train_files train_path train_data_path data_path", "data.train"),
    ForeignKey("val_data val_file val_files val_path val_data_path validation_file eval_file", "data.validation"),
    ForeignKey(
        "val_size val_set_size val_split", "data.val_ratio", _check_share, "a share; a number of rows is refused"
    ),
    ForeignKey("max_samples max_train_samples", "data.max_examples"),
    ForeignKey("instruction_key prompt_column", "data.fields.instruction"),
    ForeignKey("input_key", "data.fields.input"),
    ForeignKey("output_key response_column", "data.fields.output"),
    ForeignKey("hash_key domain_key", "data.domain.field"),
    ForeignKey("train_on_inputs train_on_prompt", "data.mask_prompt", _convert_switch(False, True), "turned round"),
    ForeignKey("completion_only_loss", "data.mask_prompt"),
    ForeignKey("assistant_only_loss", "data.mask_prompt", _check_answers_only, "false is refused"),
    ForeignKey("mask_history", "data.supervise", _convert_switch("last"), "true: `last`"),
    ForeignKey(
        "truncation_mode excess_length_strategy",
        "data.truncation",
        _convert_choice(TRUNCATIONS),
        "`truncate` is `keep_start`",
    ),
    ForeignKey("lora_r lora_rank", "peft.r"),
    ForeignKey("lora_alpha", "peft.lora_alpha"),
    ForeignKey("lora_dropout", "peft.lora_dropout"),
    ForeignKey(
        "lora_target_modules lora_target target_modules",
        "peft.target_modules",
        _split_modules,
        "`all` and `all-linear` are `auto`; `q_proj,v_proj` is a list",
    ),
    ForeignKey(
        "lora_target_parameters",
        "peft.target_parameters",
        lambda value: _split_modules(value) if value else "none",
        "null: `none`; `a,b` is a list",
    ),
    ForeignKey("lora_target_linear", "peft.target_modules", _convert_switch("auto"), "true: `auto`"),
    ForeignKey("use_dora peft_use_dora", "peft.use_dora"),
    ForeignKey("use_rslora peft_use_rslora", "peft.variant", _convert_switch("rslora", "lora"), "true: `rslora`"),
    ForeignKey("pissa_init", "peft.init", _convert_switch("pissa"), "true: `pissa`"),
    ForeignKey("loraplus_lr_ratio lora_plus_ratio", "peft.lora_plus_ratio"),
    ForeignKey("init_lora_weights peft_init_lora_weights", "peft.init", _convert_choice(INITS), "true: `default`"),
    ForeignKey(
        "modules_to_save lora_modules_to_save additional_target",
        "peft.modules_to_save",
        _split_modules,
        "`embed_tokens,lm_head` is a list",
    ),
    ForeignKey("adapter_name_or_path lora_model_dir", "peft.from_adapter"),
    ForeignKey("learning_rate lr", "training.lr"),
    ForeignKey("num_epochs num_train_epochs epochs", "training.epochs"),
    ForeignKey("max_steps", "training.max_steps", lambda value: None if value == -1 else value, "-1: `null`"),
    ForeignKey(
        "batch_size per_device_train_batch_size micro_batch_size",
        "training.batch_size",
        values="as they are; on several devices multiply by their number, as here it is that of all processes",
    ),
    ForeignKey("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
    ForeignKey("optim optimizer", "training.optimizer", _convert_choice(OPTIMIZERS), OPTIMIZER_NAMES),
    ForeignKey(
        "lr_scheduler_type lr_scheduler",
        "training.scheduler",
        _convert_choice(SCHEDULERS),
        "`constant_with_warmup` is `constant`",
    ),
    ForeignKey("cosine_min_lr_ratio", "training.min_lr_ratio"),
    ForeignKey("warmup_ratio", "training.warmup_ratio"),
    ForeignKey("warmup_steps", "training.warmup_steps", _check_warmup, "a number of steps; a share is refused"),
    ForeignKey("weight_decay", "training.weight_decay"),
    ForeignKey("max_grad_norm gradient_clipping grad_clip", "training.max_grad_norm", _convert_zero, "0: `null`"),
    ForeignKey("seed random_seed", "training.seed"),
    ForeignKey("eval_steps", "training.eval_steps"),
    ForeignKey("save_steps", "training.save_steps"),
    ForeignKey("logging_steps", "training.logging_steps"),
    ForeignKey("early_stopping_patience early_stopping_steps", "training.early_stopping_patience"),
    ForeignKey(
        "gradient_checkpointing activation_checkpointing",
        "training.gradient_checkpointing",
        lambda value: True if value in ("offload", "offload_disk", "unsloth") else value,
        "`offload` and `unsloth` are true",
    ),
    ForeignKey("bf16", "training.precision", _convert_precision("bf16"), "true: `bf16`"),
    ForeignKey("fp16", "training.precision", _convert_precision("fp16"), "true: `fp16`"),
    ForeignKey("max_new_tokens", "inference.max_new_tokens"),
    ForeignKey("temperature", "inference.temperature"),
    ForeignKey("top_p", "inference.top_p"),
    ForeignKey("top_k", "inference.top_k", _convert_zero, "0: `null`"),
    ForeignKey("output_dir", "output.base_output_dir"),
    ForeignKey("experiment_name", "output.experiment_name"),
)
BY_NAME = {name: flat for flat in TABLE for name in flat.names.split()}
# Sections of nested configs, by how their keys are called where the section's name is part of the key.
SECTIONS = {
    "lora": ("lora_config", "lora_config_args", "lora_args", "peft_config", "adapter", "peft", "qlora"),
    "model": ("model_config", "model_args", "base", "tokenizer"),
    "train": ("train_data", "training_data", "data", "dataset", "datasets"),
    "scheduler": ("lr_scheduler", "scheduler_config"),
    "optimizer": ("optim", "optimizer_config"),
    "warmup": (), "eval": ("evaluation",), "save": ("checkpoint", "checkpointing"), "logging": (), "output": (),
    "val": ("validation",),
}  # fmt: skip
KINDS = ("name", "type", "kind", "class")  # {optimizer: {name: adamw}} is optimizer: adamw


def find_counterpart(name: str) -> ForeignKey | None:
    """Our key for exactly this dotted name of another trainer: `lora.alpha`, `optimizer.name`, `training.lr`."""
    *sections, last = name.split(".")
    section = sections[-1] if sections else ""
    stems = [section, *(stem for stem, names in SECTIONS.items() if section in names)] if section else []
    joined = [f"{stem}_{last}" for stem in stems]
    joined += [candidate for stem in stems for candidate in (f"lr_{stem}_{last}", f"{stem}_{last}s", f"{stem}s")]
    candidates = [*joined, *(stems if last in KINDS else ()), last]
    return next((BY_NAME[candidate] for candidate in candidates if candidate in BY_NAME), None)


def translate_names(
    values: Mapping[str, Any], other: Collection[str] = (), place: str = ""
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The values by section, with the flat names among them translated; a line for each name; and the problems.

    A key that is given twice with different values, by any of its names, is a problem, and so is a value without a
    counterpart. A name without a value, as in `fp16:`, is none. The `other` names mean something else in this file;
    `place` is the prefix of the problems of our own keys.
    """
    nested, problems = nest_keys(values, place)
    names = BY_NAME.keys() - set(other)
    theirs = {name: value for name, value in nested.items() if name in names and not isinstance(value, Mapping)}
    rest = {name: value for name, value in nested.items() if name not in theirs}  # a section is not a flat name
    found: dict[str, dict[str, Any]] = {}  # our key -> {their name: our value}
    lines = []
    for name, value in theirs.items():
        try:
            ours = UNSET if value is None else BY_NAME[name].convert(value)
        except ValueError as error:
            problems.append(f"{name}: given {value!r}, for {BY_NAME[name].key}: {error}")
            continue
        if ours is not UNSET:
            found.setdefault(BY_NAME[name].key, {})[name] = ours
            lines.append(f"{name} -> {BY_NAME[name].key}{'' if ours is value or ours == value else f'={ours}'}")
    problems += [problem for key, names in found.items() if (problem := _describe_conflict(key, names, rest))]
    settings = {key: next(iter(names.values())) for key, names in found.items()}
    translated, twice = nest_keys({**rest, **settings}, place)
    return translated, lines, [*problems, *twice]


def _describe_conflict(key: str, names: Mapping[str, Any], rest: Mapping[str, Any]) -> str | None:
    """The problem if two names, or a name and our own key, have different values."""
    section: Any = rest
    for part in key.split("."):
        section = section.get(part, UNSET) if isinstance(section, Mapping) else UNSET
    everything = dict(names) if section is UNSET else {**names, key: section}
    first, *others = everything.values()
    if all(value == first for value in others):
        return None
    given = " and ".join(f"{name} ({value!r})" for name, value in everything.items())
    return f"{key}: {given} say different things; keep one"
