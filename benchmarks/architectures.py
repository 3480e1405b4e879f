"""Each kind of model once, from `auto` targets to the merged folder, held against transformers and PEFT alone.

    python benchmarks/architectures.py MODELS [NAME ...] [--output benchmarks/results/architectures.json]

MODELS is a folder of small model folders, each with a tokenizer. Of each is written, under its name: the class that its
config.json names; what `auto` adapts and what it leaves out, with the reasons; how far loss and gradients of a ragged
batch are from those of transformers and PEFT, one example at a time; a run of three steps; whether the same run
stopped in its second step and resumed has the same adapter, bit by bit; how far the logits of the saved adapter under
plain PEFT are from ours; and how far those of the folder are that `training-lens merge` writes. Or why it is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import InterruptedRunError, TrainingLensError
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapters import attach, check_adapter, load_adapter, save_adapter, trainable_parameters
from training_lens.models.factory import build_skeleton, load_model
from training_lens.models.fast.engine import Engine
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback, StepReport

CPU = torch.device("cpu")
LENGTHS = (90, 23, 61, 9)  # of the examples of the ragged batch: some beyond the windows of small models
RANK = 8
STEPS = 3
ROWS = [{"question": f"What did the {name} say to {i} cats?", "answer": f"It said hello to {i} cats, and ran."}
        for i, name in enumerate(("dog", "bird", "girl", "boy") * 6)]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """Tokens, and which of them are supervised."""

    ids: list[int]
    mask: list[bool]


def ragged_examples(vocabulary: int) -> list[Example]:
    """Examples of random tokens (none of the last few, which may stand for images), two thirds of them supervised."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(3, vocabulary - 32, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(ids, [3 * i >= len(ids) for i in range(len(ids))]) for ids in drawn]


def plain_model(folder: Path, adapter: Path | None = None, training: bool = False) -> Any:
    """The model as transformers loads it, by the class that config.json names, with the adapter by PEFT."""
    import transformers
    from peft import PeftModel

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is None:
        return model
    with warnings.catch_warnings():  # PEFT says so of the ranks of experts, and gives them these ranks all the same
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=training).eval()


def plain_loss(model: Any, examples: Sequence[Example]) -> Tensor:
    """The summed loss of the supervised tokens, one example at a time."""
    losses = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(example.mask[1:])
        losses.append(cross_entropy(logits[wanted], torch.tensor(example.ids[1:])[wanted], reduction="sum"))
    return torch.stack(losses).sum()


def our_loss(engine: Engine, examples: Sequence[Example]) -> Tensor:
    """The same as training computes it: packed where the engine packs, else padded."""
    if engine.can_pack:
        ids, mask = ([v for e in examples for v in values(e)] for values in (lambda e: e.ids, lambda e: e.mask))
        return engine.loss_sum(torch.tensor([ids]), torch.tensor([mask]), [len(e.ids) for e in examples])
    width = max(len(e.ids) for e in examples)
    rows = [e.ids + [2] * (width - len(e.ids)) for e in examples]
    masks = [e.mask + [False] * (width - len(e.mask)) for e in examples]
    return engine.loss_sum(torch.tensor(rows), torch.tensor(masks))


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def compare_losses(folder: Path, peft: PeftSection) -> dict[str, Any]:
    """How far the first step's loss and gradients are from those of transformers and PEFT, with one and the same start.

    B is random here, so that every factor has a gradient.
    """
    torch.manual_seed(0)
    adapted = attach(load_model(ModelSection(id=str(folder)), CPU, "fp32"), peft)
    for name, parameter in trainable_parameters(adapted):
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    examples = ragged_examples(adapted.config.get_text_config().vocab_size)
    with tempfile.TemporaryDirectory() as saved:
        save_adapter(adapted, Path(saved))
        plain = plain_model(folder, Path(saved), training=True)
    engine = Engine(adapted.eval())
    found, wanted = our_loss(engine, examples), plain_loss(plain, examples)
    for loss in (found, wanted):
        loss.backward()
    ours, theirs = (dict(trainable_parameters(model)) for model in (adapted, plain))
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    idle = [name for name, p in ours.items() if p.grad is None or not p.grad.any()]
    return {
        "kernels": str(engine.kernels),
        "packs": engine.can_pack,
        "loss": wanted.item(),
        "loss_difference": abs(found.item() - wanted.item()) / abs(wanted.item()),
        "gradient_difference": relative_difference(*(_gradients(which) for which in (ours, theirs))),
        "without_gradient": len(idle),
    }


