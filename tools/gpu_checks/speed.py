"""What a run costs: waits for the device, tokens per second against HF Trainer with PEFT, kernels, memory, answers."""

from __future__ import annotations

import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_checks.drills import train_undisturbed
from gpu_checks.models import Found, Settings, assemble, configure, first_steps
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.batching import StepPlan
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session, open_run, open_session
from training_lens.models.adapters import attach
from training_lens.models.factory import load_model
from training_lens.models.fast.install import uninstall_kernels
from training_lens.training.estimate import estimate_run
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import free_memory, peak_bytes, reset_peak, synchronize

WARM = 2  # steps that are not timed
KERNELS = 10  # that are listed


def count_synchronizations(settings: Settings) -> Found:
    """How often one step waits for the device, and where; the trainer's one sync point is expected."""
    if settings.device.type != "cuda":
        return {"status": "not run", "why": "only CUDA counts synchronizations"}
    found = {precision: _find_waits(settings, precision) for precision in ("bf16", "fp16")}
    summary = ", ".join(f"{precision}: {len(places)} per step" for precision, places in found.items())
    error = {"status": "failed", "error": f"more than one: {summary}"} if len(found["bf16"]) > 1 else {}
    return {**error, "places": found, "summary": summary}


def _find_waits(settings: Settings, precision: str) -> list[str]:
    _, trainer = assemble(configure(settings, "waits", training={"precision": precision}))
    *warm, last = first_steps(trainer, WARM + 1)
    for plan in warm:
        trainer.train_step(plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step(last)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    uninstall_kernels(trainer.model)
    return [f"{found.filename}:{found.lineno}" for found in caught if "synchronizing" in str(found.message)]


def measure_training(settings: Settings) -> Found:
    """Useful tokens per second of ours and of HF Trainer with PEFT on the same rows, profile, estimate and peak."""
    steps = 4 if settings.small else 12
    config = configure(settings, "speed", large=True, peft={"r": 16}, training={"max_steps": steps})
    plan, trainer = assemble(config)
    ours = _time_steps(plan, trainer, first_steps(trainer, steps))
    kernels = _profile_step(settings, trainer, first_steps(trainer, 1)[0])
    uninstall_kernels(trainer.model)
    tokens = [[plan.train[int(i)] for i in step.examples] for step in first_steps(trainer, steps)]
    del trainer
    free_memory()
    estimate = estimate_run(plan)
    free_memory()
    theirs = _time_hf_trainer(settings, plan, tokens)
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    return {
        "precision": plan.precision, "parameters": plan.parameters, "ours": ours, "hf_trainer_peft": theirs,
        "kernels": kernels,
        "estimate": None if estimate is None else {"seconds": estimate.seconds, "peak_bytes": estimate.peak_bytes},
        "summary": f"{ours['tokens_per_second']:,.0f} tokens/s, HF Trainer + PEFT "
        f"{theirs['tokens_per_second']:,.0f}: {ratio:.2f} times; peak {ours['peak_bytes'] / 1e9:.2f} GB"
        + (f", estimated {estimate.peak_bytes / 1e9:.2f}" if estimate else ""),
    }  # fmt: skip


def _time_steps(plan: RunPlan, trainer: Trainer, steps: list[StepPlan]) -> Found:
    trainer.set_token_budget()
    reset_peak(plan.processes.device)
    reports = [trainer.train_step(step) for step in steps]
    timed = reports[WARM:]
    return {
        "tokens_per_second": sum(report.tokens for report in timed) / sum(report.seconds for report in timed),
        "seconds": [report.seconds for report in reports],
        "losses": [report.loss for report in reports],
        "peak_bytes": peak_bytes(plan.processes.device),
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "kernels": str(trainer.engine.kernels),
    }


def _profile_step(settings: Settings, trainer: Trainer, step: StepPlan) -> list[Found]:
    """The kernels that one step spends most time in, with milliseconds and calls."""
    on_cuda = settings.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as recorded:
        trainer.train_step(step)
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, time_of))[:KERNELS]
    return [{"name": e.key, "milliseconds": getattr(e, time_of) / 1000, "calls": e.count} for e in events]


