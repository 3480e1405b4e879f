"""Numbers, names and errors as text for people."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from training_lens.utils.secrets import redact_text

BLOCKS = "▁▂▃▄▅▆▇█"
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROL_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # of C1's there are no pictures
CONTROL_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # they reorder what follows


def format_size(size_bytes: float) -> str:
    """Bytes with a decimal unit: `format_size(4_457_520)` is '4.5 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def pluralize(count: int, noun: str) -> str:
    """A number of things: '1 row', '1,200 rows'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_count(count: float) -> str:
    """A count in three digits: `format_count(2_226_240)` is '2.23 M'."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B"


def format_seconds(seconds: float) -> str:
    """A duration: '0.4 s', '42 s', '3 min 12 s', '2 h 05 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def cut_text(text: str, most: int) -> str:
    """A text of at most so many characters, the last of which is … where some are left out."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def format_share(share: float | None) -> str:
    """A share in percent: '12.5%'; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"


def format_interval(interval: tuple[float, float] | None, form: str = "{:+.4f}") -> str:
    """Both ends of an interval: `-0.0210 to +0.0032`; a dash where there is none."""
    return "-" if interval is None else " to ".join(form.format(end) for end in interval)


def render_sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values as one line of blocks, from ▁ (lowest) to █ (highest). Over `width` values are averaged in equal parts.

    Values that are not finite are skipped.

    Example:
        >>> render_sparkline([3.0, 2.0, 1.0, 1.0, 1.0])
        '█▅▁▁▁'
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(len(values), width)
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    means = [statistics.fmean(values[start:end]) for start, end in pairwise(edges)]
    low, span = (min(means), max(means) - min(means)) if means else (0.0, 0.0)
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)


def list_names(names: Iterable[object], most: int = 40) -> str:
    """Names in order, the first `most` of them: 'a, b, c and 9,960 more'."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:77]}..." for name in ordered[:most]) + more


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`; None where nothing has the share `cutoff` of the letters of both in common."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question that ends a message, with the nearest known name in quotes; `otherwise` where nothing is close."""
    close = nearest_name(name, known)
    return f" Did you mean '{close}'?" if close else otherwise


def suggest_path(path: Path) -> str:
    """Where there is nothing at `path`: the nearest name in its folder, or where relative paths start."""
    close = nearest_name(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
    return f" Did you mean '{path.parent / close}'?" if close else f" Relative paths start at {Path.cwd()}."


def describe_error(error: BaseException, limit: int = 400) -> str:
    """The message of an error as one sentence of at most `limit` characters.

    Secrets are redacted before the text is cut: the first half of a secret would not be recognized.

    Example:
        >>> describe_error(KeyError("a"))
        "KeyError: 'a'."
    """
    text = " ".join(redact_text(str(error)).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    text = text if len(text) < limit else f"{text[: limit - 3]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def reveal_controls(text: str) -> str:
    """A text whose control characters are their Unicode pictures, so that no terminal or page obeys them.

    Those that override the direction of the text behind them become U+FFFD. Line breaks and tabs stay; '\\r\\n' becomes
    a line break.

    Example:
        >>> reveal_controls("a" + chr(27) + "[2Jb")
        'a␛[2Jb'
    """
    return text.replace("\r\n", "\n").translate(CONTROL_PICTURES)


def strip_full_stop(sentence: str) -> str:
    """The sentence without its full stop, for brackets: `strip_full_stop("It is closed.")` is "It is closed"."""
    return sentence if sentence.endswith("...") else sentence.removesuffix(".")
