"""With none of the extras and with all: what imports, what works, and what is said of what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import grimp
import pytest
from forked import run_python  # type: ignore[import-not-found]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from training_lens.errors import IntegrationError
from training_lens.integrations.integration_specs import list_integrations
from training_lens.integrations.record import RunRecord

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = "wandb mlflow trackio s3fs nbformat ipykernel bitsandbytes lm_eval gguf psycopg".split()
DEVELOPMENT = "pytest moto trl nbclient ruff mypy beartype".split()
HEAVY = "torch transformers pandas pyarrow numpy pydantic hydra omegaconf optuna plotly rich typer fsspec".split()
PUBLIC = {
    "training_lens": """TrainingWrapper LoRATrainingWrapper TrainingConfig CheckpointManager MetricsCollector
        CheckpointAnalyzer LoRACheckpointAnalyzer StandardReports HuggingFaceIntegration WandBIntegration""",
    "training_lens.training": "TrainingConfig CheckpointMetadata TrainingWrapper CheckpointManager MetricsCollector",
    "training_lens.analysis": """CheckpointAnalyzer StandardReports GradientAnalyzer WeightAnalyzer
        LoRAActivationTracker LoRAParameterAnalyzer ActivationAnalyzer ActivationExtractor ActivationVisualizer""",
    "training_lens.analyzers": "LoRAAnalyzer ActivationAnalyzer ConvergenceAnalyzer SimilarityAnalyzer",
    "training_lens.collectors": """AdapterWeightsCollector AdapterGradientsCollector LoRAActivationsCollector
        ActivationsCollector""",
    "training_lens.core": """DataCollector DataAnalyzer DataType CollectorRegistry AnalyzerRegistry IntegrationManager
        TrainingLensFramework""",
    "training_lens.integrations": """HuggingFaceIntegration WandBIntegration StorageBackend LocalStorage
        ActivationStorage""",
    "training_lens.cli": "cli",
    "training_lens.utils": "setup_logging get_logger TrainingLogger get_device format_size safe_save",
}
EVERYWHERE = {
    "tracking": {
        "wandb": {"mode": "offline"},
        "mlflow": {"enabled": True},
        "trackio": {"enabled": True},
        "hub": {"repo": "nobody/nothing"},
    },
    "output": {"mirror": "s3://nothing/at/all"},
}

IMPORTS = """
import importlib.util, json, pkgutil, sys
import training_lens

def fails(action, *arguments):
    try:
        action(*arguments)
    except Exception as error:
        return f"{arguments}: {error!r}"

def resolve(package, name):
    getattr(importlib.import_module(package), name)

def import_first(module, room):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{room}.")]:
        del sys.modules[name]
    importlib.import_module(module)

heavy = [name for name in HEAVY if name in sys.modules]
there = [name for name in NAMES if importlib.util.find_spec(name)]
broken = [fails(resolve, package, name) for package, names in PUBLIC.items() for name in names.split()]
modules = [info.name for info in pkgutil.walk_packages(training_lens.__path__, "training_lens.")]
for room in (f"training_lens.{floor}" for floor in FLOORS if floor != "__main__"):
    names = [name for name in modules if f"{name}.".startswith(f"{room}.")]
    broken += [fails(import_first, name, room) for name in (names if EACH_FIRST else names[:1])]
    broken += [fails(importlib.import_module, name) for name in names]
print(json.dumps({"heavy": heavy, "there": there, "broken": [*filter(None, broken)], "modules": len(modules)}))
"""
"""What a Python says of itself and the package. A module imports from lower floors and its own package alone (`make
check`): here each, or one of each package, is the first of it, with the floors below imported already, so that any
circle shows."""

COMMANDS = """
import json, sys
from typer.testing import CliRunner
from training_lens.cli import cli

told = []
for call in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli, call)
    told.append({"call": call, "code": result.exit_code, "out": result.stdout, "err": result.stderr})
print(json.dumps(told))
"""


TRAIN = [
    "train", "+experiment=quick_test", "output.experiment_name=default",
    "training.max_steps=2", "training.warmup_ratio=0", "data.max_examples=16",
    "tracking.wandb.mode=offline", "tracking.mlflow.enabled=true",
    "tracking.trackio.enabled=true", "output.mirror=s3://nothing/at/all",
]  # fmt: skip
AFTERWARDS = [
    ["--help"],
    ["infer", "Where is the owl?", "--domain", "lake", "inference.max_new_tokens=4"],
    ["compare", "evaluation.max_examples=3"],
    ["analyze", "latest"],
    ["report", "latest"],
    ["export", "latest", "--data-type", "loss", "--output", "exported"],
    ["experiment", "list"],
    ["sync", "--status"],
]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and those for types alone count, too."""
    graph = grimp.build_graph("training_lens", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds what the package requires, and nothing else; without pip."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in _required(PROJECT["project"]["dependencies"]):
        _link(distribution, packages)
    (packages / "training_lens.pth").write_text(str(ROOT / "src"))
    return folder / "bin/python"


def _required(requirements: Iterable[str]) -> Iterator[metadata.Distribution]:
    """The installed distributions that the requirements name, and all that these require, each once."""
    waiting, extras = [Requirement(text) for text in requirements], dict[str, set[str]]()
    while waiting:
        requirement = waiting.pop()
        name, new = canonicalize_name(requirement.name), {"", *requirement.extras}
        if new <= extras.get(name, set()):
            continue
        if name not in extras:
            yield metadata.distribution(name)
        extras[name] = extras.get(name, set()) | new
        for further in map(Requirement, metadata.distribution(name).requires or ()):
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras[name]):
                waiting.append(further)


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    """Link what a distribution installed: whole packages, and of a folder that several share its own part."""
    for file in _files(distribution):
        source, place = Path(str(distribution.locate_file(""))), packages
        for part in file.parts if ".." not in file.parts else ():
            source, place = source / part, place / part
            if place.is_symlink():
                break
            if source.is_file() or (source / "__init__.py").is_file():
                place.symlink_to(source)
                break
            place.mkdir(exist_ok=True)


