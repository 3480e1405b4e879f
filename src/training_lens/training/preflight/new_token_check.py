"""How often the training rows have each new token: a row of the embedding is trained where its token occurs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.columns import count_by_example, mask_first_tokens
from training_lens.data.token_dataset import TokenDataset
from training_lens.utils.formatting import list_names
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SHOWN = 8
NEW_TOKENS = Rule(
    code="new_tokens",
    signature="new tokens that no training row has: their rows stay the mean of their pieces'",
    threshold="any token without an occurrence",
    source="exact counts, in the rows as they are truncated",
    action="take these out of data.new_tokens, or give rows that have them, written letter by letter alike",
)


@dataclass(frozen=True)
class TokenCount:
    """How often a token occurs in the training rows, in how many of them, and how often it is a target."""

    text: str
    occurrences: int
    rows: int
    learned: int

    def __str__(self) -> str:
        return f"{self.text!r} {self.occurrences:,} times in {self.rows:,} rows ({self.learned:,} learned)"


def count_tokens(dataset: TokenDataset, texts: Sequence[str], ids: Sequence[int]) -> list[TokenCount]:
    """The counts of some tokens. Cost: one pass over the token ids for each of them."""
    found = np.zeros((len(ids), 3), dtype=np.int64)
    for _, chunk in dataset.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        for count, token in zip(found, ids, strict=True):
            is_token = chunk.input_ids == token
            count += [is_token.sum(), (count_by_example(is_token, chunk.offsets) > 0).sum(), (is_token & taught).sum()]
    return [TokenCount(text, *counts) for text, counts in zip(texts, found.tolist(), strict=True)]


def check_new_tokens(dataset: TokenDataset, texts: Sequence[str], ids: Sequence[int]) -> Finding:
    """Whether every new token occurs; logs how often."""
    counts = count_tokens(dataset, texts, ids)
    found, missing = [c for c in counts if c.occurrences], [c.text for c in counts if not c.occurrences]
    measured = list_names([str(count) for count in found], SHOWN) or "none occurs"
    if found:
        logger.info("new tokens in %s rows: %s", f"{len(dataset):,}", measured)
    evidence = {
        "tokens": {c.text: {"occurrences": c.occurrences, "rows": c.rows, "learned": c.learned} for c in counts}
    }
    if not missing:
        return NEW_TOKENS.report_fine("Every new token occurs in the training rows", measured, evidence=evidence)
    return NEW_TOKENS.report_symptom(
        "warning",
        "New tokens that no training row has",
        f"{list_names([repr(text) for text in missing], SHOWN)} in none of {len(dataset):,} rows",
        confidence="sure",
        evidence=evidence,
    )
