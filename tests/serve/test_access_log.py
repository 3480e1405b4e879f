"""The log says of every request how it ended."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from training_lens.serve.access_log import AccessLog
from training_lens.serve.server_metrics import ServerMetrics


async def fail(request: Request) -> Response:
    raise RuntimeError("a fault of ours")


@pytest.mark.parametrize(("path", "status"), [("/fail", 500), ("/nowhere", 404)])
def test_a_fault_of_the_server_is_not_logged_as_a_client_that_hung_up(path: str, status: int) -> None:
    lines: list[str] = []
    log = Middleware(AccessLog, metrics=ServerMetrics(), write_line=lines.append)
    app = Starlette(routes=[Route("/fail", fail)], middleware=[log])
    assert TestClient(app, raise_server_exceptions=False).get(path).status_code == status
    assert json.loads(lines[0])["status"] == status
    assert json.loads(lines[0])["outcome"] != "cancelled"
