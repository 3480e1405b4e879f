"""What a run must survive: the command line from end to end, signals, infinities, and memory that runs out."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpu_checks.models import Found, Settings, assemble, configure, first_steps, isolate, write_model
from training_lens import InterruptedRunError, TrainingConfig, TrainingError, TrainingWrapper
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import open_run
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapter_files import WEIGHTS
from training_lens.models.fast.install import uninstall_kernels
from training_lens.models.fast.tolerance import relative_error
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.devices import free_memory

COMMAND = [sys.executable, "-m", "training_lens"]
SECONDS = 300  # the longest that one command may take
SIGNALLED_AFTER = 3  # lines of metrics.jsonl
LONG_STEPS = 20  # so many that the signal comes before the end
MEMORY_SHARE = 0.6  # of what the undisturbed pass took
CLOSE = 1e-3  # relative, of losses that are summed in another order


def run_of(settings: Settings, run_id: str) -> RunFolder:
    return RunFolder(settings.folder / "outputs/experiments/default/runs" / run_id)


def call_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=SECONDS)


def write_config(settings: Settings, config: TrainingConfig) -> list[str]:
    """Arguments of a command that give it a config, as a file."""
    path = settings.folder / f"{config.output.run_id}.json"
    path.write_text(json.dumps(config.explicit_values()), encoding="utf-8")
    return ["--config", str(path)]


def train_undisturbed(settings: Settings) -> RunFolder:
    """The run that others are compared with, by the command line and with lens; trained once."""
    run = run_of(settings, "undisturbed")
    if not run.root.exists():
        config = configure(settings, "undisturbed", training={"max_steps": LONG_STEPS})
        require_success(call_command("train", *write_config(settings, config)))
    return run


def require_success(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    if done.returncode != code:
        raise RuntimeError(f"exit code {done.returncode}, expected {code}: {done.stderr.strip()[-600:]}")


def run_command_line(settings: Settings) -> Found:
    """`train` with the lens, `compare` and `infer` in processes of their own."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    run = train_undisturbed(settings)
    seconds["train"] = time.perf_counter() - started
    for name, words in {"compare": (), "infer": ("Note who has what.", "inference.max_new_tokens=8")}.items():
        started = time.perf_counter()
        require_success(call_command(name, *words, "--run", str(run.root)))
        seconds[name] = time.perf_counter() - started
    tables = sorted(path.name for path in run.lens.iterdir())
    summary = run.read_metadata("summary.json")
    wrong = {} if len(tables) > 1 else {"status": "failed", "error": f"the lens wrote only {tables}"}
    return {
        **wrong, "seconds_each": seconds, "lens": tables, "run": summary,
        "summary": ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
    }  # fmt: skip


def resume_after_signal(settings: Settings) -> Found:
    """SIGTERM after the third line of metrics.jsonl, exit code 143, and the printed command resumes the run."""
    undisturbed, run = train_undisturbed(settings), run_of(settings, "signalled")
    config = configure(settings, "signalled", training={"max_steps": LONG_STEPS})
    command = [*COMMAND, "train", *write_config(settings, config)]
    with (settings.folder / "signalled.txt").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        end = time.monotonic() + SECONDS
        while process.poll() is None and _count_lines(run.metrics_file) < SIGNALLED_AFTER and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code = process.wait(SECONDS)
        output.seek(0)
        printed = " ".join(output.read().split())
    if code != 128 + signal.SIGTERM:
        raise RuntimeError(f"exit code {code} after SIGTERM, expected 143: {printed[-600:]}")
    advice = re.search(r"Resume it: training-lens (train --resume .*)", printed)
    if advice is None:
        raise RuntimeError(f"no command to resume is printed: {printed[-600:]}")
    done_lines = _count_lines(run.metrics_file)
    require_success(call_command(*shlex.split(advice[1])[:3]))
    return {"lines_at_the_signal": done_lines, **compare_adapters(settings, run, undisturbed)}


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare_adapters(settings: Settings, run: RunFolder, undisturbed: RunFolder) -> Found:
    """Whether both have the same adapter: bit for bit on a CPU; elsewhere the difference is reported."""
    files = [folder.adapter / WEIGHTS for folder in (run, undisturbed)]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    found, expected = map(load_file, files)
    largest = max((found[name] - expected[name]).abs().max().item() for name in expected)
    is_exact = hashes[0] == hashes[1]
    broken = settings.device.type == "cpu" and not is_exact
    return {
        **({"status": "failed", "error": f"the resumed adapter differs by up to {largest:.1e}"} if broken else {}),
        "sha256": hashes, "largest_difference": largest,
        "summary": f"resumed {'equals' if is_exact else 'is near'} undisturbed, largest difference {largest:.1e}",
    }  # fmt: skip


