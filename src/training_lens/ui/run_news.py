"""What happened to a run between two readings, as lines for a log: statuses, validations, findings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from training_lens.ui.run_state import RunState, Validation
from training_lens.ui.terminal_sections import show_foreign
from training_lens.utils.formatting import format_seconds

LONGEST_TEXT = 1000  # characters; the rest of a longer text is cut


def list_news(before: RunState | None, now: RunState) -> list[str]:
    """The lines, in the order of what they tell, each with its time in UTC.

    Args:
        before: None at the first reading, which tells where the run is instead of all that happened.
    """
    if before is None:
        findings = [*map(_describe_finding, now.findings or ())]
        return [_date_line(time.time(), _describe_start(now)), *findings, *_describe_end(now)]
    base = before.base is None and now.base is not None
    lines = [_date_line(time.time(), f"the base's validation loss is {now.base:.4f}")] if base else []
    dated = [(each.time, _describe_validation(each)) for each in now.validations[len(before.validations) :]]
    dated += [(_read_time(line), _describe_finding(line)) for line in now.events[len(before.events) :]]
    lines += [line for _, line in sorted(dated, key=lambda pair: pair[0])]
    if before.status != now.status:
        place = 0 if not now.is_over else len(lines)  # it trains before it is validated, and ends after it
        lines.insert(place, _date_line(time.time(), f"{now.status}, {_describe_step(now)}"))
        lines += _describe_end(now)
    return lines


def _date_line(seconds: float, text: str) -> str:
    known = seconds if math.isfinite(seconds) else time.time()
    return f"{datetime.fromtimestamp(known, UTC):%Y-%m-%dT%H:%M:%SZ} {text}"


def _read_time(line: Mapping[str, Any]) -> float:
    value = line.get("time")
    return float(value) if isinstance(value, int | float) else math.nan


def _describe_start(state: RunState) -> str:
    """The run, its status, and how far it is: with its last validation, if there was one."""
    where = f" of experiment {state.experiment}" if state.experiment else ""
    parts = [f"run {state.run_id}{where}: {state.status}, {_describe_step(state)}"]
    if state.base is not None:
        parts.append(f"the base's validation loss is {state.base:.4f}")
    if state.validations:
        last = state.validations[-1]
        parts.append(f"its own {last.loss:.4f} at step {last.step:,}")
    return show_foreign("; ".join(parts), LONGEST_TEXT)


def _describe_step(state: RunState) -> str:
    step, total = state.progress.get("step", 0), state.progress.get("total_steps")
    left = state.progress.get("remaining_seconds")
    eta = f", {format_seconds(left)} left" if left is not None and not state.is_over else ""
    return f"step {step:,} of {total:,}{eta}" if total else f"step {step:,}"


def _describe_validation(each: Validation) -> str:
    rows = "" if each.rows is None else f" on {each.rows} rows"
    change = "" if each.change is None else f", {each.change:+.4f} to the base"
    return _date_line(each.time, f"step {each.step:,}: validation loss {each.loss:.4f}{rows}{change}")


def _describe_finding(line: Mapping[str, Any]) -> str:
    """A finding that arose, with what was measured and what to do; or one that cleared."""
    title = str(line.get("title"))
    if line.get("event") == "raised":
        parts = [f"{line.get('severity')}: {title}", line.get("measured"), line.get("action")]
        text = " ".join(f"{str(part).rstrip('.')}." for part in parts if part)
    else:
        text = f"cleared: {title}."
    return _date_line(_read_time(line), show_foreign(f"step {line['step']}: {text}", LONGEST_TEXT))


def _describe_end(state: RunState) -> Iterator[str]:
    """Why the run ended, if that is known, and the verdict; nothing of a run that trains."""
    if state.is_over:
        yield from (
            _date_line(time.time(), show_foreign(each, LONGEST_TEXT)) for each in (state.detail, state.headline) if each
        )
