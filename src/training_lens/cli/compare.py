"""`training-lens compare`: the adapter against its base on the same held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_lens.cli.common import (
    ConfigFile,
    Debug,
    FinishedRun,
    Json,
    Overrides,
    Screen,
    command,
    device_of,
    load_config,
    refuse_unused,
)

if TYPE_CHECKING:
    from training_lens.data.types import Example
    from training_lens.evaluation.comparison import Answers, Comparison
    from training_lens.evaluation.judging import Judgement

SHOWN = 3


def compare(
    overrides: Overrides = None,
    run: FinishedRun = "latest",
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate base and adapter on the run's validation rows: loss, exact match, and sample answers side by side."""
    with command(json, debug) as screen:
        settings = load_config(config, overrides)
        from training_lens.evaluation.judging import compare_run
        from training_lens.utils.files import write_json
        from training_lens.utils.progress import Progress
        from training_lens.utils.runs import find_run

        refuse_unused(
            overrides, ("evaluation.", "output.", "model.device"), "compare judges with the run's own config."
        )
        found = find_run(run, settings.output.base_output_dir, settings.output.experiment_name, finished=True)
        result = compare_run(found, settings.evaluation, Progress(screen.console), device_of(settings))
        report = {"run": str(found.root), **result.comparison.as_json()}
        write_json(found.reports / "compare.json", report)
        show(screen, result)
        screen.console.print(f"\nsaved in {found.root}", markup=False, soft_wrap=True)
        screen.result(report)


def show(screen: Screen, judgement: Judgement) -> None:
    """The table of scores, and some rows with the answers of base and adapter side by side."""
    _show_scores(screen, judgement.comparison)
    _show_samples(screen, judgement.examples, judgement.base, judgement.adapter)


def _show_scores(screen: Screen, comparison: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"on {comparison.rows} validation rows", title_justify="left")
    for column in ("", "loss (nats/token)", "exact match"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("base", comparison.base), ("adapter", comparison.adapter)]
    controls = [("adapter, wrong domain", comparison.wrong_domain), ("adapter, no domain", comparison.no_domain)]
    rows += [(name, scores) for name, scores in controls if scores]
    rows += [(f"  {who}, {d}", s[who]) for d, s in comparison.by_domain.items() for who in ("base", "adapter")]
    for name, scores in rows:
        matched = "-" if scores.exact_match is None else f"{scores.exact_match:.1%}"
        table.add_row(Text(name), f"{scores.loss:.4f}", matched)
    screen.console.print(table)


def _show_samples(screen: Screen, examples: list[Example], base: Answers, adapter: Answers) -> None:
    from rich.table import Table
    from rich.text import Text

    from training_lens.data.types import Message
    from training_lens.evaluation.comparison import samples

    table = Table(title=f"{SHOWN} of these rows", title_justify="left", show_lines=True)
    for column in ("prompt", "expected", "base", "adapter"):
        table.add_column(column, ratio=1)
    for i in samples(examples, SHOWN):
        asked = examples[i].messages[-2] if not examples[i].is_text else Message("user", "(plain text)")
        domain = f"[{examples[i].domain}] " if examples[i].domain else ""
        cells = (f"{domain}{asked.text}\n{asked.input}", examples[i].messages[-1].text, base.texts[i], adapter.texts[i])
        table.add_row(*(Text(_short(cell)) for cell in cells))
    screen.console.print(table)


def _short(text: str, limit: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
