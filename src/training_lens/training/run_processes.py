"""A run on several processes: who writes what, what the others run along, and how torchrun's restarts find the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.training.lens_callback import build_capture_callback
from training_lens.training.loop.callbacks import Callback
from training_lens.training.plan import RunPlan
from training_lens.training.samples import SampleWriter
from training_lens.utils.devices import get_device
from training_lens.utils.launch import find_launch
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)


def log_name(processes: Processes) -> str:
    """The file of a process's log in the run's logs."""
    return "run.log" if processes.is_main else f"run-process-{processes.index}.log"


def lock_run(run: RunFolder, plan: RunPlan) -> AbstractContextManager[None]:
    """The run's lock, which its main process holds for all processes."""
    return run.hold_lock() if plan.processes.is_main else nullcontext()


def require_shared_folder(run: RunFolder, processes: Processes) -> None:
    """Refuse a run whose folder some processes do not see: one writes it, and all read its checkpoints.

    Raises:
        CheckpointError: names the processes.
    """
    blind = [str(i) for i, sees in enumerate(processes.gather(run.metadata.is_dir())) if not sees]
    if blind:
        raise CheckpointError(
            f"output.base_output_dir: process {', '.join(blind)} of {processes.count} does not see the run's folder "
            f"{run.root}, which the main process wrote. Give a folder that all hosts share."
        )


def follow_passes(plan: RunPlan, scratch: ExitStack) -> Iterator[Callback]:
    """What runs the passes of the main process's lens and samples in another, where the base is sharded.

    It keeps nothing: its files are deleted with `scratch`.
    """
    config = plan.config
    if not plan.processes.is_base_sharded:
        return
    folder = Path(scratch.enter_context(TemporaryDirectory(prefix="training-lens-")))
    if lens := build_capture_callback(plan, folder / "lens"):
        yield lens
    if config.tracking.samples and config.model.backend != "unsloth":
        yield SampleWriter(folder / "samples.jsonl", plan)


def find_restarted_run(config: TrainingConfig) -> RunFolder | None:
    """The run that this torchrun began before it started its processes anew; None if there is none.

    The main process decides for all: a host that comes back does not know of a restart.
    """
    output, launch = config.output, find_launch()
    processes = Processes(get_device(config.model.device), timeout_seconds=config.distributed.timeout_seconds)
    found: str | None = None
    if processes.is_main and launch:
        folders = sorted(runs_folder(output.base_output_dir, output.experiment_name).glob("*"), reverse=True)
        runs = (RunFolder(folder) for folder in folders if (folder / "metadata").is_dir())
        same = (run for run in runs if run.read_metadata("environment.json").get("launch") == launch)
        found = next((str(run.root) for run in same if run.status != "finished"), None)
    found = processes.from_main(found)
    if found is None:
        return None
    logger.warning("torchrun started the processes anew: %s goes on", Path(found).name)
    return RunFolder(Path(found))
