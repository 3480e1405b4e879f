"""A run's events for a page that follows it: new steps and validations, and that something else changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from training_lens.analysis.page.run_feed import FeedCache
from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import read_status
from training_lens.utils.files import replace_non_finite

TICK, IDLE_TICK = 1.0, 3.0  # seconds between two looks at a run that trains, and at one that does not
MOST_STEPS = 4000  # in one event; a page that was away for longer reads its curves anew
BEAT = ": beat\n\n"  # tells a connection that is gone from one where nothing happens


@dataclass
class RunFollower:
    """What one page has seen of a run: steps up to `step`, and the counts and times of what else may change."""

    run: RunFolder
    feeds: FeedCache
    step: int
    _seen: tuple[Any, ...] | None = None
    _validations: int = 0
    _lens: tuple[float, ...] = field(default=())

    @property
    def is_training(self) -> bool:
        return self._seen is not None and self._seen[0] == "running"

    def read_event(self) -> dict[str, Any] | None:
        """What is new since the last call; None if nothing is."""
        feed = self.feeds.open_feed(self.run)
        steps = feed.steps_after(self.step)
        count = len(steps["step"])
        validations = feed.validations[self._validations :]
        if self._seen is None:  # of a page that has just been read or was away: it drops those that it knows
            validations = [line for line in validations if line["step"] >= self.step]
        state = (read_status(self.run), len(feed.samples), len(feed.findings), _read_time(self.run))
        lens = tuple(path.stat().st_mtime for path in self.run.lens.glob("*/")) if self.run.lens.is_dir() else ()
        is_known = self._seen == state
        event: dict[str, Any] = {"step": feed.last_step, "status": state[0], "lens": lens != self._lens}
        self.step, self._seen, self._validations, self._lens = feed.last_step, state, len(feed.validations), lens
        if count > MOST_STEPS:
            return {**event, "reload": True}
        if count or validations:
            return {**event, "steps": steps, "validations": validations}
        return None if is_known and not event["lens"] else event


def _read_time(run: RunFolder) -> float:
    """When a report was written last."""
    return run.reports.stat().st_mtime if run.reports.is_dir() else 0.0


async def stream_events(run: RunFolder, feeds: FeedCache, since: int) -> AsyncIterator[str]:
    """Server-sent events of a run after step `since`, until it is deleted or the page goes away."""
    follower = RunFollower(run, feeds, since)
    while run.metadata.is_dir():
        try:
            event = await run_in_threadpool(follower.read_event)
        except (OSError, CheckpointError):  # it is being deleted
            event = None
        if event:
            yield f"id: {event['step']}\ndata: {json.dumps(replace_non_finite(event))}\n\n"
        else:
            yield BEAT
        await asyncio.sleep(TICK if follower.is_training else IDLE_TICK)
    yield "event: gone\ndata: {}\n\n"
