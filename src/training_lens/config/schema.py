"""The one schema of a run's configuration: every key with its unit, default and limits.

Unknown keys are errors, assignment is validated, and checks across keys report together with the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training_lens import embedded
from training_lens.config.data_sections import DataSection, PrepareSection
from training_lens.config.distributed_section import DistributedSection
from training_lens.config.evaluation_sections import BenchmarkSection, EvaluationSection, InferenceSection
from training_lens.config.foreign_keys import translate_names
from training_lens.config.lens_section import LensSection
from training_lens.config.section import Count, ExperimentName, Place, RunId, Section, setting
from training_lens.config.tracking_section import TrackingSection
from training_lens.errors import ConfigurationError
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home
from training_lens.utils.secrets import find_secret_keys

logger = get_logger(__name__)


class ModelSection(Section):
    """The base model and how it is loaded."""

    id: Place = setting(embedded.MODEL, "local folder, hub id, or 'embedded' (the demo model)", min_length=1)
    revision: str | None = setting(None, "branch, tag or commit of a hub model; null: its default branch")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "number type of the frozen weights; auto: that of training.precision"
    )
    seq_len: int | None = setting(None, "longest example in tokens; null: the model's positions, at most 2048", ge=8)
    attention: Literal["auto", "sdpa", "eager"] = setting(
        "auto", "attention; auto: sdpa, or eager where the model has no sdpa"
    )
    backend: Literal["transformers", "unsloth"] = setting(
        "transformers",
        "what computes training: transformers with our kernels; or unsloth, installed apart, on a CUDA GPU",
    )
    quantization: Literal["none", "4bit", "8bit"] = setting(
        "none", "of the frozen weights, through bitsandbytes: 4bit (NF4, double quantization) or 8bit"
    )
    resize_embeddings: bool = setting(
        False,
        "where the tokenizer has more tokens than the embedding has rows, add rows, and train and save "
        "embedding and output head whole; false: such a model is refused",
    )
    trust_remote_code: bool = setting(False, "run code that a model folder or hub repository carries")
    accept_changed_base: bool = setting(
        False, "use a run's adapter, or resume the run, though files of its base changed since it began"
    )

    @property
    def chosen_device(self) -> str | None:
        """The device that was asked for; None: none was."""
        return None if self.device == "auto" else self.device


class PeftSection(Section):
    """The adapter."""

    variant: Literal["lora", "rslora"] = setting(
        "lora", "scale of the update: lora: lora_alpha / r; rslora: lora_alpha / sqrt(r) (arXiv 2312.03732)"
    )
    use_dora: bool = setting(False, "learn magnitude and direction apart (DoRA, arXiv 2402.09353)")
    init: Literal["default", "pissa"] = setting(
        "default", "default: B is zero; pissa: from the weights' largest singular directions (arXiv 2404.02948)"
    )
    r: int = setting(16, "rank", ge=1)
    lora_alpha: float = setting(32.0, "scales the update, see variant", gt=0)
    lora_dropout: float = setting(0.0, "share of the adapter's inputs dropped in training", ge=0.0, lt=1.0)
    target_modules: str | list[str] = setting(
        "auto",
        "auto: every linear layer of the decoder; names such as [q_proj, v_proj]; or one regular "
        "expression for whole module paths, such as '.*layers\\.[0-3]\\..*_proj'",
        min_length=1,
    )
    target_parameters: str | list[str] = setting(
        "auto",
        "experts that a layer keeps in one parameter; auto: all, where target_modules is auto; none: they stay frozen; "
        "names such as [experts.down_proj]; or one regular expression for whole paths of parameters",
    )
    expert_rank: int | None = setting(
        None, "rank of each expert's adapter; null: r / experts per token, at least 1", ge=1
    )
    rank_pattern: dict[str, Count] = setting({}, "other ranks for some modules: {name or end of a module path: rank}")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = setting(
        {}, "other lora_alpha for some modules, like rank_pattern"
    )
    modules_to_save: list[str] = setting([], "modules that are trained and saved whole, such as [lm_head]")
    lora_plus_ratio: float | None = setting(
        None, "learning rate of B over that of A (LoRA+, arXiv 2402.12354); null: the same", ge=1
    )
    from_adapter: Place | None = setting(
        None, "continue training this adapter folder or run; its rank, targets and scale hold", min_length=1
    )


class TrainingSection(Section):
    """The loop. One step is one optimizer update."""

    lr: float | None = setting(
        None, "peak learning rate; null: from the model's width, 5e-4 (2000 / width)^0.781", gt=0, le=1
    )
    epochs: float = setting(2.0, "passes over the training rows", gt=0)
    max_steps: int | None = setting(
        None, "train exactly this many steps, whatever epochs says; rows come again when they are through", ge=1
    )
    batch_size: int = setting(8, "examples per accumulation step, of all processes together", ge=1)
    gradient_accumulation_steps: int = setting(1, "a step covers this many times batch_size", ge=1)
    micro_batch_tokens: Count | Literal["auto"] = setting(
        "auto",
        "most tokens (padding included) in one forward pass, never changes the result; auto: what free "
        "memory holds, at most 4096, on CUDA 32768",
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = setting(
        "adamw",
        "adamw: betas 0.9 and 0.999; adamw_8bit: its state in 8 bits (bitsandbytes); adafactor: "
        "factored second moments, no first",
    )
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "constant"] = setting(
        "cosine", "learning rate after warm-up"
    )
    scheduler_cycles: int = setting(1, "cosines in cosine_with_restarts", ge=1)
    min_lr_ratio: float = setting(0.0, "the rate falls to this share of its peak", ge=0.0, lt=1.0)
    warmup_ratio: float = setting(0.03, "share of the steps with rising learning rate", ge=0.0, lt=1.0)
    warmup_steps: int | None = setting(
        None, "so many steps with rising learning rate, whatever warmup_ratio says; null: its share", ge=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of the adapter", ge=0.0, le=1.0)
    max_grad_norm: float | None = setting(1.0, "gradients are scaled down to this norm; null: never", gt=0)
    seed: int = setting(0, "of the adapter's start, the order of rows, and dropout", ge=0, lt=2**31)
    eval_steps: int | None = setting(
        None,
        "validate every so many steps; null: once an epoch, and a fixed sample of the rows in between, for 8 in a run "
        "where the sample takes at most 5 % of its tokens",
        ge=1,
    )
    save_steps: int | None = setting(None, "checkpoint every so many steps; null: when validating", ge=1)
    logging_steps: int = setting(10, "TensorBoard and run.log every so many steps", ge=1)
    early_stopping_patience: int | None = setting(
        None, "stop after so many validations without a new best; null: never", ge=1
    )
    gradient_checkpointing: bool = setting(
        False, "keep no activations but each layer's input, and compute them again: less memory, more time"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "of the forward and backward pass; auto: fp32 on CPU and MPS, bf16 or fp16 on CUDA"
    )


class SweepSection(Section):
    """Many trials of one question (training-lens sweep): each a run of its own, with other values of some keys."""

    name: ExperimentName = setting("sweep", "of the study, and of the experiment that its runs are in")
    space: dict[str, list[Any] | dict[str, Any]] = setting(
        {},
        "what is tried, by key: choices such as {peft.r: [4, 8, 16]}, or a range such as {training.lr: "
        "{low: 1e-4, high: 1e-2, log: true}}; step makes a range a grid",
    )
    trials: int = setting(20, "trials in all, those of every process and every start together; failed ones count", ge=1)
    sampler: Literal["tpe", "random", "grid"] = setting(
        "tpe",
        "tpe: from what was good so far (Tree-structured Parzen Estimator, arXiv 2304.11127); random; "
        "grid: every combination, in an order drawn with the seed",
    )
    pruner: Literal["none", "median", "successive_halving"] = setting(
        "none",
        "median: ends a trial that is worse than the median of the others at the same validation, once 5 "
        "are finished; successive_halving: keeps the better half at validations 1, 2, 4, 8, ... (arXiv 1810.05934)",
    )
    metric: Literal["validation_loss"] = setting(
        "validation_loss", "what is made small: the saved adapter's, in nats per supervised token"
    )
    seed: int = setting(0, "of the sampler; the trials' own is training.seed", ge=0, lt=2**31)
    storage: str | None = setting(
        None,
        "database URL (postgresql://..., mysql://..., sqlite:///...) of a study on several machines, shared by all who "
        "give it; may hold a password, so it is saved with no run; null: study.db in the sweep's folder",
        min_length=1,
        exclude=True,
    )
    takeover_seconds: int = setting(
        300,
        "a trial on another machine that sends no heartbeat for so long is taken over; heartbeats are ten times as "
        "frequent; the same on all machines",
        ge=5,
    )


class OutputSection(Section):
    """Where runs are kept: {base_output_dir}/experiments/{experiment_name}/runs/{run_id}."""

    base_output_dir: Place = setting("outputs", "folder of all runs and of the token cache", min_length=1)
    experiment_name: ExperimentName = setting("default", "groups runs; one path component")
    run_id: RunId | None = setting(
        None, "ASCII letters, digits, '.', '_', '-'; null: a UTC timestamp with a random tail"
    )
    mirror: Place | None = setting(
        None,
        "place to which every run is copied while it trains, and from which it can be resumed elsewhere: "
        "a folder, or a URL that fsspec takes (s3://bucket/path, gs://, az://, ssh://, hf://); credentials come from "
        "the environment",
        min_length=1,
    )

    @property
    def named_experiment(self) -> str | None:
        """The experiment if it was set; None: runs of all experiments are searched."""
        return self.experiment_name if "experiment_name" in self.model_fields_set else None


DESTINATIONS = ("output.mirror", "tracking.wandb", "tracking.mlflow", "tracking.trackio", "tracking.hub")


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
    lens: LensSection = LensSection()
    sweep: SweepSection = SweepSection()
    distributed: DistributedSection = DistributedSection()
    output: OutputSection = OutputSection()

    def __init__(self, /, **values: Any) -> None:
        ours, lines, problems = translate_names(values)  # other trainers' names, as in a file
        if lines:
            logger.info("TrainingConfig: %s", ", ".join(lines))
        try:
            super().__init__(**ours)
        except ConfigurationError as error:
            problems += error.problems
        if problems:
            raise ConfigurationError(problems)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as that of `Section`

    @model_validator(mode="after")
    def _across_keys(self) -> TrainingConfig:
        problems = self.find_conflicts()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def find_conflicts(self) -> list[str]:
        """A line for each conflict between keys; the run's length is checked when the rows are counted."""
        data, training, problems = self.data, self.training, list[str]()
        if not data.validation_sources and not data.val_ratio:
            problems += [
                f"training.{key}: needs validation data; give data.validation or data.val_ratio"
                for key in ("early_stopping_patience", "eval_steps")
                if getattr(training, key)
            ]
        if training.scheduler_cycles > 1 and training.scheduler != "cosine_with_restarts":
            problems.append(
                f"training.scheduler_cycles: {training.scheduler_cycles} cycles need scheduler=cosine_with_restarts, "
                f"given {training.scheduler}"
            )
        if training.min_lr_ratio and training.scheduler == "constant":
            problems.append(
                "training.min_lr_ratio: a constant rate never falls; leave it out, or take another scheduler"
            )
        problems += [
            f"{key}: this looks like a secret, and the config is saved with every run; "
            "leave it out, and set the environment variable that the service reads"
            for key in find_secret_keys(self.model_dump())
        ]
        if self.distributed.cpu_offload and self.distributed.base != "sharded":
            problems.append("distributed.cpu_offload: needs distributed.base=sharded")
        if self.peft.init == "pissa" and self.model.quantization != "none":
            problems.append("peft.init: pissa needs the weights unquantized; give init=default or quantization=none")
        return problems

    @property
    def prepared_folder(self) -> Path:
        """The output folder of `training-lens prepare`."""
        output = self.output
        return expand_home(self.prepare.output or f"{output.base_output_dir}/data/{output.experiment_name}")

    @property
    def destinations(self) -> tuple[str, ...]:
        """Those of `DESTINATIONS` that the run is sent to."""
        tracking = self.tracking
        is_on = (
            *(self.output.mirror is not None, tracking.wandb.mode != "disabled", tracking.mlflow.enabled),
            *(tracking.trackio.enabled, tracking.hub.repo is not None),
        )
        return tuple(key for key, on in zip(DESTINATIONS, is_on, strict=True) if on)

    def replace_keys(self, **sections: dict[str, Any]) -> TrainingConfig:
        """A copy with some keys of some sections replaced: `config.replace_keys(training={"lr": 1e-3})`.

        Keys that were never set stay unset, so that a choice can be told from a default.
        """
        values = self.explicit_values()
        for name, keys in sections.items():
            values[name] |= keys
        return TrainingConfig.model_validate(values)
