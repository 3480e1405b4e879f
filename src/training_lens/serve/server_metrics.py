"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """The counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "training_lens_requests", "Finished requests.", ["model", "path", "status"], registry=self._registry
        )
        self._cancelled = Counter(
            "training_lens_cancelled_requests", "Requests whose client hung up.", registry=self._registry
        )
        self._prompt_tokens = self._count_by_model("training_lens_prompt_tokens", "Tokens of prompts.")
        self._answer_tokens = self._count_by_model("training_lens_answer_tokens", "Tokens of answers.")
        self._seconds = self._time_by_model("training_lens_request_seconds", "From a request to its end.")
        self._first = self._time_by_model("training_lens_first_token_seconds", "From a request to its first token.")
        self._steps = Counter("training_lens_steps", "Decoding steps.", registry=self._registry)
        self._rows = Gauge("training_lens_rows", "Answers that are decoded.", registry=self._registry)
        self._waiting = Gauge("training_lens_waiting_rows", "Answers that wait.", registry=self._registry)
        self._cache = Gauge("training_lens_cache_tokens", "Tokens that the KV cache holds.", registry=self._registry)

    def _count_by_model(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model"], registry=self._registry)

    def _time_by_model(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], buckets=SECONDS, registry=self._registry)

    def note_step(self, rows: int, waiting: int, cache_tokens: int) -> None:
        self._steps.inc()
        self._rows.set(rows)
        self._waiting.set(waiting)
        self._cache.set(cache_tokens)

    def note_answer(self, model: str, prompt_tokens: int, answer_tokens: int, first_seconds: float | None) -> None:
        """Count what a request took, also of one whose client hung up."""
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._answer_tokens.labels(model).inc(answer_tokens)
        if first_seconds is not None:
            self._first.labels(model).observe(first_seconds)

    def note_request(self, model: str, path: str, status: int, seconds: float) -> None:
        """Count a finished request; `model` is empty if it named none of the models."""
        self._requests.labels(model, path, str(status)).inc()
        if model:
            self._seconds.labels(model).observe(seconds)

    def note_cancelled(self) -> None:
        self._cancelled.inc()

    def write_page(self) -> bytes:
        return generate_latest(self._registry)
