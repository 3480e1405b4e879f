"""One thread that owns the models: it admits rows between decoding steps, and drops those whose client has gone."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from training_lens.serve.api_errors import (
    ApiError,
    internal_error,
    prompt_too_long,
    queue_full,
    shutting_down,
    timed_out,
)
from training_lens.serve.lane import Lane, count_columns
from training_lens.serve.running_request import Piece, RunningRequest, ServedRow
from training_lens.serve.served_models import ServedModels
from training_lens.serve.server_limits import ServerLimits, prefill_tokens
from training_lens.serve.server_metrics import ServerMetrics
from training_lens.utils.devices import keep_freed_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import describe_shortage

logger = get_logger(__name__)
Outbox = list[tuple[RunningRequest, Piece | ApiError]]
SECONDS_TO_STOP = 5.0
LONGEST_RETRY = 60  # seconds


class Scheduler:
    """Answers requests by continuous batching, each on the decoder of its model; first come, first served.

    Args:
        post: runs a function in the event loop that reads the pieces.
    """

    def __init__(
        self,
        models: ServedModels,
        limits: ServerLimits,
        metrics: ServerMetrics,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._limits, self._metrics, self._post = limits, metrics, post
        self._lanes = {id(decoder): Lane(decoder) for decoder in models.decoders}
        self._prefill_tokens = prefill_tokens(models.decoders[0].device)
        self._waiting: deque[ServedRow] = deque()
        self._running: set[RunningRequest] = set()
        self._outbox: Outbox = []
        self._changed = threading.Condition()
        self._drained_at, self._is_stopped = math.inf, False
        self._row_seconds = 1.0  # that an answer takes, a running mean
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self._drained_at == math.inf

    @property
    def outbox(self) -> Outbox:
        """Where rows put their pieces, which are sent after each step."""
        return self._outbox

    def start(self) -> None:
        self._thread.start()

    def submit_request(self, request: RunningRequest) -> None:
        """Queue a request.

        Raises:
            ApiError: the queue is full, one answer does not fit into the cache, or the server is shutting down.
        """
        if (needed := count_columns(request.rows)) > self._limits.cache_tokens:
            raise prompt_too_long(
                f"prompt and answer take {needed} tokens of the KV cache, which has {self._limits.cache_tokens}. "
                "Shorten them."
            )
        with self._changed:
            if not self.is_ready:
                raise shutting_down()
            busy = sum(len(running.rows) for running in self._running)
            if busy and busy + len(request.rows) > self._limits.most_answers:
                raise queue_full(len(self._waiting), self._estimate_wait())
            self._running.add(request)
            self._waiting.extend(request.rows)
            self._changed.notify()

    def cancel_request(self, request: RunningRequest) -> None:
        """Free the rows of a request before the next step."""
        with self._changed:
            request.is_cancelled = True
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests; those in progress have `drain_seconds`. Called by a signal handler."""
        if self._drained_at == math.inf:
            self._drained_at = time.monotonic() + self._limits.drain_seconds

    def stop(self) -> None:
        """End the thread; requests in progress get an error."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join(SECONDS_TO_STOP)

    def _estimate_wait(self) -> int:
        seconds = self._row_seconds * (1 + len(self._waiting) / self._limits.rows)
        return int(min(LONGEST_RETRY, max(1, seconds)))

    def _find_lane(self, row: ServedRow) -> Lane:
        return self._lanes[id(row.request.model.decoder)]

    @keep_freed_memory()
    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait_for_work():
            self._end_requests(lambda request: request.is_cancelled, None)
            self._end_requests(lambda request: request.is_late, timed_out(self._limits.seconds))
            if time.monotonic() > self._drained_at:
                self._end_requests(lambda request: True, shutting_down())
            self._admit_rows()
            for lane in self._lanes.values():
                self._guard(lane.step, lambda lane=lane: lane.rows)  # type: ignore[misc]
                lane.shrink()
            self._report()
        self._end_requests(lambda request: True, shutting_down())
        self._report()

    def _wait_for_work(self) -> bool:
        """Whether to go on; waits while there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._is_stopped)
            return not self._is_stopped

    def _end_requests(self, is_ended: Callable[[RunningRequest], bool], error: ApiError | None) -> None:
        """Free the rows of some requests, and send the error to their clients."""
        with self._changed:
            ended = [request for request in self._running if is_ended(request)]
            if ended:
                self._running.difference_update(ended)
                self._waiting = deque(row for row in self._waiting if row.request not in ended)
        for request in ended:
            for row in request.rows:
                self._find_lane(row).remove_row(row)
            if error:
                self._outbox.append((request, error))

    def _admit_rows(self) -> None:
        """Prefill the rows that waited longest, as many of one decoder as fit."""
        batch = list[ServedRow]()
        with self._changed:
            while self._waiting and self._fits([*batch, self._waiting[0]]):
                batch.append(self._waiting.popleft())
        if batch:
            lane = self._find_lane(batch[0])
            self._guard(lambda: lane.prefill_rows(batch), lambda: batch)

    def _fits(self, batch: Sequence[ServedRow]) -> bool:
        """Whether these rows can be prefilled together now."""
        lane = self._find_lane(batch[0])
        if any(self._find_lane(row) is not lane for row in batch):
            return False
        tokens = len(batch) * max(len(row.prompt) for row in batch)
        if len(batch) > 1 and tokens > self._prefill_tokens:
            return False
        others = [other for other in self._lanes.values() if other is not lane]
        rows = len(batch) + sum(len(some.rows) for some in self._lanes.values())
        cache = lane.count_cache_tokens(batch) + sum(other.cache_tokens for other in others)
        return rows <= self._limits.rows and cache <= self._limits.cache_tokens

    def _guard(self, work: Callable[[], None], concerned: Callable[[], Sequence[object]]) -> None:
        """Run a part of a step; if it fails, only the requests concerned fail."""
        try:
            work()
        except Exception as error:  # what a model or a device raises must not end the server
            lost = {row.request for row in concerned() if isinstance(row, ServedRow)}
            shortage = describe_shortage(error)
            if not shortage:
                logger.exception("%d requests failed", len(lost))
            message = shortage or f"the model failed: {describe_error(error)}"
            self._end_requests(lambda request: request in lost, internal_error(message))

    def _report(self) -> None:
        """Send the pieces of the step, and forget finished requests."""
        sent, now = self._outbox[:], time.monotonic()
        self._outbox.clear()
        for request, piece in sent:
            if isinstance(piece, Piece) and piece.finish_reason:
                self._row_seconds += 0.05 * (now - request.started - self._row_seconds)
                if all(row.finish_reason for row in request.rows):
                    with self._changed:
                        self._running.discard(request)
        lanes = self._lanes.values()
        rows, tokens = sum(len(lane.rows) for lane in lanes), sum(lane.cache_tokens for lane in lanes)
        self._metrics.note_step(rows, len(self._waiting), tokens)
        if sent:
            self._post(lambda: _put_pieces(sent))


def _put_pieces(sent: Outbox) -> None:
    for request, piece in sent:
        request.pieces.put_nowait(piece)