def _time_hf_trainer(settings: Settings, plan: RunPlan, tokens: list[list[Any]]) -> Found:
    """HF Trainer with PEFT on the steps' examples in their order, padded, from the same adapter."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(settings.device)
            times.append(time.perf_counter())

        on_train_end = on_step_begin

    rows = [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": [int(i) if m else -100 for i, m in zip(example.input_ids, example.loss_mask, strict=True)],
            "attention_mask": [1] * len(example.input_ids),
        }
        for step in tokens for example in step
    ]  # fmt: skip
    training = plan.config.training
    arguments = TrainingArguments(
        output_dir=str(settings.folder / "hf"), use_cpu=settings.device.type == "cpu", num_train_epochs=1,
        per_device_train_batch_size=training.batch_size, learning_rate=training.lr or 0.0, report_to=[],
        bf16=plan.precision == "bf16", fp16=plan.precision == "fp16", train_sampling_strategy="sequential",
        save_strategy="no", logging_steps=10**6, disable_tqdm=True,
    )  # fmt: skip
    model = attach(load_model(plan.config.model, settings.device, plan.precision), plan.config.peft)
    collator = DataCollatorForSeq2Seq(plan.tokenizer)
    reset_peak(settings.device)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    counted = sum(len(example.input_ids) for step in tokens[WARM:] for example in step)
    seconds = [end - begin for begin, end in pairwise(times)]
    peak = peak_bytes(settings.device)
    return {"tokens_per_second": counted / sum(seconds[WARM:]), "seconds": seconds, "peak_bytes": peak}


def compare_answers(settings: Settings) -> Found:
    """Greedy answers against the model's own `generate`: token for token in float32, and new tokens per second."""
    run = train_undisturbed(settings)
    session = open_run(run, precision="fp32")
    prompts = [session.tokenizer(text)["input_ids"] for text in ("Note who has what.", "Mia had 3 lamps.")]
    ours = generate_answers(session, prompts, InferenceSection(max_new_tokens=16))
    theirs = [_generate(session, prompt, 16) for prompt in prompts]
    same = [list(answer.token_ids) == tokens for answer, tokens in zip(ours, theirs, strict=True)]
    del session
    free_memory()
    config = configure(settings, "speed", large=True, inference={"adapter": "none"})
    speeds = _time_answers(open_session(config), [1] if settings.small else [1, 8], 16 if settings.small else 64)
    error = {} if all(same) else {"status": "failed", "error": f"{same.count(False)} answers differ from generate's"}
    shown = ", ".join(f"{rows} rows {s['ours']:.0f} against {s['generate']:.0f} tokens/s" for rows, s in speeds.items())
    return {**error, "same": same, "tokens_per_second": speeds, "summary": f"{sum(same)} of {len(same)} equal; {shown}"}


def _generate(session: Session, prompt: list[int], most: int) -> list[int]:
    """The tokens of the model's own greedy answer, without the one that ends it."""
    ids = torch.tensor([prompt], device=session.device)
    with torch.inference_mode():
        out = session.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most,
            eos_token_id=sorted(session.stop_ids), pad_token_id=session.pad_id,
        )  # fmt: skip
    tokens = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in session.stop_ids else tokens


def _time_answers(session: Session, batches: list[int], new_tokens: int) -> dict[int, dict[str, float]]:
    """New tokens per second of both, for prompts of 64 tokens; the second call is timed."""
    found = {}
    options = InferenceSection(max_new_tokens=new_tokens)
    generator = torch.Generator().manual_seed(0)
    for rows in batches:
        ids = torch.randint(6, 1000, (rows, 64), generator=generator).to(session.device)

        def ours(ids: torch.Tensor = ids) -> int:
            return sum(len(answer.token_ids) for answer in generate_answers(session, ids.tolist(), options))

        def theirs(ids: torch.Tensor = ids) -> int:
            mask, pad = torch.ones_like(ids), session.pad_id
            with torch.inference_mode():
                out = session.model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad,
                    eos_token_id=None,
                )  # fmt: skip
            return (out.shape[1] - ids.shape[1]) * len(ids)

        found[rows] = {name: _tokens_per_second(session, call) for name, call in (("ours", ours), ("generate", theirs))}
    return found


def _tokens_per_second(session: Session, call: Any) -> float:
    call()
    synchronize(session.device)
    started = time.perf_counter()
    tokens = call()
    synchronize(session.device)
    return float(tokens / (time.perf_counter() - started))
