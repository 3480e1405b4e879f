"""`training-lens compare`: an adapter against its base, or against another run, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import AdapterRun, ConfigFile, Debug, Json, Overrides, command, load_adapter_config
from training_lens.cli.judgement import USED, finish, opened

if TYPE_CHECKING:
    from training_lens.inference.session import Session

Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Another run or adapter to compare with, in place of the base.")
]


def compare(
    overrides: Overrides = None,
    run: AdapterRun = None,
    against: Against = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an adapter with its base on the same rows: losses, scored answers, differences with intervals, controls.

    Examples: training-lens compare; training-lens compare --run RUN evaluation.max_examples=200;
    training-lens compare --run RUN --against OTHER_RUN; training-lens compare data.validation=other_rows.jsonl
    """
    with command(json, debug) as screen:
        settings = load_adapter_config(config, overrides, run, USED)
        judge, examples, folder = opened(screen, settings)
        _require_adapter(judge.session)
        if against is None:
            result, name = judge.compare(examples), "compare"
        else:
            from training_lens.evaluation.judging import Judge
            from training_lens.inference.session import open_session

            other = open_session(settings.resolved(inference={"adapter": against}))
            _require_adapter(other)
            result = judge.against(Judge(other, settings.evaluation, judge.progress), examples)
            name = f"compare-with-{Path(other.source).name}"
        finish(screen, result, folder, name, {"run": judge.session.source})


def _require_adapter(session: Session) -> None:
    from training_lens.errors import ConfigurationError

    if not session.has_adapter:
        raise ConfigurationError(
            f"'{session.source}' has no adapter to compare; name a run or an adapter folder, or judge a model "
            "alone with training-lens baseline."
        )