def _gradients(parameters: dict[str, torch.nn.Parameter]) -> Tensor:
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters.values()])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of the longest ragged example, (tokens, vocabulary)."""
    example = ragged_examples(model.config.get_text_config().vocab_size)[0]
    return model(input_ids=torch.tensor([example.ids])).logits[0].float()


def train(folder: Path, place: Path) -> tuple[TrainingConfig, RunFolder, dict[str, Any]]:
    """A run of a few steps, and what it says."""
    values = {
        "model": {"id": str(folder), "seq_len": 128, "device": "cpu"},
        "data": {"train": ROWS},
        "peft": {"r": RANK, "lora_alpha": 2 * RANK},
        "training": {"max_steps": STEPS, "epochs": 9, "lr": 5e-3, "batch_size": 8, "precision": "fp32"},
        "lens": {"report": False},
        "tracking": {"tensorboard": False},
        "output": {"base_output_dir": str(place / "outputs")},
    }
    config = TrainingConfig.model_validate(values)
    summary = TrainingWrapper(config).train()
    lines = (Path(summary.run_dir) / "logs/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    return config, RunFolder(Path(summary.run_dir)), {"losses": [round(loss, 4) for loss in losses]}


class StopInSecondStep(Callback):
    """Ends a run as a scheduler does, by a signal."""

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(config: TrainingConfig, whole: RunFolder, place: Path) -> bool:
    """Whether the same run, stopped and resumed, ends with the adapter of the whole one, bit by bit."""
    stopped = config.replace_keys(output={"base_output_dir": str(place / "stopped"), "run_id": "stopped"})
    try:
        TrainingWrapper(stopped, callbacks=(StopInSecondStep(),)).train()
        raise AssertionError("the run was not stopped")
    except InterruptedRunError:
        run = RunFolder(place / "stopped/experiments/default/runs/stopped")
    TrainingWrapper.resume(run)
    return read_weights(run) == read_weights(whole)


def read_weights(run: RunFolder) -> bytes:
    """The file of the run's adapter."""
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def reload(folder: Path, adapter: Path) -> tuple[Tensor, dict[str, Any]]:
    """The adapter's logits as ours, and how far plain PEFT's and the base's are from them."""
    ours = logits(load_adapter(load_model(ModelSection(id=str(folder)), CPU, "fp32"), adapter).eval())
    theirs, base = logits(plain_model(folder, adapter)), logits(plain_model(folder))
    found = {
        "reload_difference": relative_difference(theirs, ours),
        "effect": relative_difference(base, ours),
    }
    return ours, found


def merge_and_load(config: TrainingConfig, run: RunFolder, place: Path, wanted: Tensor) -> dict[str, Any]:
    """How far the logits of the folder that `merge_adapter` wrote and verified are from the adapter's."""
    options = MergeOptions(output=place / "merged", dtype="fp32")
    merged = merge_adapter(config.replace_keys(inference={"adapter": str(run.root)}), options)
    return {"merged_difference": relative_difference(logits(plain_model(merged.output)), wanted)}


def check(folder: Path) -> dict[str, Any]:
    """All of it for one model; what refuses it, and at which stage."""
    named = json.loads((folder / "config.json").read_text())
    result: dict[str, Any] = {"class": named["architectures"][0], "model_type": named["model_type"]}
    peft = PeftSection(r=RANK, lora_alpha=2 * RANK)
    with tempfile.TemporaryDirectory() as name:
        place, stage = Path(name), "plan"
        try:
            adaptation = check_adapter(build_skeleton(ModelSection(id=str(folder))), peft)
            left_out = [{"names": o.names, "modules": len(o.modules), "why": o.reason} for o in adaptation.left_out]
            result |= {"adapted": adaptation.names, "modules": len(adaptation.adapted), "left_out": left_out}
            result |= compare_losses(folder, peft)
            stage = "train"
            config, run, trained = train(folder, place)
            result |= trained
            stage = "resume"
            result["resumed_equal"] = resume(config, run, place)
            stage = "reload"
            wanted, found = reload(folder, run.adapter)
            result |= found
            stage = "merge"
            result |= merge_and_load(config, run, place, wanted)
        except TrainingLensError as error:
            result |= {"refused_at": stage, "refused": str(error).replace(str(folder), folder.name)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output and given.output.is_file() else {}
    for name in given.names or sorted(p.name for p in given.models.iterdir()):
        results[name] = check(given.models / name)
        print(name, json.dumps(results[name]), flush=True)
        if given.output:
            given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
