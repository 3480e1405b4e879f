"""The sections on trained models: evaluation, inference, benchmark."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from training_lens.config.section import Names, Paths, Place, Section


class EvaluationSection(Section):
    """Evaluating models on the validation rows: evaluate, baseline, compare."""

    max_examples: int | None = Field(None, ge=1, description="evaluate on at most so many rows; null: all of them")
    generate: bool = Field(
        True, description="let the model answer each prompt and score the answers; false: losses only"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer in tokens")
    batch_tokens: int = Field(
        8192, ge=1, description="most tokens (padding included) in one forward pass; halved where memory runs out"
    )
    metrics: Paths = Field(
        [],
        description="your own metrics: functions (my_metrics.polite), or all of a module or of a file my_metrics.py",
    )
    decide_by: str | None = Field(
        None, description="the measure that decides compare's verdict, such as exact_match; null: loss"
    )
    word_tokenizer: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab"] = Field(
        "13a", description="whose words BLEU, ROUGE and F1 compare, by sacrebleu's names; char or zh for Chinese"
    )
    decimal: Literal["auto", "point", "comma"] = Field(
        "auto",
        description="decimal mark of numbers with two readings, like 1,234; auto: as the right answers write them",
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
    forgetting: Paths | None = Field(
        None, description="compare: other text (paths like data.train): its loss before and after; null: none"
    )
    tasks: Names = Field(
        [], description="tasks of lm-eval, its own or yours, such as [arc_easy]; needs the extra `eval`"
    )
    task_path: Place | None = Field(None, description="folder of your own lm-eval tasks in YAML; null: lm-eval's alone")
    task_limit: int | None = Field(None, ge=1, description="at most so many rows of each task; null: all of them")


class InferenceSection(Section):
    """Answering prompts."""

    adapter: Place = Field(
        "latest",
        min_length=1,
        description="latest: of the run that started last; a run's id or folder, or an experiment: its last run; a "
        "PEFT adapter folder on model.id; none: model.id alone",
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
    def _require_adapter(cls, value: Any) -> Any:
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
