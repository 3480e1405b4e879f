"""Whether older versions read what is written here: merged folders under transformers 4.57, adapters under older PEFT.

    make compat                                             # builds small models of its own
    python benchmarks/compat/check.py --bases FOLDER        # a folder of model folders, besides those

Each base is given an adapter of random values, which is merged as `training-lens merge` does. Logits of the same tokens
are then computed by plain transformers 4.57: from the merged folder, and from the base with the adapter by each version
of PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training_lens import embedded
from training_lens.config.compose import validate_values
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import TrainingLensError
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapters import attach, base_only, load_adapter, save_adapter, trainable_parameters
from training_lens.models.factory import load_model
from training_lens.utils.files import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDER = ROOT / ".venv-compat"
CPU = torch.device("cpu")
IDS = list(range(6, 54))
EQUAL = 1e-4  # of the logits' spread: both compute in float32, so the order of sums is all that differs
PEFT_BASE = "llama3_rope"  # adapters of every kind are read on this one
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


def main() -> int:
    """Merge, let the older versions read, print the table and write the results."""
    options = _parse_arguments()
    with tempfile.TemporaryDirectory(prefix="training-lens-compat-") as place:
        work = options.work or Path(place)
        bases = options.bases or _build_bases(work)
        names = options.names or sorted(path.name for path in bases.iterdir() if (path / "config.json").is_file())
        merged = {name: _merge(bases / name, work / name) for name in names}
        merged = _read_merged(work, bases, merged)
        adapters = {} if options.bases else _read_adapters(work, bases / PEFT_BASE)
    earlier = read_json(options.output) if options.output.is_file() else {}  # rows of other bases stay
    merged, adapters = earlier.get("merged", {}) | merged, adapters or earlier.get("adapters", {})
    results = {"transformers": _version("transformers"), "merged": dict(sorted(merged.items())), "adapters": adapters}
    write_json(options.output, results)
    for line in _lines(results):
        print(line)
    return int(any(row["status"] == "differs" for row in merged.values()))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the bases; all without it")
    parser.add_argument("--bases", type=Path, help="a folder of model folders, written by transformers 4.57")
    parser.add_argument("--work", type=Path, help="where merged folders stay; those that are there are not made anew")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/compat.json")
    return parser.parse_args()


def _older_python(arguments: Sequence[str], packages: Path | None = None) -> str:
    """What a script prints under transformers 4.57, with `packages` before its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(packages)} if packages else {}
    command = [str(OLDER / "bin/python"), "-P", "-W", "ignore", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def _version(package: str, packages: Path | None = None) -> str:
    code = f"from importlib.metadata import version; print(version('{package}'))"
    return _older_python(["-c", code], packages).strip()


def _build_bases(work: Path) -> Path:
    bases = work / "bases"
    _older_python([str(HERE / "bases.py"), str(embedded.PATHS[embedded.MODEL]), str(bases)])
    return bases


def _merge(base: Path, work: Path) -> dict[str, Any]:
    """An adapter of random values on the base, what it computes, and the folder that it is merged into."""
    print(f"merging {base.name} ...", file=sys.stderr, flush=True)
    if (work / "merged").is_dir():
        return {"status": "merged"}
    try:
        _write_adapter(base, work)
        model = {"id": str(base), "device": "cpu"}
        config = validate_values({"inference": {"adapter": str(work / "adapter")}, "model": model})
        merge_adapter(config, MergeOptions(output=work / "merged"))
    except TrainingLensError as error:
        return {"status": "refused", "reason": str(error)}
    return {"status": "merged"}


def _write_adapter(base: Path, work: Path, **section: Any) -> None:
    """A moved adapter in `work`, and the logits of base and adapter by this version of transformers."""
    torch.manual_seed(0)
    adapted = attach(load_model(ModelSection(id=str(base), dtype="fp32"), CPU, "fp32"), PeftSection(r=4, **section))
    for _, parameter in trainable_parameters(adapted):
        parameter.data += 0.05 * torch.randn_like(parameter)
    (work / "adapter").mkdir(parents=True, exist_ok=True)
    save_adapter(adapted, work / "adapter")
    del adapted  # what is held to is the adapter as it is read again
    model = load_adapter(load_model(ModelSection(id=str(base), dtype="fp32"), CPU, "fp32"), work / "adapter")
    with torch.no_grad():
        after = model(input_ids=torch.tensor([IDS])).logits
        with base_only(model):
            before = model(input_ids=torch.tensor([IDS])).logits
    save_file({"adapter": after, "base": before}, work / "wanted.safetensors")


def _read(jobs: list[dict[str, Any]], packages: Path | None = None) -> dict[str, dict[str, Any]]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(jobs, file)
        file.flush()
        printed = _older_python([str(HERE / "read.py"), file.name], packages)
    found = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    return {result.pop("name"): result for result in found}


def _read_merged(work: Path, bases: Path, merged: dict[str, Any]) -> dict[str, Any]:
    """The merged folders as transformers 4.57 reads them, and the bases, which it may read otherwise themselves."""
    whole = [name for name, row in merged.items() if row["status"] == "merged"]
    jobs = [_job(name, work / name / "merged", work / name, "adapter") for name in whole]
    plain = [_job(name, bases / name, work / name, "base") for name in whole]
    found, of_bases = _read(jobs), _read(plain)
    return {name: _judge(found[name], of_bases[name]) if name in found else row for name, row in merged.items()}


def _job(name: str, base: Path, work: Path, tensor: str, adapter: Path | None = None) -> dict[str, Any]:
    wanted = {"wanted": str(work / "wanted.safetensors"), "tensor": tensor, "ids": IDS}
    return {"name": name, "base": str(base), **wanted, **({"adapter": str(adapter)} if adapter else {})}


def _judge(found: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Equal, or why not: the architecture is newer, or the base itself is read otherwise."""
    if "error" in base:
        return {"status": "base not read", "reason": base["error"]}
    if "error" in found:
        return {"status": "differs", "reason": found["error"]}
    numbers = {"difference": found["difference"], "spread": found["spread"], "base_difference": base["difference"]}
    if _is_equal(found):
        return {"status": "equal", **numbers}
    return {"status": "differs" if _is_equal(base) else "base differs", **numbers}


def _is_equal(found: dict[str, Any]) -> bool:
    return bool(found["difference"] <= EQUAL * max(1.0, found["spread"]))


def _read_adapters(work: Path, base: Path) -> dict[str, Any]:
    """Adapters of each kind under each version of PEFT: equal, refused by it, or other than here."""
    jobs = []
    for kind, section in KINDS.items():
        place = work / f"adapter-{kind}"
        if not (place / "wanted.safetensors").is_file():
            _write_adapter(base, place, **section)
        jobs.append(_job(kind, base, place, "adapter", place / "adapter"))
    keys = {kind: sorted(read_json(work / f"adapter-{kind}/adapter/adapter_config.json")) for kind in KINDS}
    versions = sorted(OLDER.glob("peft-*"))
    return {"keys": keys, **{_version("peft", folder): _read_kinds(jobs, folder) for folder in versions}}


def _read_kinds(jobs: list[dict[str, Any]], packages: Path) -> dict[str, Any]:
    found = _read(jobs, packages)
    equal = {kind for kind, row in found.items() if "error" not in row and _is_equal(row)}
    return {kind: row | {"status": "equal" if kind in equal else "differs"} for kind, row in found.items()}


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield f"merged folders under transformers {results['transformers']}"
    for name, row in results["merged"].items():
        yield f"  {name:18} {row['status']:14} {_detail(row)}"
    for version, kinds in results["adapters"].items():
        for kind, row in kinds.items() if version != "keys" else ():
            yield f"  PEFT {version:8} {kind:16} {row['status']:8} {_detail(row)}"


def _detail(row: dict[str, Any]) -> str:
    """What was measured, or why nothing was; and keys that this version does not know."""
    said = row.get("reason") or row.get("error") or f"{row['difference']:.1e}"
    return "; ".join([said, *row.get("unknown_keys", ())])


if __name__ == "__main__":
    sys.exit(main())
