"""A tokenized split with a few more examples behind its own, which are in memory alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset, TokenTable


class JoinedTokens(TokenTable):
    """The columns of a source, then those of others; nothing is copied, and the source verifies its own tokens."""

    def __init__(self, first: TokenTable, others: pa.Table) -> None:
        self._first, self._others, self._joined = first, others, first.table
        super().__init__(pa.concat_tables([first.table, others]))

    def require_tokens(self, row: int) -> None:
        """See `TokenFile.require_tokens`; the source may open its file again."""
        if row >= self._first.table.num_rows:
            return
        self._first.require_tokens(row)
        if self._first.table is not self._joined:
            self._joined = self._first.table
            self.table = pa.concat_tables([self._joined, self._others])


def append_examples(dataset: TokenDataset, examples: Sequence[TokenizedExample]) -> TokenDataset:
    """The dataset with these examples behind its own."""
    own = np.arange(dataset.table.num_rows) if dataset.rows is None else dataset.rows
    added = dataset.table.num_rows + np.arange(len(examples))
    joined = JoinedTokens(dataset.source, TokenDataset.from_examples(examples).table)
    return TokenDataset(joined, np.concatenate([own, added]))
