"""The arithmetic behind docs/lens/published.md, and its pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("published_ranks", "published_forgetting", "published_staircase")


@pytest.fixture
def correlation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/published"))
    import correlation  # type: ignore[import-not-found]

    return correlation


def test_the_rank_correlation_is_that_of_scipy_with_ties(correlation: Any) -> None:
    from scipy.stats import spearmanr

    generator = np.random.default_rng(1)
    x = generator.integers(0, 5, 30).astype(float)
    y = x + generator.normal(size=30)
    assert correlation.spearman(x, y) == pytest.approx(spearmanr(x, y)[0])


def test_what_only_the_group_decides_has_no_correlation_within_groups(correlation: Any) -> None:
    """Two columns that rise from group to group, and against each other in each."""
    groups = np.repeat(np.arange(6.0), 4)
    inside = np.tile(np.arange(4.0), 6)
    x, y = 10 * groups + inside, 10 * groups - inside
    assert correlation.spearman(x, y) > 0.9
    assert correlation.within_groups(x, y, groups)["rho"] == pytest.approx(-1)
    assert correlation.within_groups(x, y, groups)["p"] < 0.01
    assert np.isnan(correlation.within_groups(groups, y, groups)["rho"])


def test_the_interval_is_narrow_where_groups_decide_everything(correlation: Any) -> None:
    groups = np.repeat(np.arange(5.0), 4)
    found = correlation.with_interval(groups, groups + 1, groups)
    assert (found["low"], found["rho"], found["high"]) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_are_those_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/published"))
    import pictures  # type: ignore[import-not-found]

    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    drawn = pictures.svg(getattr(pictures, name.removeprefix("published_"))(results))
    assert drawn == (ROOT / f"docs/lens/{name}.svg").read_text(), "run python benchmarks/published/pictures.py"
    ElementTree.fromstring(drawn)
