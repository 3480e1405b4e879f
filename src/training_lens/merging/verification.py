"""Whether a merged folder computes what its adapter does: loaded in a fresh process, compared on real rows."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from training_lens.config.schema import TrainingConfig
from training_lens.data.examples import Example
from training_lens.data.source_reader import read_examples
from training_lens.data.token_pipeline import encode_training_prompt, tokenize
from training_lens.errors import AdapterError, ConfigurationError, MergeError
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session
from training_lens.merging import reload
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.devices import Precision
from training_lens.utils.files import read_json, replace_non_finite, write_json

ROWS = 16
TOKENS = 256  # of a row at most, from its start
ANSWERS = 8  # prompts that are answered
ANSWER_TOKENS = 32
LOGIT_BYTES = 256 * 2**20  # kept for each model: with a large vocabulary only a row's last positions are compared


@dataclass(frozen=True)
class Probes:
    """Rows of tokens, and prompts, each with its `max_new_tokens`."""

    rows: list[list[int]]
    prompts: list[tuple[list[int], int]]
    keep: int  # so many of the last positions of each row are compared
    origin: str  # where the rows are from, for messages


@dataclass(frozen=True)
class Reference:
    """What the adapter computes: logits of each row, with it and of the base alone, and greedy answers."""

    adapter: list[Tensor]
    base: list[Tensor]
    answers: list[list[int]]
    margins: list[list[float]]  # those of `reload.decode_greedily`


def probe_adapter(
    config: TrainingConfig, run: RunFolder | None, session: Session, scale: float
) -> tuple[Probes, Reference]:
    """The rows to check on, and what the adapter computes for them."""
    named = config.data.validation
    others = [str(source) for source in named] if named and not isinstance(named[0], dict) else None
    rows, origin = read_run_rows(run, session, others) if run else read_config_rows(session)
    given = build_probes(session, rows, origin)
    wanted = compute_reference(session, given, scale)
    if all(torch.equal(a, b) for a, b in zip(wanted.adapter, wanted.base, strict=True)):
        raise AdapterError(
            f"the adapter of {session.source} computes exactly what its base does: nothing to merge or to export."
        )
    return given, wanted


def read_run_rows(run: RunFolder, session: Session, others: Sequence[str] | None) -> tuple[list[Example], str]:
    """Rows of a run, and where they are from: `others`, its validation rows, or without these its training rows."""
    if others:
        return validation_examples(run, session, ROWS, others), f"of {', '.join(others)}"
    try:
        return validation_examples(run, session, ROWS), "of the run's validation data"
    except ConfigurationError:
        return validation_examples(run, session, ROWS, session.config.data.train), "that the run was trained on"


def read_config_rows(session: Session) -> tuple[list[Example], str]:
    """Rows that the session's config names, for an adapter without a run."""
    data = session.config.data
    sources = data.validation_sources or data.train
    examples = read_examples(sources, "data.validation", data)
    usable = (example for example in examples if tokenize([example], session.preparation)[0] is not None)
    return list(islice(usable, ROWS)), f"of {', '.join(map(str, sources))}"


