"""The public surface, pinned."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import training_lens
import training_lens.analysis
import training_lens.core
import training_lens.data
import training_lens.evaluation
import training_lens.inference
import training_lens.integrations
import training_lens.models
import training_lens.training
import training_lens.utils
from training_lens import errors

ERRORS = """AdapterError CheckpointError ConfigurationError DamagedFileError DatasetError EstimateError EvaluationError
    IntegrationError InterruptedRunError LensError MergeError ModelLoadingError OutOfMemoryError OutputError
    ProcessLostError PrunedRunError TrainingError TrainingLensError""".split()
PACKAGES = (
    training_lens, training_lens.analysis, training_lens.core, training_lens.data, training_lens.evaluation,
    training_lens.inference, training_lens.integrations, training_lens.models, training_lens.training,
    training_lens.utils,
)  # fmt: skip


POSIX_ALONE = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def test_no_module_needs_what_windows_lacks_to_be_imported() -> None:
    for path in Path(training_lens.__file__).parent.rglob("*.py"):
        imported = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imported for alias in node.names} | {
            str(node.module) for node in imported if isinstance(node, ast.ImportFrom)
        }
        assert not names & POSIX_ALONE, path


def test_public_names() -> None:
    assert training_lens.__all__ == sorted(
        [
            "CheckpointAnalyzer",
            "CheckpointManager",
            "HuggingFaceIntegration",
            "LoRACheckpointAnalyzer",
            "LoRATrainingWrapper",
            "MetricsCollector",
            "Run",
            "StandardReports",
            "TrainingConfig",
            "TrainingWrapper",
            "WandBIntegration",
            *ERRORS,
            "compose",
            "errors",
            "setup_logging",
        ]
    )
    assert training_lens.data.__all__ == [
        "Batch",
        "DataSection",
        "Example",
        "Message",
        "Preparation",
        "Row",
        "Schedule",
        "Split",
        "TextEncoder",
        "TokenDataset",
        "TokenizedExample",
        "build_renderer",
        "collate",
        "hold_out",
        "prepare_split",
        "read_examples",
        "tokenize",
    ]
    assert training_lens.models.__all__ == [
        "ModelFacts",
        "ModelSection",
        "PeftSection",
        "attach",
        "base_only",
        "count_parameters",
        "load_adapter",
        "load_model",
        "load_tokenizer",
        "read_facts",
        "save_adapter",
    ]
    assert training_lens.inference.__all__ == [
        "FileReport",
        "GeneratedAnswer",
        "InferenceSection",
        "Session",
        "answer",
        "answer_file",
        "answers",
        "generate_answers",
        "input_file",
        "open_run",
        "open_session",
        "output_file",
    ]
    assert training_lens.training.__all__ == [
        "CheckpointManager",
        "CheckpointMetadata",
        "MetricsCollector",
        "TrainingConfig",
        "TrainingWrapper",
    ]
    assert {"EvaluationSection", "ModelEvaluator", "find_run", "open_run", "validation_examples"} < set(
        training_lens.evaluation.__all__
    )
    assert training_lens.utils.__all__ == [
        "TrainingLogger",
        "format_size",
        "get_device",
        "get_logger",
        "safe_save",
        "setup_logging",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no public name 'nothing'"):
        package.nothing  # type: ignore[attr-defined] # noqa: B018


def test_every_error_is_public() -> None:
    ours = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(ours) == ERRORS
    assert all(getattr(training_lens, name) is getattr(training_lens.errors, name) for name in ours)


def signatures() -> Iterator[tuple[str, inspect.Signature]]:
    """Of the public functions, and of the constructors and public methods of the public classes."""
    for package in PACKAGES:
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isfunction(found):
                yield f"{package.__name__}.{name}", inspect.signature(found)
            for method, value in vars(found).items() if inspect.isclass(found) else ():
                function = getattr(value, "__func__", value)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{package.__name__}.{name}.{method}", inspect.signature(function)


GIVEN = {"Recording.__init__", "Session.__init__", "on_checkpoint"}  # made and called by this package, with paths


def test_whatever_takes_a_path_takes_its_text() -> None:
    paths = [
        f"{name}({parameter.name}: {parameter.annotation})"
        for name, signature in signatures()
        for parameter in signature.parameters.values()
        if "Path" in str(parameter.annotation) and not any(name.endswith(given) for given in GIVEN)
    ]
    assert len(paths) > 20 and [path for path in paths if "str" not in path] == []


def test_one_implementation_each() -> None:
    assert training_lens.LoRATrainingWrapper is training_lens.TrainingWrapper
    assert training_lens.LoRACheckpointAnalyzer is training_lens.CheckpointAnalyzer
    assert training_lens.training.TrainingConfig is training_lens.TrainingConfig
