"""Everything a run decides before it trains: data, tokens, template, steps. `validate` shows it, `train` uses it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens import embedded
from training_lens.analysis.findings.finding import Finding
from training_lens.config.schema import TrainingConfig
from training_lens.core.collector import CollectorRegistry
from training_lens.data.batching import Schedule
from training_lens.data.file_readers import check_csv_settings
from training_lens.data.split_report import log_split
from training_lens.data.templates import build_renderer, choose_template, load_template_file, resolve_date
from training_lens.data.token_cache import Split, prepare_split
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation, tokenizer_hash
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.models.adapter_files import adopt_saved_settings
from training_lens.models.adapters import Adaptation, check_adapter, count_parameters, log_adaptation
from training_lens.models.embedding_rows import describe_blanks, embedding_modules, required_rows, token_ids
from training_lens.models.factory import (
    ModelFacts,
    build_skeleton,
    check_vocabulary,
    check_weights,
    checkpoint_gradients,
    load_model,
    load_tokenizer,
    read_facts,
    resolve_seq_len,
)
from training_lens.models.quantization import check_quantization
from training_lens.models.unsloth_backend import require_supported_type, require_unsloth
from training_lens.training.loop.loop_plan import LoopPlan, ValidationSample, draw_validation_sample
from training_lens.training.loop.lr_schedule import count_warmup_steps, default_lr, describe_run_length
from training_lens.training.loop.memory_budget import Footprint, estimate_footprint, plan_token_budget
from training_lens.training.plan_rows import PlanRows, build_schedule, select_rows
from training_lens.utils.devices import Precision, get_device, resolve_precision
from training_lens.utils.files import require_writable, write_text
from training_lens.utils.formatting import list_names
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What will be trained: the resolved config, the tokenizer, the data and the steps.

    `micro_batch_tokens`: as configured, or what free memory should hold by `needs`; `adaptation`: which modules of the
    base are adapted and which are not; `findings`: of `preflight.check_plan`, where the rows were checked.
    """

    config: TrainingConfig
    facts: ModelFacts
    parameters: int
    adaptation: Adaptation
    tokenizer: Any
    precision: Precision
    rows: PlanRows
    splits: dict[str, Split]
    schedule: Schedule
    processes: Processes
    micro_batch_tokens: int
    needs: Footprint
    findings: tuple[Finding, ...] = ()

    @property
    def train(self) -> TokenDataset:
        """The training examples."""
        return self.rows.train

    @property
    def validation(self) -> TokenDataset | None:
        """The examples that it is validated on; None without any."""
        return self.rows.validation

    @property
    def duplicates(self) -> dict[str, int]:
        """See `count_duplicates`."""
        return self.rows.duplicates

    @property
    def new_ids(self) -> list[int]:
        """The ids of data.new_tokens."""
        return token_ids(self.tokenizer, self.config.data.new_tokens)

    def load_base(self) -> Any:
        """The base model, with rows for new tokens; see `load_model`."""
        device = torch.device("cpu") if self.processes.is_base_sharded else self.processes.device
        return load_model(self.config.model, device, self.precision, self.config.data.new_tokens)

    @property
    def loop_plan(self) -> LoopPlan:
        """What the training loop needs of this plan."""
        return LoopPlan(
            dataset=self.train,
            validation=self.validation,
            schedule=self.schedule,
            settings=self.config.training,
            precision=self.precision,
            processes=self.processes,
            micro_batch_tokens=self.micro_batch_tokens,
            pad_id=self.tokenizer.eos_token_id,
            lora_plus_ratio=self.config.peft.lora_plus_ratio,
            validation_sample=self.validation_sample,
        )

    @property
    def validation_sample(self) -> ValidationSample | None:
        """The validation rows that are validated more often than once an epoch; None with training.eval_steps."""
        if self.validation is None or self.config.training.eval_steps:
            return None
        return draw_validation_sample(self.validation.lengths, self.schedule, float(self.train.lengths.mean()))

    @property
    def fingerprint(self) -> str:
        """Identifies the training tokens and their order."""
        return f"{self.splits['train'].fingerprint}:{self.rows.fingerprint}"

    def data_report(self) -> dict[str, Any]:
        """The content of metadata/data.json: files with sha256, how they were read, counts, domains."""
        return {
            "fingerprint": self.fingerprint,
            "tokens": {name: split.dataset.source.content_hash for name, split in self.splits.items()},
            "train_examples": len(self.train),
            "validation_examples": len(self.validation) if self.validation else 0,
            "domains": self.domains,
            "global_batch_size": self.schedule.global_batch,
            "processes": self.processes.count,
            **self.duplicates,
            **self.rows.as_record(),
            **{name: asdict(split.report) for name, split in self.splits.items()},
        }

    def held_out_ids(self) -> list[str]:
        """The ids of the validation examples."""
        return [self.validation.example_id(i) for i in range(len(self.validation))] if self.validation else []

    @property
    def domains(self) -> list[str]:
        """The domains of the training examples, sorted."""
        return sorted({d for d in self.train.domains if d is not None})

    def count_rows_and_steps(self) -> dict[str, int | float]:
        """Rows, batches and steps of the run."""
        return {
            "train_examples": len(self.train),
            "validation_examples": len(self.validation) if self.validation else 0,
            "excluded_rows": len(self.rows.excluded),
            "canary_rows": self.rows.count_planted(),
            "examples_per_epoch": self.schedule.epoch_examples,
            "tokens": int(self.train.lengths.sum()),
            "supervised_tokens": int(self.train.supervised_counts.sum()),
            "longest_example": int(self.train.lengths.max()),
            "global_batch_size": self.schedule.global_batch,
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "total_steps": self.schedule.total_steps,
            "warmup_steps": count_warmup_steps(self.config.training, self.schedule.total_steps),
        }