def _files(distribution: metadata.Distribution) -> Sequence[PurePath]:
    """What it installed; only its packages where an old setup.py did, which keeps no record of files."""
    if distribution.read_text("RECORD") is not None:
        return distribution.files or ()
    return [PurePath(name) for name in (distribution.read_text("top_level.txt") or "").split()]


def run(python: Path | str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    call = [str(python), *arguments]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=250)


def imports(
    run_code: Callable[[str], subprocess.CompletedProcess[str]], *names: str, each_first: bool
) -> dict[str, Any]:
    """What `IMPORTS` finds where this runs it, and which packages of these names are there."""
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    given = {
        "HEAVY": HEAVY,
        "NAMES": names,
        "EACH_FIRST": each_first,
        "PUBLIC": PUBLIC,
        "FLOORS": [room for layer in reversed(layers) for room in layer.split(" | ")],
    }
    code = "\n".join(f"{name} = {value!r}" for name, value in given.items()) + IMPORTS
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.slow
def test_without_extras_every_module_imports_first_and_every_public_name_resolves(bare: Path, tmp_path: Path) -> None:

    def run_bare(code: str) -> subprocess.CompletedProcess[str]:
        return run(bare, "-W", "error::ImportWarning", "-c", code, cwd=tmp_path)

    said = imports(run_bare, *EXTRAS, *DEVELOPMENT, each_first=True)
    assert (said["there"], said["heavy"], said["broken"]) == ([], [], [])
    assert said["modules"] > 200


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] in (*HIDDEN, "training_lens")]:
    del sys.modules[name]
sys.meta_path.insert(0, Hidden())
"""


def test_every_module_imports_and_every_public_name_resolves_where_the_extras_are_hidden(tmp_path: Path) -> None:
    """In a fork, which has imported what the package requires."""

    def fork_code(code: str) -> subprocess.CompletedProcess[str]:
        (script := tmp_path / "imports.py").write_text(f"HIDDEN = {EXTRAS!r}\n{HIDE}{code}")
        return run_python([sys.executable, "-P", str(script)])

    said = imports(fork_code, each_first=False)
    assert said["broken"] == [] and said["modules"] > 200


@pytest.fixture(scope="session")
def trained_bare(
    bare: Path, few_rows: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with a run that the bare environment trained, connected to what is not there, and what was printed.

    Other commands follow in the same process: importing torch and transformers takes longer than any of them.
    """
    folder, rows = tmp_path_factory.mktemp("work"), [f"data.{split}={files}" for split, files in few_rows.items()]
    result = run(bare, "-c", COMMANDS, json.dumps([[*TRAIN, *rows], *AFTERWARDS]), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "extra"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio"), ("mirror", "s3")]
)
def test_without_extras_a_run_trains_and_what_is_missing_is_one_line(
    trained_bare: tuple[Path, list[dict[str, Any]]], name: str, extra: str
) -> None:
    folder, (train, *_) = trained_bare
    assert train["code"] == 0, train
    (log,) = folder.rglob("run.log")
    about = [line for line in log.read_text().splitlines() if f" WARNING {name}: " in line]
    assert len(about) == 1 and f"pip install 'training-lens[{extra}]'" in about[0]
    assert " ".join(train["out"].split()).count(f"pip install 'training-lens[{extra}]'") == 1


@pytest.mark.slow
def test_without_extras_every_command_that_needs_none_works(trained_bare: tuple[Path, list[dict[str, Any]]]) -> None:
    _, told = trained_bare
    assert [one["call"] for one in told if one["code"]] == [], told
    status = " ".join(told[-1]["out"].split())
    assert all(name in status for name in ("wandb", "mlflow", "trackio", "mirror", "unavailable"))


def test_with_all_extras_every_integration_works_here_or_says_what_else_is_missing(finished_run: Any) -> None:
    record = RunRecord(finished_run, EVERYWHERE)
    asked = [one.build(record) for one in list_integrations(record.config)]
    assert {one.name for one in asked} == {"tensorboard", "wandb", "mlflow", "trackio", "mirror", "hub"}
    for integration in asked:
        try:
            integration.require()
        except IntegrationError as error:
            assert integration.name == "hub" and "HF_TOKEN" in str(error)


def test_the_extras_of_development_are_installed() -> None:
    wanted = [text for text in PROJECT["project"]["optional-dependencies"]["dev"] if text.startswith("training-lens[")]
    (own,) = map(Requirement, wanted)
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, [text for extra in own.extras for text in extras[extra]]):
        assert requirement.specifier.contains(metadata.version(requirement.name)), requirement
