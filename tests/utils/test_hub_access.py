"""A hub that answers, in whatever way, is there; one that does not is said at once, as the error asked for."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from training_lens.errors import DatasetError
from training_lens.utils.hub_access import require_hub


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_hub_that_answers_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        require_hub("data.train: 'x'", DatasetError)
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_that_does_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match=r"data\.train: 'x' is no local path, and the hub .* cannot be reached"):
        require_hub("data.train: 'x'", DatasetError)


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub("data.train: 'x'", DatasetError)
