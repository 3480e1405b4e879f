"""Shared by all tests: tiny real models, real files, and shared data where it is there."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hub_server import TOKEN, Hub, use_hub  # type: ignore[import-not-found]

# Before torch and transformers are imported: offline, quiet, and two tests at a time do not fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
STATE = tempfile.mkdtemp(prefix="training-lens-state-")  # of this process: what is allowed here stays here
os.environ["XDG_STATE_HOME"] = STATE
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

os.fsync = lambda descriptor: None  # no test cuts the power, and waiting for the disk is a third of a short run

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_unconfigure() -> None:
    """Remove what this process made when it began; each worker has its own."""
    shutil.rmtree(STATE, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Look for no garbage while the tests and what they need are imported: there is none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _freeze_imports()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    """Pass over also what the tests of a file imported."""
    result = yield
    if nextitem is not None and nextitem.path != item.path and len(sys.modules) > _frozen_modules + 50:
        _freeze_imports()
    return result


_frozen_modules = 0


def _freeze_imports() -> None:
    """What is imported by now lives until the end, and is passed over where garbage is collected."""
    global _frozen_modules
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    _frozen_modules = len(sys.modules)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_once(name, make)`: a folder of this name that the first of all workers fills by `make(folder)`."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return fill


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(params=["compiled", "by torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the kernels in C, and again as on a machine that has no compiler."""
    from training_lens.models.fast.native import library as calls

    if request.param == "by torch":
        monkeypatch.setattr(calls, "load_library", lambda: None)
    elif calls.load_library() is None:
        pytest.skip("no C compiler here")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSONL (or JSON, by the name's ending) and gives the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Any:
    from training_lens.config.schema import ModelSection
    from training_lens.models.factory import load_tokenizer

    return load_tokenizer(ModelSection())


@pytest.fixture(scope="session")
def tiny_base(make_once: Callable[..., Path]) -> Path:
    """A random model with the embedded tokenizer, of which a step takes milliseconds."""
    from tiny_models import save_tiny_model

    return make_once("tiny_base", lambda folder: save_tiny_model(folder, vocab_size=1024, initializer_range=0.3))


@pytest.fixture(scope="session")
def few_rows(make_once: Callable[..., Path]) -> dict[str, list[str]]:
    """The first short rows of the embedded set, of all its domains, as a data section: read and judged at once."""
    folder = make_once("rows", lambda folder: _write_short_rows(folder, train=240, validation=24))
    return {split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation")}


def _write_short_rows(folder: Path, **counts: int) -> None:
    from training_lens import embedded

    files = {"train": embedded.PATHS[embedded.TRAIN], "validation": embedded.PATHS[embedded.HELDOUT]}
    for split, count in counts.items():
        lines = files[split].read_text(encoding="utf-8").splitlines(keepends=True)
        short = [line for line in lines if len(line) <= 240]
        (folder / f"{split}.jsonl").write_text("".join(short[:count]), encoding="utf-8")


@pytest.fixture(scope="session")
def small_config_in(few_rows: dict[str, Any], tiny_base: Path) -> Callable[..., Any]:
    """`small_config` for fixtures that outlive a test: its first argument is the folder of outputs.

    The model is `tiny_base`, and the lens is off, where no `model` and no `lens` section is given.
    """
    from training_lens.config.compose import validate_values

    def build(outputs: Path, **sections: dict[str, Any]) -> Any:
        own = sections.get("data", {})
        splits = () if "train" in own else ("train",) if "val_ratio" in own else ("train", "validation")
        values: dict[str, Any] = {
            "model": {"id": str(tiny_base)},
            "data": {"max_examples": 48, **{split: few_rows[split] for split in splits}},
            "training": {"epochs": 1, "batch_size": 8, "lr": 3e-3},
            "peft": {"r": 4},
            "lens": {"enabled": False},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
            "output": {"base_output_dir": str(outputs)},
        }
        if "lens" in sections:
            values["lens"] = {"report": False}
        for name, keys in sections.items():
            values[name] = {**values.get(name, {}), **keys}
        return validate_values(values)

    return build


@pytest.fixture
def small_config(tmp_path: Path, small_config_in: Callable[..., Any]) -> Callable[..., Any]:
    """A config of a short run of a tiny model on a few embedded rows, with sections replaced by keyword."""
    return partial(small_config_in, tmp_path / "outputs")


@pytest.fixture(scope="session")
def finished_run(make_once: Callable[..., Path]) -> Any:
    """The folder of a short finished run of a tiny model on embedded rows of all three domains; for reading alone."""
    from tiny_models import save_tiny_model

    def make(folder: Path) -> None:
        own = {"vocab_size": 659, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 5}
        base = save_tiny_model(folder / "base", initializer_range=0.3, **own)
        _train_domains(folder, model={"id": str(base)}, training={"epochs": 1, "lr": 3e-3})

    return _share(_only_run(make_once("finished", make)))


@pytest.fixture(scope="session")
def embedded_run(make_once: Callable[..., Path]) -> Any:
    """The same of the embedded model, whose answers are words and which learns in a few steps; for reading alone."""
    return _share(_only_run(make_once("embedded", _train_domains)))


@pytest.fixture(scope="session")
def text_run(make_once: Callable[..., Path]) -> Any:
    """The folder of a short finished run on plain texts alone, with the domains a and b; for reading alone."""

    def make(folder: Path) -> None:
        rows = [{"text": f"The cat {i} sat on the mat.", "domain": "ab"[i % 2]} for i in range(16)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": [str(folder / "rows.jsonl")]}
        _train(folder, data=data, training={"epochs": 1}, tracking={"tensorboard": False})

    return _share(_only_run(make_once("texts", make)))


def _train_domains(folder: Path, **sections: dict[str, Any]) -> None:
    _write_short_rows(folder, validation=30)  # so many that a verdict's evidence is not thin
    data = {"max_examples": 64, "validation": [str(folder / "validation.jsonl")]}
    _train(folder, data=data, **{"training": {"epochs": 1}, **sections})


def _train(folder: Path, **sections: dict[str, Any]) -> None:
    from training_lens import TrainingConfig, TrainingWrapper

    output = {"base_output_dir": str(folder / "outputs")}
    TrainingWrapper(TrainingConfig.model_validate({**sections, "output": output})).train()


def _only_run(folder: Path) -> Any:
    from training_lens.runs.run_folder import RunFolder

    (root,) = (folder / "outputs/experiments/default/runs").iterdir()
    return RunFolder(root)


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    server = Hub(tmp_path_factory.mktemp("hub"))
    yield server
    server.kill()


@pytest.fixture
def hub(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A running hub without repositories, for this process and its children; logged in with a token that may write."""
    from huggingface_hub import constants

    server = hub_server.empty().start()
    use_hub(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return server


@pytest.fixture(autouse=True)
def shared_runs_stay_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that writes into a run that others read takes a copy (`own_run`), or fails here."""
    yield
    if not {"finished_run", "embedded_run", "text_run"} & set(request.fixturenames):
        return
    for root, before in _shared_runs.items():
        now = _list_files(root)
        _shared_runs[root] = now  # one test fails, not all that follow
        changed = sorted({path.relative_to(root).as_posix() for path, _, _ in before ^ now})
        assert not changed, f"{request.node.name} wrote into a run that other tests read: {changed}"


_shared_runs: dict[Path, set[tuple[Path, int, int]]] = {}


def _share(run: Any) -> Any:
    _shared_runs[run.root] = _list_files(run.root)
    return run


def _list_files(root: Path) -> set[tuple[Path, int, int]]:
    stats = [(path, path.stat()) for path in root.rglob("*") if path.is_file()]
    return {(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats}


@pytest.fixture
def forked_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python processes that a command starts and waits for are forks of this one; see `forked`."""
    from forked import run_python  # type: ignore[import-not-found]

    run = subprocess.run

    def run_or_fork(command: Any, **options: Any) -> Any:
        return run_python(command) if command[0] == sys.executable else run(command, **options)

    monkeypatch.setattr(subprocess, "run", run_or_fork)


@pytest.fixture
def own_run(finished_run: Any, tmp_path: Path) -> Any:
    """A copy of the finished run, to write in."""
    return type(finished_run)(Path(shutil.copytree(finished_run.root, tmp_path / "runs" / finished_run.run_id)))