def plan_run(config: TrainingConfig, progress: Progress, global_batch: int | None = None) -> RunPlan:
    """Resolve the config against model and data, tokenize, and lay out the steps. Loads no weights, trains nothing.

    Args:
        global_batch: examples per step; None: batch_size x gradient_accumulation_steps. A resumed run keeps its own,
            which in earlier versions was that times the number of processes.

    Raises:
        TrainingLensError: anything that would keep `train` from starting.
    """
    device = get_device(config.model.device)
    precision = resolve_precision(config.training.precision, device)
    require_writable(Path(config.output.base_output_dir), "output.base_output_dir")
    for name in config.lens.collectors or ():
        CollectorRegistry.get(name)
    distributed = config.distributed
    processes = Processes(device, distributed.base == "sharded", distributed.timeout_seconds)
    require_unsloth(config, device, processes.count)
    for line in distributed.describe_alone() if processes.count == 1 else ():
        logger.info("%s", line)
    facts, tokenizer = read_tokenizer(config)
    resolved = _train_new_embeddings(_resolve_config(config, facts, tokenizer, precision), facts, tokenizer)
    parameters, adaptation, needs = _check_model(resolved, tokenizer, device, precision)
    splits = _prepare_splits(resolved, tokenizer, processes, progress)
    rows = select_rows(resolved, splits, build_preparation(resolved, tokenizer))
    training = resolved.training
    per_step = global_batch or training.batch_size * training.gradient_accumulation_steps
    schedule = build_schedule(resolved, rows.train, splits["train"], per_step)
    for line in describe_run_length(training, schedule):
        logger.info("%s", line)
    configured = training.micro_batch_tokens
    budget = (
        processes.reduce_min(plan_token_budget(needs, device, processes.count)) if configured == "auto" else configured
    )
    plan = RunPlan(
        resolved, facts, parameters, adaptation, tokenizer, precision, rows, splits, schedule, processes, budget, needs,
    )  # fmt: skip
    if plan.validation is not None and (sample := plan.validation_sample):
        logger.info(
            "validation: all %d rows once an epoch, and %d of them every %d steps in between (training.eval_steps "
            "validates all rows as often as it says)",
            *(len(plan.validation), len(sample.positions), sample.every),
        )
    return plan


def read_tokenizer(config: TrainingConfig) -> tuple[ModelFacts, Any]:
    """The model's facts, and its tokenizer with the template file and the new tokens of the config applied.

    Raises:
        TrainingLensError: no such model, a broken tokenizer or template, a tokenizer of another model, or new tokens
            that it has.
    """
    facts = read_facts(config.model)
    tokenizer = load_tokenizer(config.model, new_tokens=config.data.new_tokens)
    required = required_rows(tokenizer, config.data.new_tokens)
    check_vocabulary(required, facts.vocabulary, config.model.id, config.model.resize_embeddings)
    load_template_file(config.data.template, tokenizer)
    return facts, tokenizer


def resolve_texts(config: TrainingConfig, facts: ModelFacts, tokenizer: Any) -> TrainingConfig:
    """The config with template, date and `seq_len` resolved: with them, the tokens are determined."""
    data = {"template": choose_template(config.data.template, tokenizer), "date": resolve_date(config.data, tokenizer)}
    return config.replace_keys(model={"seq_len": resolve_seq_len(config.model, facts)}, data=data)