def force_infinity(settings: Settings) -> Found:
    """An infinite weight stops a run with its error and exit code 1; an fp16 step that overflows is skipped."""
    _, trainer = assemble(configure(settings, "infinite"))
    with torch.no_grad():
        trainer.parameters[0].view(-1)[0] = torch.inf
    try:
        trainer.train_step(first_steps(trainer, 1)[0])
        raise RuntimeError("an infinite weight of the adapter did not stop the step")
    except TrainingError as error:
        message = str(error)
    uninstall_kernels(trainer.model)
    done = call_command("train", *write_config(settings, _configure_infinite_base(settings)))
    require_success(done, code=1)
    if "the base is broken" not in " ".join(done.stderr.split()):
        raise RuntimeError(f"the error does not say that the base is broken: {done.stderr.strip()[-600:]}")
    on_cpu = settings.device.type == "cpu"
    skipped = {"status": "not run", "why": "fp16 needs CUDA"} if on_cpu else _overflow_in_fp16(settings)
    wrong = {key: skipped[key] for key in ("status", "error") if skipped["status"] == "failed"}
    return {**wrong, "error_of_the_step": message, "fp16": skipped, "summary": f"{message.split(';')[0]}; exit code 1"}


def _configure_infinite_base(settings: Settings) -> TrainingConfig:
    """The config of a run whose base has an infinite weight: a saved adapter that has one is refused before a step."""
    base, broken = write_model(settings), settings.folder / "infinite-base"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    return configure(settings, "infinite-base", model={"id": str(broken)})


def _overflow_in_fp16(settings: Settings) -> Found:
    """A step under a loss scale that overflows changes nothing and halves the scale; the next step trains."""
    _, trainer = assemble(configure(settings, "overflow", training={"precision": "fp16"}))
    scales, changes = [2.0**60, 2.0**10], []
    for plan, scale in zip(first_steps(trainer, 2), scales, strict=True):
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
        before = [parameter.detach().clone() for parameter in trainer.parameters]
        trainer.train_step(plan)
        changes.append(any(not torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True)))
        scales[len(changes) - 1] = trainer.scaler.get_scale() / scale
    uninstall_kernels(trainer.model)
    found: Found = {"scale_after_over_before": scales, "changed": changes, "status": "ok"}
    if changes == [False, True] and scales[0] == 0.5:
        return found
    return {**found, "status": "failed", "error": "the overflowing step was not skipped, or the next one did not train"}


class Interruption(Callback):
    """Sends this process SIGTERM after the second step."""

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step == 2:
            signal.raise_signal(signal.SIGTERM)


