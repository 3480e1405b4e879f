"""Prefetched micro-batches are those that would be made in time, and never cut for another budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import Schedule
from training_lens.data.examples import Batch
from training_lens.data.token_dataset import TokenDataset
from training_lens.models.adapters import trainable_parameters
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.dataloader import DataLoader
from training_lens.training.loop.trainer import Trainer
from training_lens.training.run import TrainingWrapper
from training_lens.utils.processes import Processes

Config = Callable[..., TrainingConfig]
PROCESSES = Processes(torch.device("cpu"))
SCHEDULE = Schedule(examples=40, global_batch=8, epochs=1, max_steps=None, seed=0)


@pytest.fixture(scope="module")
def dataset() -> TokenDataset:
    import numpy as np

    from training_lens.data.examples import TokenizedExample

    lengths = np.random.default_rng(0).integers(2, 30, 40)
    return TokenDataset.from_examples(
        [
            TokenizedExample("rows", i, np.arange(n, dtype=np.int32), np.ones(n, dtype=bool), None)
            for i, n in enumerate(lengths)
        ]
    )


def same(found: Batch, wanted: Batch) -> bool:
    return found.lengths == wanted.lengths and torch.equal(found.input_ids, wanted.input_ids)


@pytest.mark.parametrize("is_packed", [True, False])
def test_prefetched_batches_are_those_made_in_time(dataset: TokenDataset, is_packed: bool) -> None:
    early, late = (DataLoader(dataset, PROCESSES, 0, is_packed) for _ in range(2))
    early.prefetches = True
    numbers = []
    for plan in early.iterate_steps(SCHEDULE.iterate_steps(after=1), lambda: 64):
        found, wanted = list(early.micro_batches(plan, 64)), list(late.micro_batches(plan, 64))
        assert len(found) == len(wanted) > 1 and all(map(same, found, wanted))
        assert early.micro_batches(plan, 64) is not early.micro_batches(
            plan, 64
        )  # a step that begins anew has them all again
        numbers.append(plan.number)
    assert numbers == [2, 3, 4, 5]


def test_batches_of_an_old_budget_are_dropped(dataset: TokenDataset) -> None:
    loader = DataLoader(dataset, PROCESSES, 0, is_packed=True)
    loader.prefetches = True
    budget = [128]
    for plan in islice(loader.iterate_steps(SCHEDULE.iterate_steps(), lambda: budget[0]), 4):
        if plan.number == 2:
            budget[0] = 32
        batches = list(loader.micro_batches(plan, budget[0]))
        assert all(sum(batch.lengths) <= budget[0] for batch in batches)
        assert sum(len(batch.lengths) for batch in batches) == len(plan.examples)


def test_a_run_with_prefetching_is_bit_for_bit_the_same(small_config: Config, tiny_base: Path, tmp_path: Path) -> None:
    """With a step that runs out of memory on the way, behind which another was cut already."""

    def trained(prefetches: bool) -> tuple[list[torch.Tensor], Trainer]:
        config = small_config(model={"id": str(tiny_base)}, training={"max_steps": 4}, peft={"lora_dropout": 0.1})
        wrapper = TrainingWrapper(config)
        trainer = wrapper._build_trainer(RunFolder(tmp_path / str(prefetches)).create(), wrapper.plan())[0]
        trainer.dataloader.prefetches = prefetches
        calls = [0]

        def refuse(_module: torch.nn.Module, _given: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[0] += torch.is_grad_enabled()
            if calls[0] == 2:
                raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")

        decoder = trainer.model.get_base_model().get_decoder()
        decoder.register_forward_pre_hook(refuse, with_kwargs=True)
        trainer.fit()
        return [p.detach().clone() for _, p in trainable_parameters(trainer.model)], trainer

    (ahead, prefetching), (in_time, _) = trained(True), trained(False)
    assert prefetching.micro_batch_tokens < 4096 and prefetching.dataloader._prefetched is not None
    assert all(torch.equal(a, b) for a, b in zip(ahead, in_time, strict=True))


def test_the_longest_examples_make_the_largest_batch(dataset: TokenDataset) -> None:
    loader = DataLoader(dataset, PROCESSES, 0, is_packed=True)
    batch = loader.longest_batch(100)
    assert list(batch.lengths) == sorted(dataset.lengths.tolist(), reverse=True)[: len(batch.lengths)]
    assert 100 - 30 < sum(batch.lengths) <= 100


def test_the_largest_micro_batch_that_can_be_divided(dataset: TokenDataset) -> None:
    loader, plan = DataLoader(dataset, PROCESSES, 0, is_packed=True), next(SCHEDULE.iterate_steps())
    assert loader.largest_divisible(plan, 10**6) == int(dataset.lengths[plan.examples].sum())
    assert loader.largest_divisible(plan, 1) == 0
