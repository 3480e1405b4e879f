"""Adapters of each architecture and kind in every form that they are exported to, computed with by what loads the form.

    PYTHONPATH=.venv-llama python benchmarks/adapter_targets.py MODELS [NAME ...] [--output FILE]

MODELS is a folder of small model folders, each with a tokenizer. Of each, an adapter on all modules that `auto` finds,
with random A and B, is merged and exported, and the largest logit difference to the adapter is written that the checks
measured: of the merged folder in transformers, of PEFT's and the plain form in PEFT, of the GGUF adapter and the merged
GGUF model (f32) in llama.cpp. Or why it is refused. The kinds of adapters (rsLoRA, patterns, PiSSA, DoRA) are tried on
the first of the models. `make test-llama` installs the llama.cpp that this needs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.config.compose import validate_values
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import TrainingLensError
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapters import adapted_modules, attach, save_adapter, trainable_parameters
from training_lens.models.factory import load_model

OUTPUT = Path(__file__).parent / "results/adapter_targets.json"
ROWS = [{"prompt": f"Once there was a {name} who had {i} apples.", "response": f"The {name} gave {i} apples away."}
        for i, name in enumerate(("dog", "bird", "girl", "boy") * 3)]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"variant": "rslora"},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 30}},
    "rank_pattern": {"rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 16}},
    "rsLoRA, both patterns": {"variant": "rslora", "alpha_pattern": {"v_proj": 5}, "rank_pattern": {"o_proj": 3}},
    "PiSSA": {"init": "pissa"},
    "DoRA": {"use_dora": True},
    "head trained whole": {"modules_to_save": ["lm_head"]},
}


def write_adapter(model: Path, folder: Path, peft: dict[str, Any]) -> int:
    """An adapter of the model in `folder`, as after training; how many modules it has."""
    torch.manual_seed(3)
    section = PeftSection.model_validate({"r": 8, "lora_alpha": 16, **peft})
    adapted = attach(load_model(ModelSection(id=str(model)), torch.device("cpu"), "fp32"), section)
    with torch.no_grad():
        for _, parameter in trainable_parameters(adapted):
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    save_adapter(adapted, folder)
    return len(adapted_modules(adapted))


def measure(model: Path, peft: dict[str, Any]) -> dict[str, Any]:
    """The largest logit difference of each form, or why it is refused."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        try:
            result: dict[str, Any] = {"modules": write_adapter(model, place / "adapter", peft)}
        except TrainingLensError as error:
            return {"refused": str(error)}
        config = validate_values(
            {
                "inference": {"adapter": str(place / "adapter")},
                "model": {"id": str(model), "seq_len": 128, "device": "cpu"},
                "data": {"validation": [str(place / "rows.jsonl")], "template": "plain"},
            }
        )
        result["merge"] = try_form(lambda: merge_adapter(config, MergeOptions(place / "merged", dtype="fp32")))
        forms = {form: ExportOptions(form, place / form) for form in ("peft", "plain", "gguf")}
        forms["gguf-merged"] = ExportOptions("gguf", place / "whole", merged=True, dtype="f32")
        result |= {form: try_form(partial(export_adapter, config, options)) for form, options in forms.items()}
    return result


def try_form(write: Callable[[], Any]) -> float | str:
    """The largest logit difference that the checks of a form measured, or why there is none."""
    try:
        return float(write().verification.max_logit_difference)
    except TrainingLensError as error:
        return str(error).split("\n")[0]


def list_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as lines of a Markdown table."""
    forms = {"merge": "merge", "peft": "`peft`", "plain": "`plain`", "gguf": "`gguf`", "gguf-merged": "`gguf --merged`"}
    lines = [f"| adapter | modules | {' | '.join(forms.values())} |", f"|---{'|---' * (1 + len(forms))}|"]
    for label, found in results.items():
        cells = [describe_cell(found.get(form, found.get("refused"))) for form in forms]
        lines.append(f"| {label} | {found.get('modules', '')} | {' | '.join(cells)} |")
    return lines


def describe_cell(value: float | str | None) -> str:
    """A difference, or the beginning of a refusal."""
    if isinstance(value, str):
        return "not equal" if value.startswith("what was") else "refused"
    return "" if value is None else "0" if value == 0 else f"{value:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.is_file() else {}
    names = given.names or sorted(path.name for path in given.models.iterdir())
    asked = [(name, name, {}) for name in names]
    asked += [(f"{names[0]}, {kind}", names[0], peft) for kind, peft in KINDS.items()]
    for label, name, peft in asked:
        results[label] = measure(given.models / name, peft)
        print(label, json.dumps(results[label]), flush=True)
        given.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(list_table(results)))


if __name__ == "__main__":
    main()
