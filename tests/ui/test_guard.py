"""Requests of hostile kinds are refused, or change nothing and keep nobody else waiting."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from training_lens.ui.app import build_app
from training_lens.ui.guard import LONGEST_BODY, Access, Guard
from training_lens.ui.web import ERROR_HANDLERS, Outputs

HOST = {"host": "127.0.0.1:8000"}
JSON = {"content-type": "application/json"}


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """One folder that looks like a run, with a secret beside all runs."""
    run = tmp_path / "outputs/experiments/default/runs/one"
    for name in ("metadata", "reports", "logs"):
        (run / name).mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("hidden")
    (run / "reports/link.txt").symlink_to(tmp_path / "secret.txt")
    (run / "reports/page.html").write_text("<script>fetch('/api/launch/start', {method: 'POST'})</script>")
    return tmp_path / "outputs"


@pytest.fixture
def client(outputs: Path) -> TestClient:
    return TestClient(build_app(Outputs(outputs), Access(8000)), base_url="http://127.0.0.1:8000")


@pytest.fixture
def started() -> tuple[TestClient, list[dict[str, Any]]]:
    """A guarded action, and the bodies with which it was called."""
    calls: list[dict[str, Any]] = []

    async def act(request: Request) -> JSONResponse:
        calls.append(await request.json())
        return JSONResponse({})

    guard = Middleware(Guard, access=Access(8000))
    app = Starlette(
        routes=[Route("/act", act, methods=["POST"])],
        middleware=[guard],
        exception_handlers=ERROR_HANDLERS,  # type: ignore[arg-type]
    )
    return TestClient(app, base_url="http://127.0.0.1:8000"), calls


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/%2e%2e/py.typed",
        "/api/runs/../../secret.txt",
        "/api/runs/..%2f..%2f/one",
        "/api/runs/default/%2e%2e%2fone",
        "/api/runs/default/one/files/../../../../../../secret.txt",
        "/api/runs/default/one/files/reports/..%2f..%2f..%2f..%2f..%2f..%2fsecret.txt",
        "/api/runs/default/one/files/reports/link.txt",
        "/api/runs/default/one/files//etc/passwd",
        "/api/runs/default/one%00/files/reports/page.html",
    ],
)
def test_no_path_leads_out_of_what_is_shown(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code in (400, 404) and "hidden" not in response.text and "root:" not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example", **JSON},
        {"origin": "null", **JSON},
        {"sec-fetch-site": "cross-site", **JSON},
        {"sec-fetch-site": "same-site", **JSON},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {},
    ],
)
def test_no_page_of_another_site_starts_anything(
    started: tuple[TestClient, list[dict[str, Any]]], headers: dict[str, str]
) -> None:
    client, calls = started
    assert client.post("/act", content=b"{}", headers=headers).status_code == 403
    assert client.post("/act", content=b"{}", headers={"origin": "http://127.0.0.1:8000", **JSON}).status_code == 200
    assert client.post("/act", content=b"{}", headers=JSON).status_code == 200  # a program
    assert calls == [{}, {}]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "localhost", ""])
def test_a_name_that_was_made_to_point_here_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/about", headers={"host": host}).status_code == 421
    assert client.get("/api/about", headers={"host": "localhost:8000"}).status_code == 200


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(
    started: tuple[TestClient, list[dict[str, Any]]],
) -> None:
    client, calls = started

    def pieces() -> Iterator[bytes]:
        for _ in range(LONGEST_BODY // 65536 + 2):
            yield b" " * 65536

    assert client.post("/act", content=b" " * (LONGEST_BODY + 1), headers=JSON).status_code == 413
    assert client.post("/act", content=pieces(), headers=JSON).status_code == 413
    assert client.post("/act", content=b"{}", headers={**JSON, "content-length": "9" * 30}).status_code == 413
    assert not calls


def test_what_is_no_json_object_or_nests_too_deep_is_refused(outputs: Path) -> None:
    from training_lens.ui.web import read_body

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(await read_body(request))

    app = Starlette(routes=[Route("/", echo, methods=["POST"])], exception_handlers=ERROR_HANDLERS)  # type: ignore[arg-type]
    client = TestClient(app)
    for body in (b"[]", b"{", b"\xff", b'{"a":' * 5000 + b"1" + b"}" * 5000, b""):
        response = client.post("/", content=body)
        assert response.status_code == 400 and response.json()["error"]


@pytest.mark.parametrize("query", ["since=-1", "since=1e9", "since=" + "9" * 40, "since=%00"])
def test_a_number_of_an_address_is_a_whole_number(client: TestClient, query: str) -> None:
    assert client.get(f"/api/runs?{query}").status_code == 400
    assert client.get("/" + "a" * 9000).status_code == 414


def test_every_answer_forbids_what_a_page_does_not_need(client: TestClient) -> None:
    for path in ("/", "/api/about", "/static/app.js", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_a_page_of_a_run_has_no_part_in_the_dashboard(client: TestClient) -> None:
    """Its script runs as of nowhere: its requests carry the origin `null`, and are refused."""
    response = client.get("/api/runs/default/one/files/reports/page.html")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
    assert "default-src 'none'" in policy and "connect-src" not in policy


def test_beyond_this_machine_a_token_is_needed(outputs: Path) -> None:
    client = TestClient(build_app(Outputs(outputs), Access(8000, "right")), base_url="http://machine:8000")
    assert client.get("/api/about").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/api/about", headers={"authorization": "Bearer right"}).status_code == 200
    entered = client.get("/?token=right&x=1", follow_redirects=False)
    assert entered.status_code == 303 and entered.headers["location"] == "/?x=1"
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/api/about").status_code == 200
    elsewhere = client.get("//evil.example/?token=right", follow_redirects=False).headers.get("location", "/")
    assert elsewhere.startswith("/") and not elsewhere.startswith("//")
    refused = client.post("/api/about", content=b"{}", headers={"origin": "http://evil.example", **JSON})
    assert refused.status_code == 403


def test_slow_and_many_clients_keep_nobody_waiting(outputs: Path, start_dashboard: Callable[..., Any]) -> None:
    dashboard = start_dashboard(outputs)
    request = f"GET /api/about HTTP/1.1\r\nHost: 127.0.0.1:{dashboard.port}\r\n"
    sockets = [socket.create_connection(("127.0.0.1", dashboard.port)) for _ in range(200)]
    for i, one in enumerate(sockets):  # some say nothing, some begin a request and never end it
        if i % 2:
            one.sendall(request.encode()[: 10 + i % 40])
    assert httpx.get(f"{dashboard.url}/api/about", timeout=5).status_code == 200
    for one in sockets:
        one.close()
    garbage = socket.create_connection(("127.0.0.1", dashboard.port))
    garbage.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
    garbage.close()
    assert httpx.get(f"{dashboard.url}/api/about", timeout=5).status_code == 200
    assert dashboard.stop() in (0, 130)


def test_an_address_that_is_taken_and_a_folder_that_is_not_there_are_said(
    outputs: Path, start_dashboard: Callable[..., Any], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from training_lens.cli import cli

    dashboard = start_dashboard(outputs)
    taken = CliRunner().invoke(cli, ["ui", str(outputs), "--port", str(dashboard.port)])
    assert taken.exit_code == 2 and "Give another --port" in " ".join(taken.stderr.split())
    missing = CliRunner().invoke(cli, ["ui", str(tmp_path / "output")])
    assert missing.exit_code == 2 and "no folder" in missing.stderr


def test_the_server_starts_without_torch() -> None:
    """A page of the list and of a run that trains needs none, so the server is there in a second."""
    code = "import sys, training_lens.ui.server; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
