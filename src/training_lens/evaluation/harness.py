"""Tasks of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a session's model.

The `eval` extra installs it. Tasks with local data files need no network; nothing is sent anywhere.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.utils.devices import DTYPES, restore_rng_state, rng_state, seed_everything
from training_lens.utils.formatting import describe_error, did_you_mean
from training_lens.utils.hub_access import require_hub
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
KEY = "evaluation.tasks"
TaskScores = dict[str, dict[str, float]]  # task -> metric -> value
BOOTSTRAPS = 1000  # draws for the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Tasks in YAML of the folder `include_path` take precedence over lm-eval's of the same name. `limit`: only the first
    so many rows of each task. `base`: without the adapter. `batch_tokens`: most tokens (padding and answers included)
    in one forward pass. `seed`: of the few-shot examples drawn, and of sampled answers.
    """

    include_path: str | None = None
    limit: int | None = None
    base: bool = False
    batch_tokens: int = 8192
    seed: int = 0


def run_tasks(
    session: Session, tasks: Sequence[str], options: TaskOptions | None = None, progress: Progress | None = None
) -> TaskScores:
    """The scores of tasks, groups or tags of tasks: task -> metric -> value, as lm-eval computes and names them.

    The standard error of a metric is `{metric}_stderr`, where it has one; a metric of a named filter is
    `{metric},{filter}`. Prompts are the task's own text, without the run's template.

    Raises:
        ConfigurationError: lm-eval is not installed, a task is unknown, its data is not available, or it fails.
    """
    if find_spec("lm_eval") is None:
        raise ConfigurationError(f"{KEY}: needs lm-eval. Install it: pip install 'training-lens[eval]'")
    options = options or TaskOptions()
    with _silence_libraries(), _seed_generators(options.seed):
        loaded = _load_tasks(tasks, options.include_path)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(options.seed)
        model = _language_model(session, options.batch_tokens, progress or Progress())
        failure = f"{KEY}: {', '.join(tasks)}: lm-eval fails"
        with base_only(session.model, options.base), _report_task_errors(failure):
            from lm_eval.evaluator import evaluate

            found = evaluate(model, loaded, limit=options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return {  # 'acc,none' is 'acc'; aliases and 'N/A' are left out
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in scores.items()
            if isinstance(value, int | float) and "," in name
        }
        for task, scores in found["results"].items()
    }


def _load_tasks(tasks: Sequence[str], include_path: str | None) -> Any:
    """The tasks with their data: from local files and the cache; from the hub only where it is missing."""
    from huggingface_hub import constants

    manager = _open_task_manager(tasks, include_path)
    failing = f"{KEY}: {', '.join(tasks)} cannot be loaded"
    try:
        with _stay_offline(), _report_task_errors(failing, let_through=ConnectionError):
            return manager.load(list(tasks))
    except ConnectionError as error:
        require_hub(f"{KEY}: data of {', '.join(tasks)}", ConfigurationError)
        if constants.HF_HUB_OFFLINE:
            raise ConfigurationError(
                f"{failing} offline: {describe_error(error)} Give tasks with local data files."
            ) from error
    with _report_task_errors(failing):
        return manager.load(list(tasks))


def _open_task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The index of tasks: of the folder alone where it has all of them, as lm-eval's own takes seconds to read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigurationError(f"evaluation.task_path: there is no folder '{include_path}'.")
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= {*local.all_subtasks, *local.all_tags}:  # a group may hold tasks of lm-eval's own
            return local
    manager = TaskManager(include_path=include_path)
    if not tasks:
        raise ConfigurationError(f"{KEY}: no task is given.")
    known = manager.all_tasks
    there = f", {len(local.all_tasks)} of them in {include_path}" if include_path is not None else ""
    problems = [
        f"{KEY}: '{task}' is none of the {len(known)} tasks{there}.{did_you_mean(task, known)}"
        for task in tasks
        if task not in known
    ]
    if problems:
        raise ConfigurationError(problems)
    return manager


def _language_model(session: Session, batch_tokens: int, progress: Progress) -> Any:
    """The session's model as lm-eval expects it, with a progress bar for each kind of request."""
    from lm_eval.models.huggingface import HFLM

    class SessionModel(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._run_requests("likelihoods", requests, super().loglikelihood)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._run_requests("likelihoods of texts", requests, super().loglikelihood_rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            answers = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
            prompts = [len(self.tok_encode(request.args[0])) for request in requests]
            self._fit_batch([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
            return self._run_requests("answers", requests, super().generate_until)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[Any]:
            # The last token is never an input, so a request may be one token longer than the model's positions.
            self._fit_batch([len(context) + len(continuation) - 1 for _, context, continuation in requests])
            scores: list[Any] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            return scores

        def _fit_batch(self, lengths: list[int]) -> None:
            """Set the batch size to what fits, and warn of requests that are too long: lm-eval cuts their start."""
            if cut := sum(length > self.max_length for length in lengths):
                logger.warning(
                    "lm-eval: %d of %d requests are longer than the model's %d positions: the start of their prompt "
                    "is cut", cut, len(lengths), self.max_length,
                )  # fmt: skip
            self.batch_size_per_gpu = max(1, batch_tokens // min(max(lengths), self.max_length))

        def _run_requests(self, kind: str, requests: list[Any], answer: Callable[..., list[Any]]) -> list[Any]:
            with progress.task(f"lm-eval, {kind}", len(requests), "requests") as advance:
                # The cache hook is called for each request that is done.
                self.cache_hook = SimpleNamespace(add_partial=lambda *_request: advance(1))
                return answer(requests, disable_tqdm=True)

    with _set_attributes(session.model, tie_weights=lambda: None):  # tying breaks modules that PEFT trained whole
        return SessionModel(
            pretrained=session.model,
            tokenizer=copy.deepcopy(session.tokenizer),  # lm-eval gives it a pad token
            max_length=session.positions,
            mixed_precision_dtype=None if session.precision == "fp32" else DTYPES[session.precision],
        )


@contextmanager
def _report_task_errors(what: str, let_through: type[Exception] | None = None) -> Iterator[None]:
    """Within the block, any error of a task is a ConfigurationError: its YAML or its code may be wrong."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or (let_through and isinstance(error, let_through)):
            raise
        raise ConfigurationError(
            f"{what}: {describe_error(error)} Look into the task's YAML file and its data."
        ) from error


@contextmanager
def _stay_offline() -> Iterator[None]:
    """Within the block the Hugging Face libraries use no network: data not on this machine is a ConnectionError."""
    import datasets
    from huggingface_hub import constants

    with _set_attributes(constants, HF_HUB_OFFLINE=True), _set_attributes(datasets.config, HF_HUB_OFFLINE=True):
        yield


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Within the block the libraries log nothing, draw no bars, print to standard error and count no downloads."""
    import datasets
    from lm_eval.api.task import tqdm

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(_set_attributes(tqdm, __init__=partialmethod(tqdm.__init__, disable=True)))
        stack.enter_context(_set_attributes(datasets.config, HF_UPDATE_DOWNLOAD_COUNTS=False))
        for logger in map(logging.getLogger, ("lm_eval", "datasets")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextmanager
def _set_attributes(target: Any, **values: Any) -> Iterator[None]:
    """Within the block, these attributes have these values."""
    before = {name: vars(target)[name] for name in values if name in vars(target)}  # not those of a class above
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(target, name)
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def _seed_generators(seed: int) -> Iterator[None]:
    """Within the block every random generator starts at `seed`; afterwards each has its old state."""
    torch_state, python_state, numpy_state = rng_state(), random.getstate(), np.random.get_state()
    seed_everything(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        restore_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
