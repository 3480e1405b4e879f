"""What a run is connected to outside its folder, and what keeps one failing connection from the others and the run.

The run's folder is the truth, and the queue: it holds all that there is to send, on disk. An integration brings the
outside up to date with it, again and again, remembers how far it came (`Cursor`), and may fail at any time: what is
not sent is in the folder still, and goes out at the next try, at the run's end, or by `training-lens sync`.
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
QUIET_SECONDS = 3.0  # of waiting for the rest at the end, until that is said
TRIES_AT_THE_END = 4  # failures in a row after the run's end until an integration is left for `sync`


class Integration(ABC):
    """Something outside that is brought up to date with a run's folder: a tracker, a hub, a storage.

    All methods are called from one thread, which is not the one that trains.
    """

    name: ClassVar[str]
    """In messages, and of the folder tracking/NAME in the run's folder."""
    in_process: ClassVar[bool] = False
    """Whether it is so light that it may live in a thread of the training process: it writes local files alone."""

    @abstractmethod
    def require(self) -> None:
        """Find out, quickly and without network, whether it can work here.

        Raises:
            IntegrationError: what is missing, and what to do: for one, a package and the command that installs it.
        """

    @abstractmethod
    def deliver(self, ended: bool) -> None:
        """Send what is outstanding. Called again and again; what was sent is not sent twice.

        Args:
            ended: no more will come of this run, for now: what is sent once at the end is due.

        Raises:
            IntegrationError: with `lasting`, where trying again is useless. Everything else that is raised is tried
                again later.
        """

    @abstractmethod
    def outstanding(self) -> str:
        """What is not sent yet, in a few words ('12 lines, the adapter'); empty when nothing. Needs no network."""

    def forget(self) -> None:  # noqa: B027  some ask the outside what it has
        """Forget what was sent, so that everything is sent again."""

    def close(self) -> None:  # noqa: B027  most have nothing to let go
        """Let go of connections and files, whatever happened; called at the end, and by trackers before a new try."""


