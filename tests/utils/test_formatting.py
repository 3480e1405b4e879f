"""Numbers as a person reads them."""

from __future__ import annotations

from training_lens.utils.formatting import format_count, format_seconds, format_size, nearest_name, render_sparkline


def test_formats() -> None:
    assert [format_size(n) for n in (0, 999, 4_457_520, 2.5e12)] == ["0 B", "999 B", "4.5 MB", "2.5 TB"]
    assert [format_count(n) for n in (7, 275_520, 2_226_240, 8e9)] == ["7", "276 k", "2.23 M", "8 B"]
    assert [format_seconds(s) for s in (0.42, 42, 192, 7500)] == ["0.4 s", "42 s", "3 min 12 s", "2 h 05 min"]


def test_nearest() -> None:
    assert nearest_name("lerning_rate", ["learning_rate", "epochs"]) == "learning_rate"
    assert nearest_name("xyz", ["learning_rate"]) is None


def test_a_sparkline_leaves_out_what_is_not_finite() -> None:
    assert render_sparkline([3.0, float("nan"), 2.0, float("inf"), 1.0]) == render_sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert render_sparkline([float("nan")]) == ""
