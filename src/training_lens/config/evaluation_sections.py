"""The sections on trained models: evaluation, inference, benchmark."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from training_lens.config.section import Count, Names, Paths, Place, Section, setting


class EvaluationSection(Section):
    """Evaluating models on the validation rows: evaluate, baseline, compare."""

    max_examples: int | None = setting(None, "evaluate on at most so many rows; null: all of them", ge=1)
    generate: bool = setting(True, "let the model answer each prompt and score the answers; false: losses only")
    max_new_tokens: int = setting(256, "longest generated answer in tokens", ge=1)
    batch_tokens: int = setting(
        8192, "most tokens (padding included) in one forward pass; halved where memory runs out", ge=1
    )
    metrics: Paths = setting(
        [], "your own metrics: functions (my_metrics.polite), or all of a module or of a file my_metrics.py"
    )
    decide_by: str | None = setting(None, "the measure that decides compare's verdict, such as exact_match; null: loss")
    word_tokenizer: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab"] = setting(
        "13a", "whose words BLEU, ROUGE and F1 compare, by sacrebleu's names; char or zh for Chinese"
    )
    decimal: Literal["auto", "point", "comma"] = setting(
        "auto", "decimal mark of numbers with two readings, like 1,234; auto: as the right answers write them"
    )
    length_buckets: Count | list[Count] = setting(
        4, "results by length in tokens: so many buckets of like size, or their upper limits, [64, 256]"
    )
    controls: bool = setting(True, "compare: also ask the adapter with wrong and no domains, and with shuffled prompts")
    resamples: int = setting(1000, "bootstrap resamples for the intervals; 0: no intervals", ge=0)
    confidence: float = setting(0.95, "share of the resamples inside an interval", gt=0.0, lt=1.0)
    seed: int = setting(0, "of the resamples and of shuffled prompts", ge=0, lt=2**31)
    forgetting: Paths | None = setting(
        None, "compare: other text (paths like data.train): its loss before and after; null: none"
    )
    tasks: Names = setting([], "tasks of lm-eval, its own or yours, such as [arc_easy]; needs the extra `eval`")
    task_path: Place | None = setting(None, "folder of your own lm-eval tasks in YAML; null: lm-eval's alone")
    task_limit: int | None = setting(None, "at most so many rows of each task; null: all of them", ge=1)


class InferenceSection(Section):
    """Answering prompts."""

    adapter: Place = setting(
        "latest",
        "latest: of the run that started last; a run's id or folder, or an experiment: its last run; a "
        "PEFT adapter folder on model.id; none: model.id alone",
        min_length=1,
    )
    max_new_tokens: int = setting(256, "longest answer in tokens", ge=1)
    temperature: float = setting(0.0, "0: greedy; else the sampling temperature", ge=0.0, le=5.0)
    top_p: float = setting(1.0, "sample from the smallest set with this probability", gt=0.0, le=1.0)
    top_k: int | None = setting(None, "sample from so many of the likeliest tokens; null: from all", ge=1)
    seed: int = setting(0, "of the sampling", ge=0, lt=2**31)
    batch_tokens: int = setting(8192, "most tokens (padding and answers included) in one batch of infer --input", ge=1)
    drafts: Literal["auto", "off"] = setting(
        "auto",
        "speculative decoding of greedy answers. auto: where at most four rows are decoded, tokens that followed the "
        "same words before are verified together; off: one token at a time",
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _require_adapter(cls, value: Any) -> Any:
        if value is None:  # as the preset inference=manual leaves it
            raise ValueError("no adapter is named; give inference.adapter=RUN, an adapter folder, latest, or none")
        return value


class BenchmarkSection(Section):
    """Measuring how fast base, adapter and merged model answer."""

    models: list[Literal["base", "adapter", "merged"]] = setting(
        ["base", "adapter", "merged"],
        "which are measured, in turn: base alone, adapter beside the weights, adapter merged into them",
        min_length=1,
    )
    batch_sizes: list[Count] = setting([1, 4, 16], "prompts that are answered together", min_length=1)
    prompt_lengths: list[Count] = setting([32, 128], "tokens of each prompt", min_length=1)
    new_tokens: int = setting(64, "tokens generated for each prompt, end tokens or not", ge=2)
    warmup: int = setting(1, "calls of each kind before those that count", ge=0)
    repetitions: int = setting(5, "calls of each kind that count", ge=1)
    seed: int = setting(0, "of the choice of prompts", ge=0, lt=2**31)

    @field_validator("models", "batch_sizes", "prompt_lengths")
    @classmethod
    def _each_once(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value} names one of them twice; give each once")
        return value
