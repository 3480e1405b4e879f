"""Delivery of a run to trackers, hubs and storage, where one that fails affects neither the others nor the run.

The run's folder is the queue: it holds everything that is to be sent. An integration repeatedly sends what is new,
remembers how far it came (`Cursor`), and may fail at any time: what is not sent stays in the folder and is sent at the
next try, at the run's end, or by `training-lens sync`.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from filelock import FileLock, Timeout

from training_lens.errors import IntegrationError
from training_lens.utils.files import read_json, write_json
from training_lens.utils.formatting import describe_error, format_seconds, strip_full_stop
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LONGEST_PAUSE = 30.0  # seconds between two tries
QUIET_SECONDS = 3.0  # of waiting at the end, until that is logged
TRIES_AT_THE_END = 4  # failures in a row after the run's end, until the rest is left to `sync`


class Integration(ABC):
    """A destination that receives a run: a tracker, a hub, a storage.

    All methods are called from one thread, which is not the training thread.
    """

    name: ClassVar[str]
    """Used in messages and for the folder tracking/NAME of a run."""
    in_process: ClassVar[bool] = False
    """Whether it may run in a thread of the training process, as it only writes local files."""

    @abstractmethod
    def require(self) -> None:
        """Check, quickly and without network, that it can work here.

        Raises:
            IntegrationError: says what is missing and what to do, such as a package and the command to install it.
        """

    @abstractmethod
    def deliver(self, ended: bool) -> None:
        """Send what is outstanding. Called repeatedly; nothing is sent twice.

        Args:
            ended: the run has stopped; also send what is only sent at the end.

        Raises:
            IntegrationError: with `lasting` if trying again is useless; after any other error it is called again.
        """

    @abstractmethod
    def outstanding(self) -> str:
        """What is not sent yet, in a few words ('12 lines, the adapter'), or an empty text. Needs no network."""

    def forget(self) -> None:  # noqa: B027  some ask the service what it has
        """Forget what was sent: everything is sent again."""

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Close connections and files. Called at the end, and by trackers before a new try."""


