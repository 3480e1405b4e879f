"""Scores of training rows by hidden states, which `explain answer` does not have: they predicted less."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training_lens.data.batching import collate
from training_lens.data.token_dataset import TokenDataset
from training_lens.models.adapters import restore_adapter
from training_lens.models.model_classes import decoder_of, evaluation_mode
from training_lens.training.row_replay import RowReplay
from training_lens.utils.devices import autocast


def score_by_states(replay: RowReplay, queries: TokenDataset) -> dict[str, np.ndarray]:
    """The cosine of the last layer's states of query and row in the run's adapter, (queries, rows) each.

    `representations`: where the last supervised token is predicted (arXiv 2409.19998); the other: the mean over the
    answer.
    """
    with replay.open_trainer() as trainer:
        restore_adapter(trainer.model, replay.run.adapter)
        (last, mean), (of_rows, mean_of_rows) = (
            read_states(trainer, texts, replay.plan.precision) for texts in (queries, replay.training_rows)
        )
    scores = {"representations": last @ of_rows.T, "hidden states, mean over the answer": mean @ mean_of_rows.T}
    return {method: values.double().numpy() for method, values in scores.items()}


def read_states(trainer: Any, texts: TokenDataset, precision: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For each text the state of the last supervised token and the mean of all, of length 1, (texts, hidden) each."""
    last, mean, decoder = [], [], decoder_of(trainer.model)
    with evaluation_mode(trainer.model), torch.inference_mode(), autocast(torch.device("cpu"), precision):
        for text in texts:
            batch = collate([text], 0)
            states = decoder(input_ids=batch.input_ids, use_cache=False)[0][0, :-1].float()[batch.loss_mask[0, 1:]]
            last.append(torch.nn.functional.normalize(states[-1], dim=0))
            mean.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    return torch.stack(last), torch.stack(mean)
