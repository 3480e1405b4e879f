"""`training-lens push`: a finished run to the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from training_lens.cli.common import Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.integrations.hub import HuggingFaceIntegration
    from training_lens.integrations.hub_files import PushPlan

RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id or folder, an experiment (its last run), 'latest', or a mirror's."),
]
RepoName = Annotated[
    str | None, typer.Argument(metavar="[REPO]", help="owner/name; without it, the run's own tracking.hub.repo.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")]
Checkpoints = Annotated[bool, typer.Option("--checkpoints", help="Send the run's checkpoints, too.")]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH", help="Push to this branch; made where it is missing.")]


def push(
    run: RunName,
    repo: RepoName = None,
    *,
    dry_run: DryRun = False,
    public: Public = False,
    checkpoints: Checkpoints = False,
    revision: Revision = None,
    options: CommandOptions,
) -> None:
    """Push a run's adapter, tokenizer, model card and record to the Hugging Face hub; what is there is not sent again.

    Examples: training-lens push latest me/my-adapter --dry-run; training-lens push RUN me/my-adapter --checkpoints
    """
    with command(options) as screen:
        repo, options = options.split_argument(repo)
        refuse_unused(options.words, ("output.", "tracking.hub."), "push sends a run as it is.")
        if repo and (other := next((text for text in options.words if text.startswith("tracking.hub.repo=")), None)):
            raise ConfigurationError(f"{repo} and {other} both name a repository; keep one.")
        asked = {"repo": repo, "revision": revision, "checkpoints": checkpoints or None}
        flags: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if public:
            flags["private"] = False
        settings = load_config(options, {"tracking": {"hub": flags}})
        hub = _open_hub(run, settings)
        if dry_run:
            plan = hub.plan()
            _show_plan(screen, plan, hub.repo)
            screen.print_result({**_describe_plan(plan, hub.repo), "sent": False, "url": ""})
        else:
            with screen.console.status(Text(f"sending to {hub.repo}")):
                pushed = hub.push()
            screen.print_line(f"sent in {pushed.url}" if pushed.url else f"{hub.repo} has all of it already")
            screen.print_result({**_describe_plan(pushed.plan, hub.repo), "sent": bool(pushed.url), "url": pushed.url})


def _open_hub(run: str, settings: TrainingConfig) -> HuggingFaceIntegration:
    folder = locate_run(run, settings.output, finished=True)
    from training_lens.config.run_config import require_consent
    from training_lens.integrations.hub import HuggingFaceIntegration
    from training_lens.integrations.record import RunRecord

    given = {"tracking": {"hub": settings.explicit_values()["tracking"]["hub"]}}
    record = RunRecord(folder, given)
    if record.config.tracking.hub.repo is None:
        raise ConfigurationError(
            f"the run {folder.run_id} names no tracking.hub.repo; give one: training-lens push {run} OWNER/NAME."
        )
    require_consent(folder.root, record.config, given, "tracking.hub")
    return HuggingFaceIntegration(record)


def _describe_plan(plan: PushPlan, repo: str) -> dict[str, Any]:
    """The plan as JSON values."""
    files = [(file, state) for state in ("send", "there") for file in getattr(plan, state)]
    return {
        "repo": repo,
        "files": [{"path": f.path, "bytes": f.size, "sha256": f.sha256, "state": state} for f, state in files],
        "delete": list(plan.delete),
        "bytes": plan.size,
        "compared": not plan.unknown,
        "why_not": plan.unknown,
    }


def _show_plan(screen: Screen, plan: PushPlan, repo: str) -> None:
    from training_lens.utils.formatting import format_size

    states = {"send": plan.send, "is there": plan.there}
    rows = [(file.path, format_size(file.size), state) for state, files in states.items() for file in files]
    rows += [(folder, "", "delete") for folder in plan.delete]
    show_table(screen.console, "", ("file", "size", ""), rows)
    if plan.unknown:
        screen.print_line(f"not compared with {repo}: {plan.unknown}")
    screen.print_line(f"{len(plan.send)} files, {format_size(plan.size)}, would be sent to {repo}; nothing was sent")