class Cursor:
    """How far an integration came with a run, in a small JSON file.

    After a crash between sending and `save`, a piece is sent again: delivery is at least once, and services that can
    tell what they have are asked first.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self) -> dict[str, Any]:
        """The values; empty if there are none, or the file is broken (then everything is sent again)."""
        try:
            values = read_json(self.path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            logger.warning("%s is no valid JSON (%s): everything is sent again", self.path, error)
            return {}
        return values if isinstance(values, dict) else {}

    def save(self, values: Mapping[str, Any]) -> None:
        if json.dumps(values) != json.dumps(self.load()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, dict(values))


@dataclass(frozen=True)
class IntegrationState:
    """The state of one integration.

    `unavailable`: it cannot work here; `failing`: its last try failed, and it is tried again; `left`: given up, `sync`
    sends the rest; `delivered`: the run has ended and everything is sent.
    """

    name: str
    status: Literal["waiting", "working", "unavailable", "failing", "left", "delivered"]
    error: str = ""
    outstanding: str = ""
    failures: int = 0
    retry_after: float | None = None

    @property
    def retry_pause(self) -> float:
        """Seconds until the next try after failures: 1, 2, 4 and so on, or what the service asks for, if longer."""
        if not self.failures:
            return 0.0
        return max(min(LONGEST_PAUSE, 2.0 ** (self.failures - 1)), self.retry_after or 0.0)


class IntegrationManager:
    """Runs integrations, each in a thread of its own: one that fails or hangs affects neither the others nor the run.

    Args:
        integrations: those that are configured.
        folder: the run's tracking folder, for the locks: one process at a time sends for an integration.
        every: seconds between two deliveries.
        patience: most seconds to wait for another process that is still sending the run, as after a kill and resume.

    Example:
        manager = IntegrationManager([...], run.tracking)
        manager.start()
        ...                                   # the run writes its folder
        states = manager.finish(seconds=60)
    """

    def __init__(
        self, integrations: Sequence[Integration], folder: Path | str, every: float = 2.0, patience: float = 1.0
    ) -> None:
        self._integrations, self._folder = tuple(integrations), Path(folder)
        self._every, self._patience = every, patience
        self._states = {i.name: IntegrationState(i.name, "waiting") for i in integrations}
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def states(self) -> tuple[IntegrationState, ...]:
        """Of all integrations, in the given order."""
        return tuple(self._states.values())

    def start(self) -> None:
        """Start sending, in daemon threads."""
        for integration in self._integrations:
            thread = threading.Thread(
                target=self._run_integration, args=(integration,), name=integration.name, daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def finish(self, seconds: float) -> tuple[IntegrationState, ...]:
        """Send the rest of a run that has ended, for at most so many seconds, and stop.

        Returns:
            The states; those that are not `delivered` leave something to `sync`.
        """
        self._ended.set()
        started, is_logged = time.monotonic(), False
        while (waited := time.monotonic() - started) < seconds and any(t.is_alive() for t in self._threads):
            if waited > QUIET_SECONDS and not is_logged:
                busy = [t.name for t in self._threads if t.is_alive()]
                logger.info(
                    "sending what is not sent yet: %s (for %s at most)", ", ".join(busy), format_seconds(seconds)
                )
                is_logged = True
            for thread in self._threads:
                thread.join(0.2 / len(self._threads))
        self._stopped.set()
        for integration, thread in zip(self._integrations, self._threads, strict=True):
            if thread.is_alive():  # it hangs in a call that cannot be stopped; the daemon thread dies with the process
                self._give_up(integration, f"no answer within {format_seconds(seconds)}")
        return self.states

    def _run_integration(self, integration: Integration) -> None:
        """Runs in the integration's thread: delivers until everything is sent or given up."""
        try:
            with lock_integration(self._folder / integration.name, self._patience):
                integration.require()
                self._update_state(integration, status="working")
                for ended in self._wait_for_work(integration):
                    self._try_delivery(integration, ended)
        except IntegrationError as error:
            why = describe_error(error)
            self._update_state(integration, status="unavailable", error=why)
            logger.warning(
                "%s: %s The run is not sent there; later: training-lens sync %s",
                integration.name, why, self._folder.parent,
            )  # fmt: skip
        except Exception as error:  # a bug of ours, or of a user's class
            self._give_up(integration, describe_error(error))
            logger.debug("in the integration %s", integration.name, exc_info=True)
        finally:
            try:
                integration.close()
            except Exception as error:
                logger.debug("closing %s: %s", integration.name, describe_error(error), exc_info=True)

    def _wait_for_work(self, integration: Integration) -> Iterator[bool]:
        """Yields once per delivery: False while the run trains, True after its end, until all is sent or given up."""
        was_ended = False
        while not self._stopped.is_set():
            ended = self._ended.is_set()
            if ended and not was_ended:
                self._update_state(integration, failures=0)  # tries after the end are counted anew
            yield ended
            state, was_ended = self._states[integration.name], ended
            if state.status in ("left", "delivered"):
                return
            (self._stopped if ended else self._ended).wait(state.retry_pause or self._every)

    def _try_delivery(self, integration: Integration, ended: bool) -> None:
        """One delivery. An error becomes the state, and is logged once."""
        before = self._states[integration.name]
        try:
            integration.deliver(ended)
        except Exception as error:
            why, failures = describe_error(error), before.failures + 1
            if isinstance(error, IntegrationError) and error.lasting:
                self._give_up(integration, why)
                return
            after = getattr(error, "retry_after", None)
            self._update_state(integration, status="failing", error=why, failures=failures, retry_after=after)
            is_news = before.status != "failing"  # a service that is down must not fill the log
            logger.debug("%s: try %d failed", integration.name, failures, exc_info=error if is_news else None)
            if is_news:
                logger.warning("%s: %s What is not sent is kept and tried again.", integration.name, why)
            if ended and failures >= TRIES_AT_THE_END:
                self._give_up(integration, why)
        else:
            if before.status == "failing":
                logger.info("%s: works again", integration.name)
            status = "delivered" if ended else "working"
            self._update_state(integration, status=status, error="", failures=0, outstanding="")

    def _give_up(self, integration: Integration, why: str) -> None:
        """Leave the rest to `sync`; the run's folder still holds it."""
        try:
            rest = integration.outstanding() or "its end"
        except Exception as error:
            rest = f"an unknown rest ({strip_full_stop(describe_error(error))})"
        self._update_state(integration, status="left", error=why, outstanding=rest)
        logger.warning(
            "%s: not sent: %s (%s). It is kept: training-lens sync %s",
            integration.name, rest, strip_full_stop(why), self._folder.parent,
        )  # fmt: skip

    def _update_state(self, integration: Integration, **changes: Any) -> None:
        self._states[integration.name] = replace(self._states[integration.name], **changes)


@contextmanager
def lock_integration(folder: Path, patience: float = 1.0) -> Iterator[None]:
    """Within the block, no other process sends for the integration of this folder; refused after `patience` seconds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=patience)
        lock.acquire(poll_interval=0.2)
    except Timeout:
        raise IntegrationError("another process is sending this run at the moment.") from None
    except OSError as error:
        raise IntegrationError(f"{folder} cannot be written ({error.strerror}).") from error
    try:
        yield
    finally:
        lock.release()
