"""The product's kernels against transformers' and PEFT's own modules, and the operations of torch that they call."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import training_lens
from gpu_checks.models import KINDS, Found, Settings, build_model, isolate
from training_lens.config.schema import PeftSection
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import uninstall_kernels
from training_lens.models.fast.tolerance import ROUNDING, WHOLE_MODEL, relative_error
from training_lens.utils.devices import DTYPES, Precision, autocast, seed_everything

PRIVATE = re.compile(r"torch\.(?:ops\.\w+|_(?!_)\w+)(?:\.\w+)*")
LENGTHS = {True: (40, 23, 57, 9), False: (700, 300, 1021, 64)}  # of the compared examples, by whether shapes are small
PATHS = ("fused", "packed")
Result = tuple[float, dict[str, Tensor]]  # a loss and every gradient


def read_signatures(settings: Settings) -> Found:
    """Signatures of torch's variable-length attention and of each private operation that the sources name."""
    sources = sorted(Path(training_lens.__file__).parent.rglob("*.py"))
    names = {name for path in sources for name in PRIVATE.findall(path.read_text(encoding="utf-8"))}
    found = {name: _describe_signature(name) for name in sorted(names)}
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["torch.nn.attention.varlen.varlen_attn"] = str(inspect.signature(varlen_attn))
    except ImportError as error:
        found["torch.nn.attention.varlen.varlen_attn"] = f"missing: {error}"
    missing = [name for name, signature in found.items() if signature.startswith("missing")]
    return {"signatures": found, "summary": f"{len(found)} operations, missing here: {', '.join(missing) or 'none'}"}


def _describe_signature(name: str) -> str:
    value: Any = torch
    try:
        for part in name.split(".")[1:]:
            value = getattr(value, part)
    except AttributeError as error:
        return f"missing: {error}"
    if name.startswith("torch._"):  # a function in C has its schema in aten
        value = getattr(torch.ops.aten, name.removeprefix("torch."), value)
    if isinstance(value, torch._ops.OpOverload):
        return str(value._schema)
    if isinstance(value, torch._ops.OpOverloadPacket):
        return "; ".join(str(getattr(value, overload)._schema) for overload in value.overloads())
    return str(inspect.signature(value))


def compare_kernels(settings: Settings) -> Found:
    """Loss and every gradient of padded and of packed examples through the kernels against plain padded ones."""
    cells: dict[str, Found] = {}
    for kind in KINDS:
        for precision in ("bf16", "fp16"):
            for adapter in ("LoRA", "DoRA"):
                name = f"{kind} {precision} {adapter}"
                if precision == "fp16" and settings.device.type == "cpu":
                    cells[name] = {"status": "not run", "why": "fp16 needs CUDA"}
                    continue
                cells[name] = isolate(partial(_compare_paths, settings, kind, precision, adapter == "DoRA"))
    wrong = [f"{name}: {cell['error']}" for name, cell in cells.items() if cell["status"] == "failed"]
    compared = {name: cell for name, cell in cells.items() if cell["status"] != "not run"}
    errors = {
        (cell[path]["worst_gradient"], name, path) for name, cell in compared.items() for path in PATHS if path in cell
    }
    largest, worst, path = max(errors, default=(float("nan"), "none", "no path"))
    error = {"status": "failed", "error": "; ".join(wrong)} if wrong else {}
    summary = f"{len(compared)} models, largest error of a gradient {largest:.1e} ({worst}, {path})"
    return {**error, "cells": cells, "summary": summary}


def _compare_paths(settings: Settings, kind: str, precision: Precision, dora: bool) -> Found:
    """One model; relative errors of the loss, of all gradients as one vector, and of the worst one alone."""
    seed_everything(0)
    dtype = DTYPES[precision]
    model = attach(build_model(settings, kind, dtype), PeftSection(r=8, use_dora=dora)).train()
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name:  # zero at the start, which would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
    lengths = LENGTHS[settings.small]
    examples = [torch.randint(6, model.config.vocab_size, (length,)) for length in lengths]
    masks = [torch.arange(length) >= length // 3 for length in lengths]
    ids, mask = (pad_sequence(rows, batch_first=True) for rows in (examples, masks))
    present = pad_sequence([torch.ones(length, dtype=torch.int64) for length in lengths], batch_first=True)

    def plain() -> Tensor:
        logits = model(input_ids=ids.to(model.device), attention_mask=present.to(model.device)).logits
        wanted = mask[:, 1:].to(model.device)
        return cross_entropy(logits[:, :-1][wanted].float(), ids.to(model.device)[:, 1:][wanted], reduction="sum")

    expected = _differentiate(model, precision, plain)
    engine = Engine(model, precision)
    fused = _differentiate(model, precision, lambda: engine.loss_sum(ids, mask, padded_lengths=lengths))
    found: Found = {"status": "ok", "kernels": str(engine.kernels), "fused": _errors(fused, expected)}
    if engine.can_pack:
        row, marks = torch.cat(examples)[None], torch.cat(masks)[None]
        packed = _differentiate(model, precision, lambda: engine.loss_sum(row, marks, packed_lengths=lengths))
        found["packed"] = _errors(packed, expected)
    uninstall_kernels(model)
    most = WHOLE_MODEL * ROUNDING[dtype]
    wrong = [
        f"{path}: {what} {found[path][what]:.1e} of at most {most:.1e}"
        for path in PATHS for what in ("loss", "worst_gradient")
        if path in found and not found[path][what] <= most
    ]  # fmt: skip
    if not engine.can_pack:
        wrong.append(f"not packed ({engine.kernels})")
    return {**found, "tolerance": most, **({"status": "failed", "error": "; ".join(wrong)} if wrong else {})}


def _differentiate(model: Any, precision: Precision, compute: Any) -> Result:
    trained = dict(trainable_parameters(model))
    with autocast(model.device, precision):
        loss = compute()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), dict(zip(trained, gradients, strict=True))


def _errors(found: Result, expected: Result) -> Found:
    single = {name: relative_error(gradient, expected[1][name]) for name, gradient in found[1].items()}
    worst = max(single, key=lambda name: single[name])
    whole = [torch.cat([gradient.flatten() for gradient in result[1].values()]) for result in (found, expected)]
    return {
        "loss": abs(found[0] - expected[0]) / abs(expected[0]),
        "gradients": relative_error(*whole),
        "worst_gradient": single[worst],
        "worst_parameter": worst,
    }
