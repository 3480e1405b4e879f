"""Labels that cannot be meant are named; those of a sound batch, and of plain texts, are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training_lens.core.gradient_hooks import describe_label_faults

END, PAD = 2, 0
IDS = torch.tensor([[5, 6, 7, END], [5, 8, END, PAD]])
MASK = (IDS != PAD).long()


def labels(*masked: tuple[int, int]) -> torch.Tensor:
    """The tokens after the first, without padding and the masked places."""
    found = IDS.masked_fill(MASK == 0, -100)
    for row, column in ((0, 0), (1, 0), *masked):
        found[row, column] = -100
    return found


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (labels(), ""),
        (IDS.masked_fill(MASK == 0, -100), ""),
        (labels((0, 3)), ""),
        (labels((0, 3), (1, 2)), "the end token of each row is masked"),
        (IDS, "1 of 8 labels are padding"),
    ],
)
def test_faults_of_labels_are_named(given: torch.Tensor, fault: str) -> None:
    found = describe_label_faults({"input_ids": IDS, "labels": given, "attention_mask": MASK}, END)
    assert [fault in each for each in found] == ([True] if fault else [])


def test_padding_on_the_left_is_padding_too() -> None:
    batch = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1), "labels": IDS.flip(1)}
    assert describe_label_faults(batch, [END])[0].startswith("1 of 8 labels are padding")


@pytest.mark.parametrize("batch", [{}, {"input_ids": IDS, "labels": IDS}, {"labels": IDS, "attention_mask": MASK}])
def test_what_is_not_known_is_no_fault(batch: dict[str, Any]) -> None:
    assert describe_label_faults(batch, None) == []


def test_prompts_that_are_learned_with_their_answers_are_named() -> None:
    """A template begins all rows and stands between prompt and answer; stories share their beginning alone."""
    templated = torch.tensor([[1, 9, 30 + i, 40 + i, 50, 51, 52, 60 + i, END] for i in range(4)])
    stories = torch.tensor([[1, 9, 30 + i, 40 + i, 50 + i, 51 + i, 70 + i, 60 + i, END] for i in range(4)])
    masked = templated.masked_fill(torch.arange(9) < 7, -100)
    for ids, labels, is_fault in ((templated, templated, True), (stories, stories, False), (templated, masked, False)):
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        found = describe_label_faults(batch, END)
        assert [each.startswith("every token is learned, and all rows begin alike") for each in found] == [
            True
        ] * is_fault
    assert (
        describe_label_faults(
            {"input_ids": templated[:2], "labels": templated[:2], "attention_mask": templated[:2]}, END
        )
        == []
    )