def train_in_4_bits(settings: Settings) -> Found:
    """A base in NF4: trained, interrupted and resumed, and merged."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return {"status": "not run", "why": f"bitsandbytes: {error}"}
    configs = [configure(settings, f"4bit-{name}", model={"quantization": "4bit"}) for name in ("whole", "resumed")]
    summary = TrainingWrapper(configs[0]).train()
    whole, resumed = (run_of(settings, f"4bit-{name}") for name in ("whole", "resumed"))
    try:
        TrainingWrapper(configs[1], callbacks=(Interruption(),)).train()
        raise RuntimeError("the run did not stop after SIGTERM")
    except InterruptedRunError:
        free_memory()
    TrainingWrapper.resume(resumed)
    compared = compare_adapters(settings, resumed, whole)
    merged = merge_adapter(configs[0].replace_keys(inference={"adapter": str(whole.root)}), MergeOptions())
    compared["summary"] += "; merged and verified"
    return {**compared, "run": asdict(summary), "merge": merged.report}


def run_out_of_memory(settings: Settings) -> Found:
    """A step, an evaluation and answers with too little memory: smaller passes, and the same results."""
    if settings.device.type != "cuda":
        return {"status": "not run", "why": "torch limits the memory of CUDA alone"}
    drills = {"training": _drill_training, "evaluation": _drill_evaluation, "answering": _drill_answering}
    found = {name: isolate(partial(drill, settings)) for name, drill in drills.items()}
    wrong = [f"{name}: {drill['error']}" for name, drill in found.items() if drill["status"] == "failed"]
    if wrong:
        return {"status": "failed", "error": "; ".join(wrong), "drills": found}
    return {
        "drills": found,
        "summary": "; ".join(f"{n} goes on, error {d['difference']:.1e}" for n, d in found.items()),
    }


def _drill_training(settings: Settings) -> Found:
    changes: dict[str, Any] = {"batch_size": 8 if settings.small else 64, "micro_batch_tokens": 2**20}
    _, trainer = assemble(configure(settings, "memory", training=changes))
    (plan,) = first_steps(trainer, 1)
    start = [parameter.detach().clone() for parameter in trainer.parameters]

    def step() -> float:
        with torch.no_grad():
            for parameter, value in zip(trainer.parameters, start, strict=True):
                parameter.copy_(value)
        return trainer.train_step(plan).loss

    try:
        return _repeat_with_less_memory(settings, step, "out of memory with micro-batches")
    finally:
        uninstall_kernels(trainer.model)


def _drill_evaluation(settings: Settings) -> Found:
    plan, trainer = assemble(configure(settings, "memory"))
    options = EvaluationOptions(plan.processes, plan.precision, 2**17, trainer.pad_id)

    def evaluate() -> float:
        return evaluate_loss(trainer.model, plan.train, options).loss

    try:
        return _repeat_with_less_memory(settings, evaluate, "out of memory in a batch")
    finally:
        uninstall_kernels(trainer.model)


def _drill_answering(settings: Settings) -> Found:
    session = open_run(train_undisturbed(settings), precision="fp32")
    prompts = [list(range(6, 306 + i)) for i in range(16 if settings.small else 256)]
    wanted = InferenceSection(max_new_tokens=16, batch_tokens=2**20)

    def respond() -> list[int]:
        return [token for answer in generate_answers(session, prompts, wanted) for token in answer.token_ids]

    return _repeat_with_less_memory(settings, respond, "memory ran out with")


def _repeat_with_less_memory(settings: Settings, compute: Callable[[], Any], line: str) -> Found:
    """`compute` as it is, and where only a share of what it took is free; lines of the log that begin with `line`."""
    compute()  # what stays allocated, such as the optimizer's state
    free_memory()
    torch.cuda.reset_peak_memory_stats(settings.device)
    before = torch.cuda.memory_allocated(settings.device)
    expected = compute()
    needed = torch.cuda.max_memory_allocated(settings.device) - before
    free_memory()
    allowed = torch.cuda.memory_reserved(settings.device) + int(MEMORY_SHARE * needed)
    total = torch.cuda.mem_get_info(settings.device)[1]
    with _collect_log() as lines:
        torch.cuda.set_per_process_memory_fraction(allowed / total, settings.device)
        try:
            found = compute()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, settings.device)
    difference = relative_error(torch.tensor(found).double(), torch.tensor(expected).double())
    lines = [text for text in lines if text.startswith(line)]
    report: Found = {"needed_bytes": needed, "allowed_bytes": allowed, "lines": lines, "difference": difference}
    if lines and difference <= CLOSE:
        return report
    return {**report, "status": "failed", "error": f"{len(lines)} smaller passes, relative error {difference:.1e}"}


@contextmanager
def _collect_log() -> Iterator[list[str]]:
    """The product's log lines within the block."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("training_lens")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