class Cursor:
    """How far an integration came with a run: values kept in a small JSON file.

    A crash between sending and `save` sends a piece again: integrations deliver at least once, and those that can say
    what they have are asked.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self) -> dict[str, Any]:
        """The values; none where nothing was kept, or the file is broken (then everything is sent again)."""
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
    """How one integration does.

    `unavailable`: it cannot work here; `failing`: its last try failed, it is tried again; `left`: given up for now,
    `sync` sends the rest; `delivered`: all is sent, and the run has ended.
    """

    name: str
    status: Literal["waiting", "working", "unavailable", "failing", "left", "delivered"]
    error: str = ""
    outstanding: str = ""
    failures: int = 0
    retry_after: float | None = None

    @property
    def retry_pause(self) -> float:
        """Seconds until the next try after failures: 1, 2, 4 and so on, or what the service asked for."""
        if not self.failures:
            return 0.0
        return max(min(LONGEST_PAUSE, 2.0 ** (self.failures - 1)), self.retry_after or 0.0)

    @property
    def is_healthy(self) -> bool:
        return self.status in ("waiting", "working", "delivered")


class IntegrationManager:
    """Runs integrations, each in a thread of its own: one that fails or hangs never affects the others, or the run.

    Args:
        integrations: those that are configured.
        folder: the run's tracking folder, for their locks: one process at a time sends for an integration.
        every: seconds between two looks at what is new.
        patience: most seconds to wait for a process that sends the run already, as it was killed and is gone on with.

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
        """Of all, in the order they were given."""
        return tuple(self._states.values())

    def start(self) -> None:
        """Begin to send, in threads that never keep a process alive."""
        for integration in self._integrations:
            thread = threading.Thread(
                target=self._run_integration, args=(integration,), name=integration.name, daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def finish(self, seconds: float) -> tuple[IntegrationState, ...]:
        """The run has ended: send the rest, for at most so many seconds, and stop.

        Returns:
            The states; those that are not `delivered` have something left for `sync`.
        """
        self._ended.set()
        started, told = time.monotonic(), False
        while (waited := time.monotonic() - started) < seconds and any(t.is_alive() for t in self._threads):
            if waited > QUIET_SECONDS and not told:
                busy = [t.name for t in self._threads if t.is_alive()]
                logger.info(
                    "sending what is not sent yet: %s (for %s at most)", ", ".join(busy), format_seconds(seconds)
                )
                told = True
            for thread in self._threads:
                thread.join(0.2 / len(self._threads))
        self._stopped.set()
        for integration, thread in zip(self._integrations, self._threads, strict=True):
            if thread.is_alive():  # it hangs in a call that cannot be ended; the thread dies with the process
                self._give_up(integration, f"no answer within {format_seconds(seconds)}")
        return self.states

    def _run_integration(self, integration: Integration) -> None:
        """The life of one integration's thread."""
        try:
            with lock_integration(self._folder / integration.name, self._patience):
                integration.require()
                self._update_state(integration, status="working")
                for ended in self._wait_for_work(integration):
                    self._try_delivery(integration, ended)
        except IntegrationError as error:
            self._record_unavailable(integration, error)
        except Exception as error:  # a fault of ours, or of a user's class
            self._give_up(integration, describe_error(error))
            logger.debug("in the integration %s", integration.name, exc_info=True)
        finally:
            try:
                integration.close()
            except Exception as error:
                logger.debug("closing %s: %s", integration.name, describe_error(error), exc_info=True)

    def _wait_for_work(self, integration: Integration) -> Iterator[bool]:
        """True once the run has ended, again and again until all is sent or given up; False while it goes on."""
        was_ended = False
        while not self._stopped.is_set():
            ended = self._ended.is_set()
            if ended and not was_ended:
                self._update_state(integration, failures=0)  # the tries at the end are counted by themselves
            yield ended
            state, was_ended = self._states[integration.name], ended
            if state.status in ("left", "delivered"):
                return
            (self._stopped if ended else self._ended).wait(state.retry_pause or self._every)

    def _try_delivery(self, integration: Integration, ended: bool) -> None:
        """One delivery; what it raises becomes the state, and one line when that is news."""
        before = self._states[integration.name]
        try:
            integration.deliver(ended)
        except IntegrationError as error:
            if error.lasting:
                return self._give_up(integration, describe_error(error))
            self._record_failure(integration, error, ended)
        except Exception as error:
            self._record_failure(integration, error, ended)
        else:
            if before.status == "failing":
                logger.info("%s: goes on", integration.name)
            self._update_state(
                integration, status="delivered" if ended else "working", error="", failures=0, outstanding=""
            )
        return None

    def _record_failure(self, integration: Integration, error: Exception, ended: bool) -> None:
        before = self._states[integration.name]
        failures, after = before.failures + 1, getattr(error, "retry_after", None)
        self._update_state(
            integration, status="failing", error=describe_error(error), failures=failures, retry_after=after
        )
        is_news = before.status != "failing"  # the log of a run must not fill up while a service is down
        logger.debug("%s: try %d failed", integration.name, failures, exc_info=error if is_news else None)
        if is_news:
            logger.warning(
                "%s: %s What is not sent is kept, and tried again.",
                integration.name, describe_error(error),
            )  # fmt: skip
        if ended and failures >= TRIES_AT_THE_END:
            self._give_up(integration, describe_error(error))

    def _give_up(self, integration: Integration, why: str) -> None:
        """Given up for now; the run's folder holds what is missing."""
        try:
            rest = integration.outstanding() or "its end"
        except Exception as error:
            rest = f"an unknown rest ({strip_full_stop(describe_error(error))})"
        self._update_state(integration, status="left", error=why, outstanding=rest)
        logger.warning(
            "%s: not sent: %s (%s). It is kept: training-lens sync %s",
            integration.name, rest, strip_full_stop(why), self._folder.parent,
        )  # fmt: skip

    def _record_unavailable(self, integration: Integration, error: IntegrationError) -> None:
        self._update_state(integration, status="unavailable", error=describe_error(error))
        logger.warning(
            "%s: %s The run is not sent there; later: training-lens sync %s",
            integration.name, describe_error(error), self._folder.parent,
        )  # fmt: skip

    def _update_state(self, integration: Integration, **changes: Any) -> None:
        self._states[integration.name] = replace(self._states[integration.name], **changes)


@contextmanager
def lock_integration(folder: Path, patience: float = 1.0) -> Iterator[None]:
    """Within the block this process alone sends for an integration of a run.

    Args:
        folder: the integration's, in the run's tracking folder.
        patience: most seconds to wait for another process to end.

    Raises:
        IntegrationError: another process sends at this moment, or the folder cannot be written.
    """
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
