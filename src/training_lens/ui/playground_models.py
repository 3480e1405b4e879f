"""The playground's model: that of one run at a time, and what base and adapter answer to a question."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from training_lens.runs.run_folder import RunFolder
from training_lens.ui.playground_request import SIDES, Prompt, Question, Side
from training_lens.ui.token_texts import TokenText, spell_tokens

if TYPE_CHECKING:
    from training_lens.inference.session import Session

SECONDS_TO_WAIT = 0.8  # for the model, while it answers another request
CONTEXT_TOKENS = 8  # of the prompt before an answer: the text of its first token depends on them
BUSY = "The playground is busy with another request. Wait until it is done, or stop it, and try again."
Send = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class LoadedRun:
    """A run's model in memory, with the adapter as trained.

    Base and adapter have a session each: they share the model, but each keeps its own decoder.
    """

    key: tuple[Any, ...]  # the run, and its adapter's files
    sessions: Mapping[Side, Session]

    @property
    def session(self) -> Session:
        """The adapter's."""
        return self.sessions["adapter"]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, see `Session.prompt_ids`."""
        return self.session.prompt_ids(prompt.messages, prompt.domain)

    def spell_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as the model sees it, and how many tokens an answer may have; None where there is no limit."""
        ids, session = self.prompt_ids(prompt), self.session
        texts = spell_tokens(session.tokenizer, ids, session.encoder.special_ids)
        room = session.positions - len(ids) if session.positions else None
        return {"tokens": [describe_token(text) for text in texts], "count": len(ids), "room": room}


class PlaygroundModels:
    """Keeps the model of one run in memory, and lets one request at a time use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: LoadedRun | None = None

    @property
    def is_busy(self) -> bool:
        return self._lock.locked()

    def has_loaded(self, run: RunFolder) -> bool:
        """Whether the run's model is in memory."""
        loaded = self._loaded
        return loaded is not None and loaded.key == _identify_adapter(run)

    @contextmanager
    def use_model(self, run: RunFolder) -> Iterator[LoadedRun]:
        """The run's model, for this thread alone; it is loaded, and another run's freed, where needed.

        Raises:
            HTTPException: another request uses the model.
            CheckpointError, ModelLoadingError, AdapterError, ConfigurationError: see `open_run`.
        """
        with self._hold_lock():
            if not self.has_loaded(run):
                self._free_model()
                self._loaded = _load_run(run)
            assert self._loaded is not None
            yield self._loaded

    def unload_model(self, run: RunFolder) -> bool:
        """Free the run's model; False where it was not in memory."""
        with self._hold_lock():
            was_loaded = self._loaded is not None and self._loaded.key[0] == run.root
            if was_loaded:
                self._free_model()
        return was_loaded

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=SECONDS_TO_WAIT):
            raise HTTPException(409, BUSY)
        try:
            yield
        finally:
            self._lock.release()

    def _free_model(self) -> None:
        if self._loaded is not None:
            from training_lens.utils.devices import free_memory

            self._loaded = None
            free_memory()


def _identify_adapter(run: RunFolder) -> tuple[Any, ...]:
    """A run and the state of its adapter's files: one that is trained further is loaded again."""
    stats = [(path.name, path.stat()) for path in sorted(run.adapter.glob("*.safetensors"))]
    return (run.root, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _load_run(run: RunFolder) -> LoadedRun:
    """The run's model, with the adapter as trained; each request scales it, also to the scale chosen for the run."""
    from training_lens.inference.session import open_run

    key = _identify_adapter(run)
    session = open_run(run, adapter=run.adapter)
    return LoadedRun(key, {"base": replace(session), "adapter": session})


def describe_token(token: TokenText) -> dict[str, Any]:
    """A token as the page gets it."""
    return {"id": token.id, "text": token.text, "special": token.is_special, "partial": token.is_partial}


def answer_question(
    loaded: LoadedRun, question: Question, prompt_ids: Sequence[int], send: Send, check_client: Callable[[], None]
) -> None:
    """Send the text of each answer as it grows, how it ended, and then its tokens' log-probabilities.

    The run's files and, in the end, the model's weights stay as they are.

    Args:
        check_client: called at each token; an error that it raises ends the work there.

    Raises:
        AdapterError: the adapter cannot be scaled; OutOfMemoryError: prompt and answer do not fit.
    """
    from training_lens.models.adapter_scale import scaled_adapter

    answers: dict[Side, Sequence[int]] = {}
    if "base" in question.sides:
        answers["base"] = _answer_side(loaded, question, prompt_ids, "base", send, check_client)
    with scaled_adapter(loaded.session.model, question.scale):
        if "adapter" in question.sides:
            answers["adapter"] = _answer_side(loaded, question, prompt_ids, "adapter", send, check_client)
        for side, ids in answers.items():
            check_client()
            send({"side": side, **_score_answer(loaded.session, prompt_ids, ids)})


def _answer_side(
    loaded: LoadedRun,
    question: Question,
    prompt_ids: Sequence[int],
    side: Side,
    send: Send,
    check_client: Callable[[], None],
) -> Sequence[int]:
    """The tokens of one side's answer. At scale 0 the adapter is the base by definition, also where it would round."""
    from training_lens.inference.generator import generate_answer

    is_base = side == "base" or question.scale == 0
    mine, other = SIDES if is_base else SIDES[::-1]
    loaded.sessions[other].decoders.clear_if_large(loaded.session.model)
    start = time.perf_counter()
    given = generate_answer(
        loaded.sessions[mine],
        prompt_ids,
        question.settings,
        base=is_base,
        on_text=lambda text: send({"side": side, "text": text}),
        on_token=lambda _token: check_client(),
    )
    seconds, tokens = time.perf_counter() - start, len(given.token_ids)
    ending = {"tokens": tokens, "seconds": seconds, "finish_reason": given.finish_reason, "text": given.text}
    send({"side": side, "done": True, **ending})
    return given.token_ids


def _score_answer(session: Session, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> dict[str, Any]:
    """Each token's log-probability in nats under the base and the adapter as it is now, and their sums."""
    start = min(CONTEXT_TOKENS, len(prompt_ids))
    ids = [*prompt_ids[len(prompt_ids) - start :], *answer_ids]
    texts = spell_tokens(session.tokenizer, ids, session.encoder.special_ids)[start:]
    base, adapter = measure_log_probabilities(session, prompt_ids, answer_ids)
    scores = [
        {**describe_token(text), "base": of_base, "adapter": of_adapter}
        for text, of_base, of_adapter in zip(texts, base, adapter, strict=True)
    ]
    sums = {"base": sum(base), "adapter": sum(adapter)}
    return {"scores": scores, **sums, "difference": sums["adapter"] - sums["base"]}


def measure_log_probabilities(
    session: Session, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> tuple[list[float], list[float]]:
    """log p of each token of an answer after its prompt, in nats: under the base, and under the adapter.

    Cost: two passes over prompt and answer.
    """
    import torch

    from training_lens.models.model_classes import evaluation_mode
    from training_lens.models.token_scores import paired_scores
    from training_lens.utils.devices import autocast

    if not answer_ids:
        return [], []
    ids = torch.tensor([[*prompt_ids, *answer_ids]], device=session.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, len(prompt_ids) :] = True
    with torch.inference_mode(), evaluation_mode(session.model), autocast(session.device, session.precision):
        scores = paired_scores(session.model, ids, mask)
    return (-scores.base.nll.double()).tolist(), (-scores.adapter.nll.double()).tolist()
