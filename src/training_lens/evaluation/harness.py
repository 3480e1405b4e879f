"""Tasks of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a session's model.

The `eval` extra brings it. Tasks whose data are local files need no network; nothing is sent anywhere.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.utils.devices import DTYPES
from training_lens.utils.formatting import describe_error, nearest_name
from training_lens.utils.hub_access import require_hub
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory
from training_lens.utils.seeding import restore_rng_state, rng_state, seed_everything

logger = get_logger(__name__)
KEY = "evaluation.tasks"
TaskScores = dict[str, dict[str, float]]  # task -> metric -> value
BOOTSTRAPS = 1000  # draws for the standard error of metrics that have no formula for it


def run_tasks(
    session: Session,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    base: bool = False,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskScores:
    """The scores of tasks, groups or tags of tasks: task -> metric -> value, as lm-eval computes and names them.

    A metric's standard error stands beside it as `{metric}_stderr` where it has one; a metric of a filter that has a
    name as `{metric},{filter}`. Prompts are the task's own text, without the run's template.

    Args:
        include_path: a folder with tasks in YAML; one of them stands before lm-eval's own of the same name.
        limit: at most so many rows of each task, the first; None: all.
        base: score the model without its adapter.
        batch_tokens: most tokens (padding and answers included) in one forward pass.
        seed: of the draw of few-shot examples, and of sampled answers.

    Raises:
        ConfigurationError: lm-eval is not installed, a task is not known, its data cannot be had, or it fails.
    """
    if find_spec("lm_eval") is None:
        raise ConfigurationError(f"{KEY}: needs lm-eval. Install it: pip install 'training-lens[eval]'")
    with _silence_libraries(), _seed_generators(seed):
        loaded = _load_tasks(tasks, include_path)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
        model = _language_model(session, batch_tokens, progress or Progress())
        with base_only(session.model, base), _report_task_errors(f"{KEY}: {', '.join(tasks)}: lm-eval fails"):
            from lm_eval.evaluator import evaluate

            found = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return {name: _read_scores(scores) for name, scores in found["results"].items()}


def _read_scores(scores: dict[str, Any]) -> dict[str, float]:
    """lm-eval's numbers of one task: 'acc,none' is 'acc'; what is no number (its alias, errors 'N/A') is left out."""
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _load_tasks(tasks: Sequence[str], include_path: str | None) -> Any:
    """The tasks with their data: from local files and the cache, and from the hub only what is not there.

    Raises:
        ConfigurationError: see `run_tasks`.
    """
    manager = _open_task_manager(tasks, include_path)
    failing = f"{KEY}: {', '.join(tasks)} cannot be loaded"
    try:
        with _stay_offline(), _report_task_errors(failing, let_through=ConnectionError):
            return manager.load(list(tasks))
    except ConnectionError as error:
        require_hub(f"{KEY}: data of {', '.join(tasks)}", ConfigurationError)
        if _works_offline():
            raise ConfigurationError(
                f"{failing} offline: {describe_error(error)} Give tasks with local data files."
            ) from error
    with _report_task_errors(failing):
        return manager.load(list(tasks))


def _open_task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's index of tasks: of the folder alone where that has all of them, for its own takes seconds to read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigurationError(f"evaluation.task_path: there is no folder '{include_path}'.")
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= {*local.all_subtasks, *local.all_tags}:  # a group may hold tasks of lm-eval's own
            return local
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        there = f", {len(local.all_tasks)} of them in {include_path}" if include_path is not None else ""
        raise ConfigurationError(
            [
                f"{KEY}: '{task}' is none of the {len(manager.all_tasks)} tasks{there}.{_suggest_task(task, manager)}"
                for task in unknown
            ]
            or f"{KEY}: no task is given."
        )
    return manager


def _suggest_task(task: str, manager: Any) -> str:
    close = nearest_name(task, manager.all_tasks)
    return f" Did you mean {close}?" if close else ""


def _language_model(session: Session, batch_tokens: int, progress: Progress) -> Any:
    """The session's model as lm-eval takes it; each kind of request has its bar, and batches that fit the tokens."""
    from lm_eval.models.huggingface import HFLM

    class SessionModel(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._told("likelihoods", requests, super().loglikelihood)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._told("likelihoods of texts", requests, super().loglikelihood_rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            answers = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
            prompts = [len(self.tok_encode(request.args[0])) for request in requests]
            self._fit([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
            return self._told("answers", requests, super().generate_until)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[Any]:
            # The last token is read by nobody, so a request may have one more than there are positions.
            self._fit([len(context) + len(continuation) - 1 for _, context, continuation in requests])
            scores: list[Any] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            return scores

        def _fit(self, lengths: list[int]) -> None:
            """Set the batch to what fits, and say what does not fit the model: lm-eval cuts its start."""
            if cut := sum(length > self.max_length for length in lengths):
                logger.warning(
                    "lm-eval: %d of %d requests are longer than the model's %d positions: the start of their prompt "
                    "is cut", cut, len(lengths), self.max_length,
                )  # fmt: skip
            self.batch_size_per_gpu = max(1, batch_tokens // min(max(lengths), self.max_length))

        def _told(self, kind: str, requests: list[Any], answer: Callable[..., list[Any]]) -> list[Any]:
            with progress.task(f"lm-eval, {kind}", len(requests), "requests") as advance:
                self.cache_hook = _Counter(advance)
                return answer(requests, disable_tqdm=True)

    with _keep_weights_untied(session.model):
        return SessionModel(
            pretrained=session.model,
            tokenizer=copy.deepcopy(session.tokenizer),  # lm-eval gives it a pad token
            max_length=session.positions,
            mixed_precision_dtype=None if session.precision == "fp32" else DTYPES[session.precision],
        )


@contextmanager
def _keep_weights_untied(model: Any) -> Iterator[None]:
    """Within the block nobody ties weights: lm-eval would, which breaks on modules that PEFT trained whole."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


class _Counter:
    """Stands where lm-eval keeps its cache, which is told of each request that is done."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def add_partial(self, _kind: str, _request: Any, _result: Any) -> None:
        self._advance(1)


@contextmanager
def _report_task_errors(what: str, let_through: type[Exception] | None = None) -> Iterator[None]:
    """Within the block, whatever a task raises is a ConfigurationError: its YAML and its code may be wrong anywhere."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or (let_through and isinstance(error, let_through)):
            raise
        raise ConfigurationError(
            f"{what}: {describe_error(error)} Look into the task's YAML file and its data."
        ) from error


def _works_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def _stay_offline() -> Iterator[None]:
    """Within the block the Hugging Face libraries ask nobody: what is not on this machine is a ConnectionError."""
    import datasets
    from huggingface_hub import constants

    with _set_attributes(constants, HF_HUB_OFFLINE=True), _set_attributes(datasets.config, HF_HUB_OFFLINE=True):
        yield


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Within the block: no log and no bars of the libraries, no print on standard output, no count of downloads."""
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
def _set_attributes(thing: Any, **values: Any) -> Iterator[None]:
    """Within the block, a module's or object's names have these values; then those they had."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextmanager
def _seed_generators(seed: int) -> Iterator[None]:
    """Within the block every generator that a task may draw from starts at `seed`; then all go on as before."""
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
