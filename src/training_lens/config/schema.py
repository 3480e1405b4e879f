"""The one schema of a run's configuration: every key with its unit, default and limits.

Unknown keys are errors, assignment is validated, and checks across keys report together with the rest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from training_lens import embedded
from training_lens.utils.formatting import nearest

TEMPLATES = ("auto", "chat", "alpaca", "plain")


def _as_list(value: Any) -> Any:
    """One path where a list of paths is expected is a list of one; `Path` objects are their text."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


def _folder_name(value: str) -> str:
    """`value`, where it is one component of a path."""
    if not value.strip() or value in (".", "..", "latest", "none") or set(value) & set("/\\\0"):
        raise ValueError(f"{value!r} cannot name a folder; use letters, digits, '-', '_' and '.'")
    return value


Rows = Annotated[list[str] | list[dict[str, Any]], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A part of the config: strict about its keys, validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(Section):
    """The base model and how it is loaded."""

    id: str = Field(embedded.MODEL, min_length=1, description="local folder, hub id, or 'embedded' (the demo model)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model; null: its default branch")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="number type of the frozen weights; auto: that of training.precision"
    )
    seq_len: int | None = Field(
        None, ge=8, description="longest example in tokens; null: the model's positions, at most 2048"
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="attention; auto: sdpa, or eager where the model has no sdpa"
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none", description="of the frozen weights, through bitsandbytes: 4bit (NF4, double quantization) or 8bit"
    )
    trust_remote_code: bool = Field(False, description="run code that a model folder or hub repository carries")


class FieldsSection(Section):
    """Which keys of a row mean what; null: found by looking, and reported."""

    instruction: str | None = Field(None, description="key of the prompt, such as 'question'")
    input: str | None = Field(None, description="key of the prompt's second part, such as 'context'")
    output: str | None = Field(None, description="key of the answer that is learned, such as 'response'")
    system: str | None = Field(None, description="key of the system message")
    messages: str | None = Field(None, description="key of a chat: a list of {role, content} or {from, value}")
    tools: str | None = Field(None, description="key of the tools that a chat may call, a list or its JSON text")
    text: str | None = Field(None, description="key of plain text, learned whole and without a template")


