"""The errors that Training Lens expects: each says what was found, where, and what to do.

The command prints them as one paragraph and exits with `exit_code`; anything else is a bug and shows a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 50


class TrainingLensError(Exception):
    """An expected failure. `exit_code` is what the command returns: 1 the run failed, 2 wrong usage or config."""

    exit_code = 1


class ConfigurationError(TrainingLensError, ValueError):
    """Wrong usage or configuration; `problems` holds every one that was found."""

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
        kind: of a row that cannot be used: the reason in words that other rows share, by which they are counted.
    """

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class ModelLoadingError(TrainingLensError):
    """A model or tokenizer that cannot be found or loaded."""


class AdapterError(TrainingLensError):
    """An adapter that does not fit its base model."""


class MergeError(TrainingLensError):
    """A merged model that is not what its adapter is, or cannot be written."""


class OutputError(TrainingLensError):
    """A folder that another process filled while this one made its content."""


class TrainingError(TrainingLensError):
    """Training cannot go on: for one, the loss is not finite."""


class EvaluationError(TrainingLensError):
    """A model that could not be evaluated; never ends a training run."""


class OutOfMemoryError(TrainingError):
    """Memory ran out in loading, training or answering."""


class LensError(TrainingLensError):
    """Nothing to capture, or captures that are missing, damaged, or of something else."""


class IntegrationError(TrainingLensError):
    """A tracker, hub or storage that cannot be used, or did not take what was sent; never ends a run.

    Args:
        lasting: trying again is useless until someone changes something.
        retry_after: seconds after which the service wants to be asked again; None: it did not say.
    """

    def __init__(self, message: str, *, lasting: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.lasting, self.retry_after = lasting, retry_after


class EstimateError(TrainingLensError):
    """A run of which duration and memory cannot be measured before it; it can be trained all the same."""


class CheckpointError(TrainingLensError):
    """A run folder or checkpoint that is missing, damaged, or of another run."""


class DamagedFileError(CheckpointError):
    """A file that is no longer what was written, by its hash."""


class InterruptedRunError(TrainingLensError):
    """The run was asked to stop by a signal and saved itself first; exits with 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number, self.exit_code = signal_number, 128 + signal_number

    def with_advice(self, advice: str) -> InterruptedRunError:
        """The same error that also says what to do."""
        return InterruptedRunError(f"{self} {advice}", self.signal_number)


class PrunedRunError(TrainingLensError):
    """A callback ended the run before its last step, because it is not worth finishing: no failure of the run."""
