"""What a server refuses, and how it ends."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from api_server import Server

from training_lens.errors import ConfigurationError
from training_lens.serve.access_key import KEY_VARIABLE, check_access, read_key

KEY = "sk-a-key"
LONG = {"model": "lora", "prompt": "the cat", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server]) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        started = start_server("lora", "--rows", "1", "--queue", "1", "--timeout", "0.8")
    started.http.headers["authorization"] = f"Bearer {KEY}"
    yield started


class Reader(threading.Thread):
    """Reads a stream in the background; `events` are its JSON objects."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self.is_done = False
        self._server, self._body = server, body | {"stream": True}
        self.start()

    def run(self) -> None:
        with self._server.http.stream("POST", "/v1/completions", json=self._body) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))
                self.is_done = self.is_done or line == "data: [DONE]"

    def wait_for_first(self) -> None:
        until = time.monotonic() + 20
        while not self.events and time.monotonic() < until:
            time.sleep(0.01)
        assert self.events


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"])
def test_a_wrong_key_is_refused_everywhere_but_for_health(server: Server, given: str) -> None:
    headers = {b"authorization": given.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        answer = httpx.get(f"{server.url}{path}", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_the_right_key_is_taken_and_not_logged(server: Server) -> None:
    assert server.client(KEY).models.list().data[0].id == "lora"
    assert KEY not in (server.folder / "stderr.txt").read_text()


def test_a_full_queue_is_429_and_a_late_answer_ends(server: Server) -> None:
    first = Reader(server, LONG)
    first.wait_for_first()
    second = Reader(server, LONG)
    time.sleep(0.1)
    refused = server.http.post("/v1/completions", json=LONG)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    first.join(20)
    second.join(20)
    assert first.is_done and first.events[-1]["error"]["code"] == "request_timeout"
    late = server.http.post("/v1/completions", json=LONG | {"n": 2})
    assert late.status_code == 504 and late.json()["error"]["code"] == "request_timeout"
    assert server.http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_at_sigterm_what_is_under_way_is_finished(start_server: Callable[..., Server]) -> None:
    server = start_server("lora")
    reader = Reader(server, LONG | {"max_tokens": 600})
    reader.wait_for_first()
    server.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/ready")
    reader.join(30)
    assert reader.is_done and reader.events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.wait() == -signal.SIGTERM


def test_at_its_deadline_the_rest_is_told(start_server: Callable[..., Server]) -> None:
    server = start_server("lora", "--drain", "0.3")
    reader = Reader(server, LONG)
    reader.wait_for_first()
    started = time.monotonic()
    server.send_signal(signal.SIGINT)
    reader.join(20)
    assert reader.is_done and reader.events[-1]["error"]["code"] == "shutting_down"
    assert server.wait() == 130 and time.monotonic() - started < 10


def test_an_address_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigurationError, match=KEY_VARIABLE):
            check_access(host, None)
        check_access(host, KEY)
    check_access("127.0.0.1", None)
    for key in ("", " ", "two\nlines", "\u20ac"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(ConfigurationError, match="HTTP header"):
            read_key()