class DomainSection(Section):
    """Domain conditioning: a prefix on the prompt that says where a row belongs."""

    field: str | None = Field("auto", description="key that holds the domain; auto: 'domain' where rows have it")
    per_file: bool = Field(False, description="the file's name without its ending is the domain of its rows")
    style: Literal["tag", "hash", "none"] = Field(
        "tag", description="tag: '[domain: law] '; hash: a stable 8-digit hash of it, '[3f2a90bc] '; none: no prefix"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DomainSection:
        if self.per_file and self.field not in (None, "auto"):
            raise ValueError(
                "data.domain.field and data.domain.per_file both say where the domain comes from; keep one"
            )
        return self


class DataSection(Section):
    """Training and validation rows, and how they become text."""

    train: Rows = Field(
        [embedded.TRAIN],
        description="paths or globs (.json, .jsonl, .csv, .tsv, .parquet, each also .gz), folders saved by datasets, "
        "hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], merged; or a list of rows",
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="how often an epoch takes the rows of each entry of data.train: 2 is twice, 0.5 a random half, "
        "drawn anew each epoch; null: once",
    )
    validation: Rows | None = Field(
        None, description="like train, each file reported; null: the embedded held-out rows for the embedded set"
    )
    val_ratio: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the training rows held out at random when validation is not given"
    )
    fields: FieldsSection = FieldsSection()
    template: str = Field(
        "auto",
        min_length=1,
        description="chat: the tokenizer's chat template; alpaca; plain: the row's texts alone; auto: chat where the "
        "tokenizer has one, else alpaca; a .jinja file; or a pattern such as 'Q: {instruction}\\nA: {output}'",
    )
    domain: DomainSection = DomainSection()
    mask_prompt: bool = Field(True, description="learn the answer alone; false: the prompt's tokens as well")
    supervise: Literal["all", "last"] = Field("all", description="learn every answer of a chat, or its last alone")
    thinking: bool = Field(
        False, description="answers hold thoughts (<think>...</think>) that the chat template knows: learn them, too"
    )
    truncation: Literal["keep_end", "keep_start", "drop"] = Field(
        "keep_end",
        description="rows longer than model.seq_len: keep_end cuts the start (the answer keeps its end), keep_start "
        "cuts the end, drop leaves them out",
    )
    special_tokens: Literal["plain", "allow"] = Field(
        "plain", description="text of a special token inside a row, such as '<|im_end|>': plain text, or the token"
    )
    strip_end_marks: bool = Field(
        True, description="take a literal end mark such as '<|endoftext|>' off the end of answers"
    )
    max_examples: int | None = Field(
        None, ge=1, description="at most this many training examples, drawn at random with the seed; null: all"
    )

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        if value in TEMPLATES or value.endswith((".jinja", ".jinja2", ".j2")):
            return value
        if "{" not in value and "\n" not in value:
            close = nearest(value, TEMPLATES)
            hint = f" Did you mean '{close}'?" if close else ""
            raise ValueError(
                f"'{value}' is no template; give one of {', '.join(TEMPLATES)}, a .jinja file, or a pattern with "
                f"{{instruction}} and {{output}}.{hint}"
            )
        return value

    @model_validator(mode="after")
    def _validation(self) -> DataSection:
        if not self.train:
            raise ValueError("data.train: no rows and no paths; give at least one")
        if self.validation is not None and self.val_ratio:
            raise ValueError("data.validation and data.val_ratio are both given; keep one")
        entries = 1 if isinstance(self.train[0], dict) else len(self.train)  # rows in memory are one entry
        if self.weights is not None and len(self.weights) != entries:
            raise ValueError(
                f"data.weights: {len(self.weights)} weights for {entries} entries of data.train; give one each"
            )
        return self

    @property
    def validation_sources(self) -> list[str] | list[dict[str, Any]]:
        """The validation rows or paths; those of the embedded set where that is what is trained on."""
        if self.validation is None and not self.val_ratio and self.train == [embedded.TRAIN]:
            return [embedded.HELDOUT]
        return self.validation or []


class PrepareSection(Section):
    """What `training-lens prepare` makes of the rows of data.train."""

    output: str | None = Field(
        None, min_length=1, description="folder to write; null: {base_output_dir}/data/{experiment_name}"
    )
    format: Literal["jsonl", "parquet"] = Field(
        "jsonl", description="jsonl: the rows as they are; parquet: what is learned of them, in columns of one type"
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact",
        description="keep the first of rows that say the same (exact: but for white space), or nearly the same (near: "
        "rows that differ in one number may be, too)",
    )
    near_threshold: float = Field(
        0.8, ge=0.5, le=1.0, description="near are two rows that share this part of their 5-word pieces (Jaccard)"
    )
    num_perm: int = Field(
        128, ge=16, le=1024, description="MinHash permutations a row; more find near rows more surely"
    )
    splits: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {"train": 0.9, "validation": 0.1}, description="name and share of each file; 'train' is one, the sum is 1"
    )
    split_by: Literal["random", "domain", "group"] = Field(
        "random",
        description="random; domain: every domain has its share in every split; group: rows of one group stay together",
    )
    group_field: str | None = Field(
        None, min_length=1, description="key of a row that names its group, such as 'user_id', for split_by=group"
    )
    leakage: Literal["check", "remove", "off"] = Field(
        "check",
        description="rows that say the same, nearly the same, or ask the same in two splits: report, or also remove "
        "from the training split",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the split")

    @field_validator("splits")
    @classmethod
    def _whole(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in value if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
        if wrong:
            raise ValueError(f"'{wrong[0]}' cannot name a file; use letters, digits, '-' and '_'")
        if "train" not in value:
            raise ValueError(f"there is no 'train' among {', '.join(value) or 'none'}; name the training split so")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"the shares sum to {sum(value.values()):g}, expected 1")
        return value

    @model_validator(mode="after")
    def _group(self) -> PrepareSection:
        if self.split_by == "group" and self.group_field is None:
            raise ValueError("prepare.split_by: group needs the key that names a row's group; give prepare.group_field")
        if self.split_by != "group" and self.group_field is not None:
            raise ValueError(
                f"prepare.group_field: split_by={self.split_by} looks at no group; give prepare.split_by=group"
            )
        return self


class PeftSection(Section):
    """The adapter."""

    variant: Literal["lora", "rslora"] = Field(
        "lora", description="scale of the update: lora: lora_alpha / r; rslora: lora_alpha / sqrt(r) (arXiv 2312.03732)"
    )
    use_dora: bool = Field(False, description="learn magnitude and direction apart (DoRA, arXiv 2402.09353)")
    init: Literal["default", "pissa"] = Field(
        "default",
        description="default: B is zero; pissa: from the weights' largest singular directions (arXiv 2404.02948)",
    )
    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32.0, gt=0, description="scales the update, see variant")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the adapter's inputs dropped in training")
    target_modules: str | list[str] = Field(
        "auto",
        min_length=1,
        description="auto: every linear layer of the decoder; names such as [q_proj, v_proj]; or one regular "
        "expression for whole module paths, such as '.*layers\\.[0-3]\\..*_proj'",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="other ranks for some modules: {name or end of a module path: rank}"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other lora_alpha for some modules, like rank_pattern"
    )
    modules_to_save: list[str] = Field([], description="modules that are trained and saved whole, such as [lm_head]")
    lora_plus_ratio: float | None = Field(
        None, ge=1, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354); null: the same"
    )
    from_adapter: str | None = Field(
        None, min_length=1, description="go on from this adapter folder or run; its rank, targets and scale hold"
    )


