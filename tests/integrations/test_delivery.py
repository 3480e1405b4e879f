"""One integration that fails, hangs or cannot work affects neither the others nor who runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import until

from training_lens.errors import IntegrationError
from training_lens.integrations.delivery import Cursor, Integration, IntegrationManager


class Doing(Integration):
    """Does what it is told at each delivery, and counts."""

    name = "doing"

    def __init__(self, name: str, act: Callable[[int, bool], None], missing: str = "") -> None:
        self.name = name  # type: ignore[misc]
        self.act, self.missing, self.calls, self.closed = act, missing, 0, False

    def require(self) -> None:
        if self.missing:
            raise IntegrationError(self.missing)

    def deliver(self, ended: bool) -> None:
        self.calls += 1
        self.act(self.calls, ended)

    def outstanding(self) -> str:
        return "a line"

    def close(self) -> None:
        self.closed = True


def fail(_call: int, _ended: bool) -> None:
    raise OSError("no route to host")


def statuses(manager: IntegrationManager) -> dict[str, str]:
    return {state.name: state.status for state in manager.states}


def test_one_failing_never_affects_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.integrations.delivery.LONGEST_PAUSE", 0.01)
    forever = threading.Event()
    hangs = Doing("hangs", lambda _call, _ended: [None, forever.wait()][0])
    fails, missing, works = Doing("fails", fail), Doing("missing", fail, "no package."), Doing("works", lambda *_: None)
    manager = IntegrationManager([hangs, fails, missing, works], tmp_path, every=0.01)
    manager.start()
    until(lambda: works.calls > 5, "it waits for the one that hangs")
    threading.Thread(target=manager.finish, args=(60.0,)).start()
    until(lambda: statuses(manager)["fails"] == "left" and statuses(manager)["works"] == "delivered", "no end")
    states = {state.name: state for state in manager.finish(seconds=0.0)}
    forever.set()
    assert {name: state.status for name, state in states.items()} == {
        "hangs": "left", "fails": "left", "missing": "unavailable", "works": "delivered",
    }  # fmt: skip
    until(lambda: works.closed and fails.closed and missing.closed, "not closed")
    assert "no route to host" in states["fails"].error and states["fails"].outstanding == "a line"


def test_what_fails_is_tried_again_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.integrations.delivery.LONGEST_PAUSE", 0.01)

    def twice(call: int, _ended: bool) -> None:
        if call <= 2:
            raise ConnectionError("refused")

    flaky = Doing("flaky", twice)
    manager = IntegrationManager([flaky], tmp_path, every=0.01)
    manager.start()
    until(lambda: statuses(manager) == {"flaky": "working"} and flaky.calls > 2, "not tried again")
    assert [s.status for s in manager.finish(60.0)] == ["delivered"]


def test_what_is_useless_to_try_again_is_left_at_once(tmp_path: Path) -> None:
    def refuse(_call: int, _ended: bool) -> None:
        raise IntegrationError("401: not logged in", lasting=True)

    refused = Doing("refused", refuse)
    manager = IntegrationManager([refused], tmp_path, every=0.01)
    manager.start()
    until(lambda: refused.closed, "it is tried again")
    assert statuses(manager) == {"refused": "left"} and refused.calls == 1


def test_the_end_wakes_a_pause_and_is_tried_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "training_lens")
    dead = Doing("dead", fail)
    manager = IntegrationManager([dead], tmp_path, every=60.0)
    manager.start()
    until(lambda: statuses(manager) == {"dead": "failing"}, "not tried")
    monkeypatch.setattr("training_lens.integrations.delivery.LONGEST_PAUSE", 0.05)  # from the next pause on
    states = manager.finish(60.0)
    assert [s.status for s in states] == ["left"]
    assert dead.calls == 1 + 4
    assert [bool(record.exc_info) for record in caplog.records if "failed" in record.message] == [True] + 4 * [False]


def test_two_processes_do_not_send_for_one_integration_at_once(tmp_path: Path) -> None:
    first, second = (IntegrationManager([Doing("one", lambda *_: None)], tmp_path, 0.01, 0.1) for _ in range(2))
    first.start()
    until(lambda: statuses(first) == {"one": "working"}, "not begun")
    second.start()
    until(lambda: statuses(second) == {"one": "unavailable"}, "both send")
    assert "another process" in second.states[0].error
    assert [s.status for s in first.finish(60.0)] == ["delivered"]


def test_who_is_patient_sends_when_the_other_process_has_ended(tmp_path: Path) -> None:
    first, second = (
        IntegrationManager([Doing("one", lambda *_: None)], tmp_path, 0.01, patience) for patience in (1.0, 90.0)
    )
    first.start()
    until(lambda: statuses(first) == {"one": "working"}, "not begun")
    second.start()
    assert statuses(second) == {"one": "waiting"}
    assert [s.status for s in first.finish(60.0)] == ["delivered"]
    assert [s.status for s in second.finish(60.0)] == ["delivered"]


def test_a_service_that_names_a_pause_gets_it(tmp_path: Path) -> None:
    def throttled(call: int, _ended: bool) -> None:
        if call == 1:
            raise IntegrationError("429", retry_after=0.5)

    asked = Doing("asked", throttled)
    manager = IntegrationManager([asked], tmp_path, every=0.01)
    manager.start()
    until(lambda: statuses(manager) == {"asked": "failing"}, "not asked")
    assert manager.states[0].retry_pause == 1.0  # never under the own pause
    assert replace(manager.states[0], retry_after=120.0).retry_pause == 120.0  # nor under what is asked for
    assert [s.status for s in manager.finish(60.0)] == ["delivered"]


def test_a_cursor_that_is_broken_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cursor = Cursor(tmp_path / "there" / "cursor.json")
    assert cursor.load() == {}
    cursor.save({"step": 3})
    assert cursor.load() == {"step": 3}
    cursor.path.write_text("{")
    assert cursor.load() == {} and "sent again" in caplog.text