def build_preparation(config: TrainingConfig, tokenizer: Any) -> Preparation:
    """What determines the tokens of a run, from a config of `resolve_texts`."""
    assert config.model.seq_len is not None
    renderer = build_renderer(config.data, tokenizer)
    return Preparation(config.data, renderer, TextEncoder(tokenizer), config.model.seq_len, tokenizer_hash(tokenizer))


def token_cache_folder(config: TrainingConfig) -> Path:
    """The folder of tokenized splits, shared by all runs of the output folder."""
    return Path(config.output.base_output_dir) / "cache"


def _resolve_config(config: TrainingConfig, facts: ModelFacts, tokenizer: Any, precision: Precision) -> TrainingConfig:
    settled = resolve_texts(config, facts, tokenizer)
    lr = config.training.lr or default_lr(facts.width)
    logger.info("model: %s, width %d; up to %d tokens per example", config.model.id, facts.width, settled.model.seq_len)
    if config.model.id == embedded.MODEL and config.data.train != [embedded.TRAIN]:
        logger.warning("your rows train the embedded demo model, which knows only its own small world; set model.id")
    if config.data.template == "auto":
        logger.info(
            "template: %s",
            "the tokenizer's own chat template" if settled.data.template == "chat" else settled.data.template,
        )
    if config.training.lr is None:
        logger.info("learning rate: %g, from the model's width (training.lr sets another)", lr)
    return settled.replace_keys(
        peft=adopt_saved_settings(config.peft).model_dump(exclude_unset=True),
        training={"lr": lr, "precision": precision},
    )


def _train_new_embeddings(config: TrainingConfig, facts: ModelFacts, tokenizer: Any) -> TrainingConfig:
    """The config with embedding and head fully trained, if model.resize_embeddings adds rows to them."""
    added = required_rows(tokenizer, config.data.new_tokens) - facts.vocabulary
    if added <= 0 or not config.model.resize_embeddings or config.peft.from_adapter:
        return config
    ends = embedding_modules(build_skeleton(config.model))
    named = config.peft.modules_to_save
    missing = [path for path in ends if not any(path == name or path.endswith(f".{name}") for name in named)]
    logger.info("the embedding gets %d rows for new tokens; fully trained and saved: %s", added, ", ".join(ends))
    return config.replace_keys(peft={"modules_to_save": [*named, *missing]})


def _check_model(
    config: TrainingConfig, tokenizer: Any, device: torch.device, precision: Precision
) -> tuple[int, Adaptation, Footprint]:
    """Check weights, adapter, gradient checkpointing and packages on the model's skeleton.

    Returns the number of parameters, which modules are adapted, and the memory that training takes.
    """
    check_quantization(config, device)
    require_supported_type(config)
    new_tokens = config.data.new_tokens
    skeleton = build_skeleton(config.model, new_tokens)
    check_weights(config.model)
    if config.training.gradient_checkpointing:
        checkpoint_gradients(skeleton)
    parameters = count_parameters(skeleton).total
    adaptation = check_adapter(skeleton, config.peft, token_ids(tokenizer, new_tokens))
    log_adaptation(adaptation)
    if new_tokens:
        logger.info(
            "new tokens, whose rows start as the mean of their pieces' and are trained: %s", list_names(new_tokens)
        )
        if changed := describe_blanks(tokenizer, new_tokens[0]):
            logger.warning("data.new_tokens: %s", changed)
    return parameters, adaptation, estimate_footprint(skeleton, config, precision)


def _prepare_splits(
    config: TrainingConfig, tokenizer: Any, processes: Processes, progress: Progress
) -> dict[str, Split]:
    preparation, cache = build_preparation(config, tokenizer), token_cache_folder(config)
    sources = {"train": config.data.train, "validation": config.data.validation_sources}
    splits: dict[str, Split] = {}
    with processes.main_first():
        for name, specs in sources.items():
            if specs:
                paths = [str(spec) for spec in specs]
                splits[name] = prepare_split(paths, f"data.{name}", preparation, cache, progress)
                log_split(splits[name].report, f"data.{name}", preparation.seq_len)
    check_csv_settings(config.data.csv, [file for split in splits.values() for file in split.report.files])
    return splits


def write_rows_as_files(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The config with in-memory rows written to JSONL files in `folder`, named by their content."""

    def as_files(rows: list[str] | list[dict[str, Any]] | None, key: str) -> list[str] | None:
        if not rows or isinstance(rows[0], str):
            return [str(row) for row in rows] if rows is not None else None
        try:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except TypeError as error:
            raise ConfigurationError(f"data.{key}: rows must hold plain JSON values ({error}).") from error
        path = folder / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text, verbatim=True)
        return [str(path)]

    data = config.data
    return config.replace_keys(
        data={"train": as_files(data.train, "train"), "validation": as_files(data.validation, "validation")}
    )