class TrainingSection(Section):
    """The loop. One step is one optimizer update."""

    lr: float | None = Field(
        None, gt=0, le=1, description="peak learning rate; null: from the model's width, 5e-4 (2000 / width)^0.781"
    )
    epochs: float = Field(2.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="end after this many steps, before the epochs are over")
    batch_size: int = Field(8, ge=1, description="examples per process and accumulation step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="a step covers this many times batch_size")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="most tokens (padding included) in one forward pass; never changes the result"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw",
        description="adamw: betas 0.9 and 0.999; adamw_8bit: its state in 8 bits (bitsandbytes); adafactor: "
        "factored second moments, no first",
    )
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "constant"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    scheduler_cycles: int = Field(1, ge=1, description="cosines in cosine_with_restarts")
    min_lr_ratio: float = Field(0.0, ge=0.0, lt=1.0, description="the rate falls to this share of its peak")
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0, description="share of the steps with rising learning rate")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="decoupled weight decay of the adapter")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null: never")
    seed: int = Field(0, ge=0, lt=2**31, description="of the adapter's start, the order of rows, and dropout")
    eval_steps: int | None = Field(None, ge=1, description="validate every so many steps; null: once an epoch")
    save_steps: int | None = Field(None, ge=1, description="checkpoint every so many steps; null: when validating")
    logging_steps: int = Field(10, ge=1, description="TensorBoard and run.log every so many steps")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a new best; null: never"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations but each layer's input, and compute them again: less memory, more time"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the forward and backward pass; auto: fp32 on CPU and MPS, bf16 or fp16 on CUDA"
    )


