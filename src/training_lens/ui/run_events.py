"""A run's events for a page that follows it: new steps and validations, and that something else changed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from training_lens.analysis.page.run_feed import FeedCache, RunFeed
from training_lens.analysis.page.run_page import describe_progress, read_config
from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import read_status
from training_lens.utils.files import replace_non_finite

FIRST_TICK, TICK = 2.0, 5.0  # seconds between two looks at a run: the shorter at first, while somebody surely watches
FIRST_TICKS = 60
MOST_STEPS = 4000  # in one event; a page that was away for longer reads its curves anew
BEAT = ": beat\n\n"  # tells a connection that is gone from one where nothing happens


@dataclass
class RunFollower:
    """What one page has seen of a run: steps up to `step`, and the counts and times of what else may change."""

    run: RunFolder
    feeds: FeedCache
    step: int
    _config: Mapping[str, Any] = field(default_factory=dict)
    _page: tuple[Any, ...] = ()
    _lens: tuple[float, ...] = ()
    _progress: Mapping[str, Any] = field(default_factory=dict)
    _validations: int = 0
    _has_read: bool = False

    def read_event(self) -> dict[str, Any] | None:
        """What is new since the last call; None if nothing is.

        `steps` and `validations` are new lines of the log, `progress` is that of the page. `page` says that something
        else of the page changed, `lens` that captures were written, `reload` that curves must be read anew.
        """
        feed = self.feeds.open_feed(self.run)
        steps, event = feed.steps_after(self.step), self._read_changes(feed)
        validations = feed.validations[self._validations :]
        if not self._has_read:  # of a page that has just been read or was away: it drops those that it knows
            validations = [line for line in validations if line["step"] >= self.step]
        self.step, self._validations, self._has_read = feed.last_step, len(feed.validations), True
        if len(steps["step"]) > MOST_STEPS:
            return {**event, "reload": True}
        if steps["step"] or validations:
            return {**event, "steps": steps, "validations": validations}
        return event if event["page"] or event["lens"] or "progress" in event else None

    def _read_changes(self, feed: RunFeed) -> dict[str, Any]:
        """The parts of an event besides new lines."""
        self._config = self._config or read_config(self.run)
        status, progress = read_status(self.run), describe_progress(self.run, feed, self._config)
        counts = (len(feed.samples), len(feed.findings), len(feed.validations))
        page = (status, *counts, _read_time(self.run.reports))
        lens = _list_times(self.run.lens)
        event = {"step": feed.last_step, "status": status, "page": page != self._page, "lens": lens != self._lens}
        if progress != self._progress:
            event["progress"] = progress
        self._page, self._lens, self._progress = page, lens, progress
        return event


def _read_time(path: Path) -> float:
    """When a folder was changed last; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _list_times(folder: Path) -> tuple[float, ...]:
    """When each of the folders inside was changed last."""
    try:
        with os.scandir(folder) as entries:
            return tuple(entry.stat().st_mtime for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return ()


async def stream_events(run: RunFolder, feeds: FeedCache, since: int) -> AsyncIterator[str]:
    """Server-sent events of a run after step `since`, until it is deleted or the page goes away."""
    follower, ticks = RunFollower(run, feeds, since), 0
    while run.metadata.is_dir():
        try:
            event = await run_in_threadpool(follower.read_event)
        except (OSError, CheckpointError):  # it is being deleted
            event = None
        if event:
            yield f"id: {event['step']}\ndata: {json.dumps(replace_non_finite(event))}\n\n"
        else:
            yield BEAT
        ticks += 1
        await asyncio.sleep(FIRST_TICK if ticks < FIRST_TICKS else TICK)
    yield "event: gone\ndata: {}\n\n"
