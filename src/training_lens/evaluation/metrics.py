"""Scores of generated answers against references."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, reference: str) -> bool:
    """Equal once white space at both ends is taken off; nothing else is normalised, an empty answer is wrong.

    Example:
        >>> exact_match("Tom \\n", "Tom"), exact_match("tom", "Tom"), exact_match("", "")
        (True, False, False)
    """
    return bool(prediction.strip()) and prediction.strip() == reference.strip()


def exact_match_rate(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """The share of answers that match exactly; every reference counts, also where the prediction is empty."""
    if not references:
        return None
    return sum(map(exact_match, predictions, references)) / len(references)