def build_probes(session: Session, examples: Sequence[Example], origin: str) -> Probes:
    """The examples as tokens: whole, and as prompts. The prompt of a plain text is its first half.

    Raises:
        ConfigurationError: no examples.
    """
    if not examples:
        raise ConfigurationError(
            f"there are no rows {origin} to check the merge on; give data.validation=FILE with rows of the kind that "
            "the adapter was trained on."
        )
    tokens = tokenize(list(examples), session.preparation)
    whole = [[int(i) for i in t.input_ids[:TOKENS]] for t in tokens if t is not None]
    prompts = [
        ids[: len(ids) // 2] if e.is_text else encode_training_prompt(e, session.preparation)
        for e, ids in zip(examples[:ANSWERS], whole, strict=False)
    ]
    room = [min(ANSWER_TOKENS, session.positions - len(ids)) if session.positions else ANSWER_TOKENS for ids in prompts]
    vocabulary = session.model.config.get_text_config().vocab_size
    keep = max(1, min(TOKENS, LOGIT_BYTES // (4 * vocabulary * len(whole))))
    return Probes(whole, [(ids, n) for ids, n in zip(prompts, room, strict=True) if ids and n > 0], keep, origin)


def compute_reference(session: Session, given: Probes, scale: float = 1.0) -> Reference:
    """What the session's adapter computes for the probes, its update times `scale`, and the base alone."""
    model = session.model
    with base_only(model):
        base = [reload.last_logits(model, ids, given.keep) for ids in given.rows]
    stops = {"eos_token_id": sorted(session.stop_ids), "pad_token_id": session.pad_id}
    with scaled_adapter(model, scale):
        adapter = [reload.last_logits(model, ids, given.keep) for ids in given.rows]
        answers = [reload.decode_greedily(model, ids, limit, **stops) for ids, limit in given.prompts]
    return Reference(adapter, base, [tokens for tokens, _ in answers], [margins for _, margins in answers])


# How far a merged model may be from its adapter: the largest logit difference over the logits' spread (of 1 at least),
# and the mean KL in nats.
# Both sides compute in float32, so for fp32 only the order of summation differs. That bf16 and fp16 weights are rounded
# correctly is checked one by one (`weight_update`), so here only differences that rounding cannot make are refused:
# over ten times what was measured. 4 bits are as none: the dequantized weights are the numbers that the adapter
# computed with. LLM.int8() also rounds a layer's input, which merged weights cannot.
TOLERANCES = {"fp32": (1e-4, 1e-6), "fp16": (0.05, 1e-3), "bf16": (0.5, 0.01), "8bit": (0.5, 0.01)}
# llama.cpp reads its GELU from a table of 16-bit numbers, and rounds a layer's input to the kind of its weights.
TOLERANCES |= {"llama.cpp f32": (0.02, 1e-4), "llama.cpp f16": (0.05, 1e-3)}
TOLERANCES |= {"llama.cpp bf16": (1.0, 0.02), "llama.cpp q8_0": (1.0, 0.02)}


@dataclass(frozen=True)
class MergeCheck:
    """A measured value and the most that is allowed. `where`: the tensors that decide."""

    name: str
    measured: float
    allowed: float
    where: str = ""

    @property
    def is_ok(self) -> bool:
        return self.measured <= self.allowed  # false where either is not a number

    def as_json(self) -> dict[str, Any]:
        """As written in a report; values that are not finite are null."""
        values: dict[str, Any] = replace_non_finite({**asdict(self), "ok": self.is_ok})
        return values


@dataclass(frozen=True)
class Verification:
    """A merged model against its adapter, on the logits of `positions` positions and `answers` greedy answers."""

    positions: int
    answers: int
    max_logit_difference: float  # max |z' - z| over all logits z of the adapter and z' of the merged model
    logit_spread: float  # standard deviation of z over the vocabulary, mean over positions; the scale of differences
    mean_kl: float  # KL(adapter || merged) of the next token, mean over positions, in nats
    distance_share: float  # RMS of z' - z over the RMS of base - z: the share of the update that rounding lost
    greedy_agreement: float  # share of answers that are token for token the same
    ties: int  # answers that first differ at a token whose margin is at most twice the allowed logit difference
    checks: tuple[MergeCheck, ...]  # what decides whether the merge passes

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """As written in a report; values that are not finite are null."""
        values = asdict(self) | {"checks": [check.as_json() for check in self.checks]}
        kept: dict[str, Any] = replace_non_finite(values)
        return kept


def verify_folder(
    folder: Path, given: Probes, wanted: Reference, dtype: Precision, quantization: str, job: dict[str, Any]
) -> Verification:
    """Load `folder` in a fresh process, let it compute the probes, and compare.

    Args:
        dtype: of the written weights.
        quantization: of the base that the adapter computed on, as `model.quantization`.
        job: how `reload.load_output` is to load it.

    Raises:
        MergeError: it cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="training-lens-merge-") as place:
        path = Path(place) / "job.json"
        write_json(path, {**asdict(given), **job, "folder": str(folder)}, verbatim=True)
        command = [sys.executable, "-P", reload.__file__, str(path)]  # -P keeps its folder out of the imports there
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            last = done.stderr.strip().rsplit("\n", 1)[-1] or f"exit code {done.returncode}, most likely out of memory"
            raise MergeError(f"what was written in {folder} cannot be loaded by {job['class']}: {last}")
        answers = read_json(path.with_name("greedy.json"))
        with safe_open(path.with_name("logits.safetensors"), "pt") as file:
            found = [file.get_tensor(str(i)) for i in range(len(given.rows))]
    return compare_outputs(found, answers, wanted, dtype, quantization)


def compare_outputs(
    found: Sequence[Tensor], answers: Sequence[list[int]], wanted: Reference, dtype: str, quantization: str
) -> Verification:
    """Compare logits and answers of the merged model with the adapter's; see `Verification` for the measures.

    Args:
        dtype: a key of `TOLERANCES`: of the written weights, or how llama.cpp computes.
        quantization: of the base that the adapter computed on.
    """
    pairs = list(zip(found, wanted.adapter, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise MergeError(
            f"the merged model has logits of {tuple(found[0].shape)}, not {tuple(wanted.adapter[0].shape)}"
        )
    spread = _mean_over_parts([z.std(-1) for z in wanted.adapter])
    largest = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
    logit_tolerance, kl_tolerance = TOLERANCES["8bit" if quantization == "8bit" else dtype]
    allowed = logit_tolerance * max(1.0, spread)
    differences = [_first_difference(*three) for three in zip(answers, wanted.answers, wanted.margins, strict=True)]
    margins = [margin for margin in differences if margin is not None]
    ties = sum(margin <= 2 * allowed for margin in margins)
    to_base = _rms_distance(list(zip(found, wanted.base, strict=True)))
    update = _rms_distance(list(zip(wanted.base, wanted.adapter, strict=True)))
    mean_kl, to_adapter = _mean_over_parts([_kl_divergence(b, a) for a, b in pairs]), _rms_distance(pairs)
    return Verification(
        positions=sum(len(z) for z in found),
        answers=len(differences),
        max_logit_difference=largest,
        logit_spread=spread,
        mean_kl=mean_kl,
        distance_share=to_adapter / update if update else math.inf,
        greedy_agreement=1 - len(margins) / max(1, len(differences)),
        ties=ties,
        checks=(
            MergeCheck("largest logit difference to the adapter", largest, allowed),
            MergeCheck("mean KL divergence from the adapter, nats", mean_kl, kl_tolerance),
            MergeCheck("greedy answers that differ from the adapter's", float(len(margins) - ties), 0.0),
            MergeCheck("logit distance to the adapter (that to the base)", to_adapter, to_base),
        ),
    )


def _mean_over_parts(parts: Sequence[Tensor]) -> float:
    return torch.cat(list(parts)).mean().item()


def _kl_divergence(adapter: Tensor, merged: Tensor) -> Tensor:
    """KL(adapter || merged) of each position (positions,), from logits (positions, vocabulary).

    In float64: in float32 the sum's rounding error exceeds the KL of an exact merge, and may be negative.
    """
    p, q = adapter.double().log_softmax(-1), merged.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _rms_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Root of the mean squared difference over all logits."""
    return math.sqrt(_mean_over_parts([(a - b).square().mean(-1) for a, b in pairs]))


def _first_difference(found: list[int], wanted: list[int], margins: list[float]) -> float | None:
    """The adapter's margin at the first token where two answers differ; None if they are equal."""
    pairs = zip_longest(found, wanted, margins, fillvalue=math.inf)
    return next((margin for token, other, margin in pairs if token != other), None)
