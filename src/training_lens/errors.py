"""The expected errors: each message says what was found, where, and what to do.

The command prints them as one paragraph and exits with `exit_code`. Any other exception is a bug and shows a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 50


class TrainingLensError(Exception):
    """An expected failure. `exit_code` is the command's: 1 the run failed, 2 wrong usage or config."""

    exit_code = 1


class ConfigurationError(TrainingLensError, ValueError):
    """Wrong usage or configuration; `problems` holds all problems found."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        count = len(self.problems)
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        lines += [f"  - and {count - len(lines):,} more"] if count > len(lines) else []
        head = f"{count:,} problems in the configuration:"
        super().__init__("\n".join([head, *lines]) if count > 1 else self.problems[0])


class DatasetError(TrainingLensError):
    """A data file that is missing, broken, or lacks what training needs.

    Args:
        kind: why a row cannot be used, in words without its details, so that such rows can be counted together.
    """

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class ModelLoadingError(TrainingLensError):
    """A model or tokenizer that cannot be found or loaded."""


class AdapterError(TrainingLensError):
    """An adapter that does not fit its base model."""


class MergeError(TrainingLensError):
    """A merged model that does not equal base and adapter, or cannot be written."""


class OutputError(TrainingLensError):
    """A folder that another process filled in the meantime."""


class TrainingError(TrainingLensError):
    """Training cannot continue, for example because the loss is not finite."""


class EvaluationError(TrainingLensError):
    """A model that could not be evaluated; never ends a training run."""


class OutOfMemoryError(TrainingError):
    """Memory ran out while loading, training or generating."""


class LensError(TrainingLensError):
    """Nothing to capture, or captures that are missing, damaged or do not fit."""


class IntegrationError(TrainingLensError):
    """A tracker, hub or storage that cannot be used or refused data; never ends a run.

    Args:
        lasting: retrying is useless until someone changes something.
        retry_after: seconds after which the service accepts a retry; None: unknown.
    """

    def __init__(self, message: str, *, lasting: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.lasting, self.retry_after = lasting, retry_after


class EstimateError(TrainingLensError):
    """Time and memory of a run cannot be estimated; it can still be trained."""


class CheckpointError(TrainingLensError):
    """A run folder or checkpoint that is missing, damaged or belongs to another run."""


class DamagedFileError(CheckpointError):
    """A file whose hash differs from the recorded one."""


class InterruptedRunError(TrainingLensError):
    """A signal stopped the run, which saved itself first; exits with 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number, self.exit_code = signal_number, 128 + signal_number


class ProcessLostError(TrainingLensError):
    """Another process of the run ended or cannot be reached, so that this one ends, too."""


class PrunedRunError(TrainingLensError):
    """A callback stopped the run early because it is not worth finishing. Not a failure of the run."""