class EvaluationSection(Section):
    """Judging models on the validation rows: evaluate, baseline, compare."""

    max_examples: int | None = Field(None, ge=1, description="judge on at most so many rows; null: all of them")
    generate: bool = Field(
        True, description="let the model answer each prompt and score the answers; false: losses only"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer in tokens")
    batch_tokens: int = Field(
        8192, ge=1, description="most tokens (padding included) in one forward pass; halved where memory runs out"
    )
    length_buckets: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = Field(
        4, description="results by length in tokens: so many buckets of like size, or their upper limits, [64, 256]"
    )
    controls: bool = Field(
        True, description="compare: also ask the adapter with wrong and no domains, and with shuffled prompts"
    )
    resamples: int = Field(1000, ge=0, description="bootstrap resamples for the intervals; 0: no intervals")
    confidence: float = Field(0.95, gt=0.0, lt=1.0, description="share of the resamples inside an interval")
    seed: int = Field(0, ge=0, lt=2**31, description="of the resamples and of shuffled prompts")
    forgetting: Annotated[list[str], BeforeValidator(_as_list)] | None = Field(
        None, description="compare: other text (paths like data.train): its loss before and after; null: none"
    )
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        [], description="tasks of lm-eval, its own or yours, such as [arc_easy]; needs the extra `eval`"
    )
    task_path: str | None = Field(None, description="folder of your own lm-eval tasks in YAML; null: lm-eval's alone")
    task_limit: int | None = Field(None, ge=1, description="at most so many rows of each task; null: all of them")


class InferenceSection(Section):
    """Answering prompts."""

    adapter: str = Field(
        "latest",
        min_length=1,
        description="latest: of the newest finished run; a run's id or folder; a PEFT adapter folder on model.id; "
        "none: model.id alone",
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0.0, le=5.0, description="0: greedy; else the sampling temperature")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample from the smallest set with this probability")
    top_k: int | None = Field(None, ge=1, description="sample from so many of the likeliest tokens; null: from all")
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampling")
    batch_tokens: int = Field(
        8192, ge=1, description="most tokens (padding and answers included) in one batch of infer --input"
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value is None:  # as the preset inference=manual leaves it
            raise ValueError("no adapter is named; give inference.adapter=RUN, an adapter folder, latest, or none")
        return value


class BenchmarkSection(Section):
    """Measuring how fast base, adapter and merged model answer."""

    models: list[Literal["base", "adapter", "merged"]] = Field(
        ["base", "adapter", "merged"],
        min_length=1,
        description="which are measured, in turn: base alone, adapter beside the weights, adapter merged into them",
    )
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 4, 16], min_length=1, description="prompts that are answered together"
    )
    prompt_lengths: list[Annotated[int, Field(ge=1)]] = Field(
        [32, 128], min_length=1, description="tokens of each prompt"
    )
    new_tokens: int = Field(64, ge=2, description="tokens generated for each prompt, end tokens or not")
    warmup: int = Field(1, ge=0, description="calls of each kind before those that count")
    repetitions: int = Field(5, ge=1, description="calls of each kind that count")
    seed: int = Field(0, ge=0, lt=2**31, description="of the choice of prompts")

    @field_validator("models", "batch_sizes", "prompt_lengths")
    @classmethod
    def _each_once(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value} names one of them twice; give each once")
        return value


