"""The one schema of a run's configuration: every key with its unit, default and limits.

Unknown keys are errors, assignment is validated, and checks across keys report together with the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training_lens import embedded
from training_lens.config.data_sections import DataSection, PrepareSection
from training_lens.config.evaluation_sections import BenchmarkSection, EvaluationSection, InferenceSection
from training_lens.config.foreign_keys import translate_names
from training_lens.config.lens_section import LensSection
from training_lens.config.section import ExperimentName, Place, RunId, Section
from training_lens.config.tracking_section import TrackingSection
from training_lens.errors import ConfigurationError
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home
from training_lens.utils.secrets import find_secret_keys

logger = get_logger(__name__)


class ModelSection(Section):
    """The base model and how it is loaded."""

    id: Place = Field(embedded.MODEL, min_length=1, description="local folder, hub id, or 'embedded' (the demo model)")
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
    resize_embeddings: bool = Field(
        False,
        description="where the tokenizer has more tokens than the embedding has rows, add rows, and train and save "
        "embedding and output head whole; false: such a model is refused",
    )
    trust_remote_code: bool = Field(False, description="run code that a model folder or hub repository carries")
    accept_changed_base: bool = Field(
        False, description="use a run's adapter, or resume the run, though files of its base changed since it began"
    )


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
    from_adapter: Place | None = Field(
        None, min_length=1, description="continue training this adapter folder or run; its rank, targets and scale hold"
    )


class TrainingSection(Section):
    """The loop. One step is one optimizer update."""

    lr: float | None = Field(
        None, gt=0, le=1, description="peak learning rate; null: from the model's width, 5e-4 (2000 / width)^0.781"
    )
    epochs: float = Field(2.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="train exactly this many steps, whatever epochs says; rows come again when they are through",
    )
    batch_size: int = Field(8, ge=1, description="examples per process and accumulation step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="a step covers this many times batch_size")
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="most tokens (padding included) in one forward pass, never changes the result; auto: what free "
        "memory holds, at most 4096, on CUDA 32768",
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
    warmup_steps: int | None = Field(
        None, ge=0, description="so many steps with rising learning rate, whatever warmup_ratio says; null: its share"
    )
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


class SweepSection(Section):
    """Many trials of one question (training-lens sweep): each a run of its own, with other values of some keys."""

    name: ExperimentName = Field("sweep", description="of the study, and of the experiment that its runs are in")
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


class OutputSection(Section):
    """Where runs are kept: {base_output_dir}/experiments/{experiment_name}/runs/{run_id}."""

    base_output_dir: Place = Field("outputs", min_length=1, description="folder of all runs and of the token cache")
    experiment_name: ExperimentName = Field("default", description="groups runs; one path component")
    run_id: RunId | None = Field(
        None, description="ASCII letters, digits, '.', '_', '-'; null: a UTC timestamp with a random tail"
    )
    mirror: Place | None = Field(
        None,
        min_length=1,
        description="place to which every run is copied while it trains, and from which it can be resumed elsewhere: "
        "a folder, or a URL that fsspec takes (s3://bucket/path, gs://, az://, ssh://, hf://); credentials come from "
        "the environment",
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
