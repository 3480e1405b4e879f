"""Failures of the base: weights that are not finite, huge or random, and a tokenizer that is not its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from planted_case import Answer, Case, Kind
from safetensors.torch import load_file, save_file

PROJECTION = "model.layers.{}.mlp.down_proj.weight"


def copy_base(case: Case) -> Path:
    """A writable copy of the case's base."""
    folder = case.scratch / "base"
    shutil.copytree(case.base, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def change_weights(case: Case, change: Callable[[dict[str, torch.Tensor]], None]) -> Case:
    """The case with a base whose weights are changed."""
    folder = copy_base(case)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return replace(case, base=folder)


def _set_one(value: float) -> Callable[[Case, int], Case]:
    def plant(case: Case, layer: int) -> Case:
        def change(weights: dict[str, torch.Tensor]) -> None:
            weights[PROJECTION.format(layer)][0, 0] = value

        return change_weights(case, change)

    return plant


def huge_weights(case: Case, factor: float) -> Case:
    """The last layers' outputs are so large that the base says nothing but them."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            weights[PROJECTION.format(layer)] *= factor

    return change_weights(case, change)


def random_weights(case: Case, spread: float) -> Case:
    """Every matrix is drawn anew: a base that was never trained, its loss at the logarithm of its vocabulary."""
    generator = torch.Generator().manual_seed(case.seed)

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if weight.ndim == 2:
                weights[name] = (torch.randn(weight.shape, generator=generator) * spread).to(weight.dtype)

    return change_weights(case, change)


def wrong_tokenizer(case: Case, shift: int) -> Case:
    """The tokenizer of a model with the same number of tokens in another order."""
    folder = copy_base(case)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    plain = sorted((name for name, i in vocabulary.items() if i > 2), key=vocabulary.__getitem__)
    ids = [vocabulary[name] for name in plain]
    vocabulary |= dict(zip(plain, ids[shift:] + ids[:shift], strict=True))
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return replace(case, base=folder)


BASE = (Answer("base_model", test="baseline"),)
KINDS = (
    Kind(
        "base_nan",
        "a weight of the base is NaN",
        (Answer("base_model"), Answer("nonfinite", title="base")),
        _set_one(float("nan")),
        0,
        1,
        r"base",
        earliest="before",
    ),
    Kind(
        "base_inf",
        "a weight of the base is infinite",
        (Answer("base_model"), Answer("nonfinite", title="base")),
        _set_one(float("inf")),
        0,
        1,
        r"base",
        earliest="before",
    ),
    Kind("base_huge", "weights of the base are huge", BASE, huge_weights, 1e4, 300.0, r"the base", earliest="before"),
    Kind("base_random", "the base was never trained", BASE, random_weights, 0.05, 0.02, r"the base", earliest="before"),
    Kind(
        "tokenizer_wrong",
        "the tokenizer of another model",
        BASE,
        wrong_tokenizer,
        100,
        7,
        r"tokenizer",
        earliest="before",
    ),
)