class TrackingSection(Section):
    """Where metrics go besides logs/metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events to the run's logs folder")


class SweepSection(Section):
    """Many trials of one question (training-lens sweep): each a run of its own, with other values of some keys."""

    name: str = Field("sweep", description="of the study, and of the experiment that its runs are in")
    space: dict[str, list[Any] | dict[str, Any]] = Field(
        {},
        description="what is tried, by key: choices such as {peft.r: [4, 8, 16]}, or a range such as {training.lr: "
        "{low: 1e-4, high: 1e-2, log: true}}; step makes a range a grid",
    )
    trials: int = Field(
        20, ge=1, description="trials in all, those of every process and every start together; failed ones count"
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe",
        description="tpe: from what was good so far (Tree-structured Parzen Estimator, arXiv 2304.11127); random; "
        "grid: every combination, in an order drawn with the seed",
    )
    pruner: Literal["none", "median", "successive_halving"] = Field(
        "none",
        description="median: ends a trial that is worse than the median of the others at the same validation, once 5 "
        "are finished; successive_halving: keeps the better half at validations 1, 2, 4, 8, ... (arXiv 1810.05934)",
    )
    metric: Literal["validation_loss"] = Field(
        "validation_loss", description="what is made small: the saved adapter's, in nats per supervised token"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampler; the trials' own is training.seed")
    storage: str | None = Field(
        None,
        min_length=1,
        exclude=True,
        description="database URL that Optuna takes (postgresql://..., mysql://..., sqlite:///...), shared by all who "
        "give it; may hold a password, so it is saved with no run; null: study.db in the sweep's folder",
    )

    @field_validator("name")
    @classmethod
    def _one_component(cls, value: str) -> str:
        return _folder_name(value)


class OutputSection(Section):
    """Where runs are kept: {base_output_dir}/experiments/{experiment_name}/runs/{run_id}."""

    base_output_dir: str = Field("outputs", min_length=1, description="folder of all runs and of the token cache")
    experiment_name: str = Field("default", description="groups runs; one path component")
    run_id: str | None = Field(None, description="null: a UTC timestamp with a random tail")

    @field_validator("experiment_name", "run_id")
    @classmethod
    def _one_component(cls, value: str | None) -> str | None:
        return None if value is None else _folder_name(value)


class TrainingConfig(Section):
    """The whole configuration of a run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    prepare: PrepareSection = PrepareSection()
    peft: PeftSection = PeftSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    inference: InferenceSection = InferenceSection()
    benchmark: BenchmarkSection = BenchmarkSection()
    tracking: TrackingSection = TrackingSection()
    sweep: SweepSection = SweepSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _across_keys(self) -> TrainingConfig:
        problems = _cross_checks(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self, **sections: dict[str, Any]) -> TrainingConfig:
        """A copy with some keys of some sections replaced: `config.resolved(training={"lr": 1e-3})`.

        What was never set stays unset, so that later steps can tell a choice from a default.
        """
        values = self.given()
        for name, keys in sections.items():
            values[name] |= keys
        return TrainingConfig.model_validate(values)

    def given(self) -> dict[str, Any]:
        """What was set, by section, without what is at its default unasked."""
        return _given(self)


def _given(section: BaseModel) -> dict[str, Any]:
    """What was set of a section, and of the sections in it."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            values[name] = _given(value)
        elif name in section.model_fields_set:
            values[name] = value
    return values


def _cross_checks(config: TrainingConfig) -> list[str]:
    """What can be told from the config alone; the run's length is checked when the rows are counted."""
    training, problems = config.training, []
    if training.early_stopping_patience and not config.data.validation_sources and not config.data.val_ratio:
        problems.append(
            "training.early_stopping_patience: needs validation data; give data.validation or data.val_ratio"
        )
    if training.eval_steps and not config.data.validation_sources and not config.data.val_ratio:
        problems.append("training.eval_steps: needs validation data; give data.validation or data.val_ratio")
    if training.scheduler_cycles > 1 and training.scheduler != "cosine_with_restarts":
        problems.append(
            f"training.scheduler_cycles: {training.scheduler_cycles} cycles need scheduler=cosine_with_restarts, "
            f"given {training.scheduler}"
        )
    if training.min_lr_ratio and training.scheduler == "constant":
        problems.append("training.min_lr_ratio: a constant rate never falls; leave it out, or take another scheduler")
    if config.peft.init == "pissa" and config.model.quantization != "none":
        problems.append("peft.init: pissa needs the weights unquantized; give init=default or quantization=none")
    return problems


def check_run_length(config: TrainingConfig, total_steps: int, steps_in_epochs: int) -> list[str]:
    """Cross-checks of the config against the steps that the run will have: one line for each problem."""
    training, problems = config.training, []
    if training.max_steps and training.max_steps > steps_in_epochs:
        problems.append(
            f"training.max_steps: {training.max_steps} steps are never reached, {training.epochs:g} epochs end after "
            f"{steps_in_epochs}; raise training.epochs or leave max_steps out"
        )
    for key in ("eval_steps", "save_steps"):
        interval = getattr(training, key)
        if interval and interval > total_steps:
            problems.append(
                f"training.{key}: every {interval} steps never comes, the run has {total_steps}; "
                f"give at most {total_steps}, or null"
            )
    if training.warmup_ratio > 0.5:
        problems.append(
            f"training.warmup_ratio: {training.warmup_ratio:g} warms up for "
            f"{round(training.warmup_ratio * total_steps)} of {total_steps} steps; give at most 0.5"
        )
    return problems
