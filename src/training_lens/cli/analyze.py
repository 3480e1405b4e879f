"""`training-lens analyze`: what the lens saw of a run, on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import degrees, isnan
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from training_lens.cli.common import CONSENT, Screen, command, load_config, show_table
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzers
from training_lens.cli.options import CommandOptions
from training_lens.errors import CheckpointError, ConfigurationError, LensError
from training_lens.utils.formatting import format_seconds

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import AdapterComparison, Analysis
    from training_lens.analysis.findings import Finding
    from training_lens.analysis.findings.interventions import Question

Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Compare with a second run: angles between what the two learned.")
]
Test = Annotated[
    str | None,
    typer.Option(
        "--test",
        metavar="[rate,rank,targets,epoch]",
        help="Decide findings by short runs with one setting changed (trains; the cost is said first): a higher and a "
        "lower rate, rank, more modules, one more epoch. Without a list: what is inconclusive.",
    ),
]
TestSteps = Annotated[
    int | None, typer.Option("--test-steps", min=2, metavar="STEPS", help="Steps of each run of --test.")
]
MOST_ROWS = 12  # of a table on the screen
MARKS = {"problem": "red", "warning": "yellow", "note": "cyan", "fine": "green"}
MEANING = (
    "dW is what the adapter adds to a weight W; share: of the sum of |dW|² over all modules. The others are medians "
    "over a layer's modules: strength, |dW| / |W|; effective rank, how many directions dW uses; 90% rank, how many of "
    "them hold 90% of |dW|²."
)
ROUTING = "used as evenly as: so many experts with equal shares have the entropy of these; least, most: shares of one."
ALIKE = (
    "cosine of dW: 1 is the same update, 0 an unrelated one; angles are between what the two updates write: 0° is the "
    "same directions, 90° none shared."
)


def analyze(
    run: RunPlace = "latest",
    *,
    against: Against = None,
    test: Test = None,
    test_steps: TestSteps = None,
    base: BaseFolder = None,
    options: CommandOptions,
) -> None:
    """Say what an adapter did while it trained, and what is wrong, with evidence: finished, running or broken off.

    Examples: training-lens analyze; training-lens analyze RUN --test rate,rank;
    training-lens analyze RUN --against RUN2; training-lens analyze path/to/trainer_output
    """
    with command(options) as screen:
        if test_steps and not test:
            raise ConfigurationError("--test-steps says how long the runs of --test are; give --test, too.")
        stray = [word for word in options.words if "=" not in word]  # --test itself takes only what it knows
        questions = _parse_questions(stray[0] if stray and test == "open" else test) if test else None
        consent = [word for word in options.words if test and word.startswith(CONSENT)]
        others = options.with_words([word for word in options.words if word not in consent])
        analyzer, other = open_analyzers(run, against, others, base)
        comparison = analyzer.compare(other) if other else None
        analysis = analyzer.analyze()
        if test:
            given = load_config(options.with_words(consent)).explicit_values()
            _run_tests(screen, analysis, questions, test_steps, given)
            analysis = analyzer.analyze()
        _show_analysis(screen, analysis)
        values = analysis.values()
        if comparison:
            _show_likeness(screen, comparison)
            values["against"] = comparison.values()
        screen.print_result(values)


def _parse_questions(test: str) -> tuple[Question, ...] | None:
    """The questions that `--test` lists; None: those that are open."""
    from training_lens.analysis.findings.interventions import QUESTIONS

    if test == "open":
        return None
    given = test.split(",")
    if wrong := [name for name in given if name not in QUESTIONS]:
        raise ConfigurationError(f"--test: '{wrong[0]}' is none of {', '.join(QUESTIONS)}.")
    return tuple(question for question in QUESTIONS if question in given)


def _run_tests(
    screen: Screen,
    analysis: Analysis,
    questions: tuple[Question, ...] | None,
    steps: int | None,
    given: dict[str, Any],
) -> None:
    """Say what the tests cost, run them, and print what each measured."""
    from training_lens.analysis.findings.interventions import list_open_questions
    from training_lens.display.progress import Progress
    from training_lens.runs.run_folder import RunFolder
    from training_lens.training.counterfactuals import RunTests

    wanted = questions or list_open_questions(analysis.findings)
    if not wanted:
        screen.print_line("no finding is inconclusive that a test decides; --test rate,rank,targets,epoch runs any")
        return
    run = RunFolder(analysis.recording.folder)
    if not run.metadata.is_dir():
        raise LensError(f"--test trains variations of a run of training-lens train; {run.root} is none. Leave it out.")
    tests, planned = RunTests(run, Progress(screen.console), given), []
    for question in wanted:
        try:
            planned.append(tests.plan(question, steps))
        except (ConfigurationError, CheckpointError) as error:
            if questions:
                raise
            screen.print_line(f"{question} is not tested: {error}")
    for test in planned:
        screen.print_line(test.describe_cost())
    for answer in tests.measure(planned) if planned else ():
        screen.print_line(f"{answer.question}: {answer.describe()}; took {format_seconds(answer.seconds)}")


def _show_analysis(screen: Screen, analysis: Analysis) -> None:
    from training_lens.analysis.reports.executive import three_lines

    console, recording = screen.console, analysis.recording
    console.print(Text.assemble((recording.name, "bold"), f" ({recording.status})"))
    for line in three_lines(analysis):
        console.print(Text(f"  {line}"))
    _show_layers(screen, analysis.results.get("weights", {}))
    _show_router_load(screen, analysis.results.get("router_load", {}))
    console.print("\nfindings", style="bold")
    for finding in analysis.findings:
        _show_finding(screen, finding)


def _show_finding(screen: Screen, finding: Finding) -> None:
    mark = finding.confidence if finding.confidence == "inconclusive" else finding.severity
    where = f" ({finding.where})" if finding.where else ""
    screen.console.print(Text.assemble((f"{mark}: ", MARKS[finding.severity]), (finding.title, "bold"), where))
    wrong = finding.severity in ("problem", "warning")
    rest = {
        "measured": finding.measured,
        "threshold": f"{finding.threshold} ({finding.source})" if wrong else "",
        "do": finding.action,
        "would decide": finding.decide,
    }
    for name, text in rest.items() if finding.severity != "fine" else ():
        if text:
            screen.console.print(Text(f"    {name}: {text}"))


def _show_layers(screen: Screen, weights: Mapping[str, Any]) -> None:
    """Print the layers with the largest shares of the update, in their order."""
    shares = {layer: share for layer, share in weights.get("share_by_layer", {}).items() if share is not None}
    largest = sorted(shares, key=lambda layer: -shares[layer])[:MOST_ROWS]
    if not largest:
        return
    left_out = f"; the {MOST_ROWS} largest of {len(shares)}" if len(shares) > MOST_ROWS else ""
    columns, rows = ("layer", "share of the update", "strength", "effective rank", "90% rank"), []
    for layer in (layer for layer in shares if layer in largest):
        number = None if layer == "outside" else int(layer)
        modules = [m for m in weights["modules"] if m["layer"] == number]
        forms = {"strength": "{:.2%}", "effective_rank": "{:.3g}", "energy_rank": "{:.3g}"}
        typical = [_format_median(modules, measure, form) for measure, form in forms.items()]
        rows.append([str(layer), f"{shares[layer]:.1%}", *typical])
    show_table(screen.console, f"what changed, by layer{left_out}", columns, rows, right=columns)
    screen.console.print(MEANING)


def _show_router_load(screen: Screen, load: Mapping[str, Any]) -> None:
    """Print how evenly the routers use the experts: the least even layers, in their order."""
    layers = load.get("layers", {})
    least = sorted(layers, key=lambda path: layers[path]["effective"] / len(layers[path]["share"]))[:MOST_ROWS]
    if not least:
        return
    left_out = f"; the {MOST_ROWS} least even of {len(layers)}" if len(layers) > MOST_ROWS else ""
    columns = ("experts", "used as evenly as", "by the base", "least", "most", "without a token")
    rows = []
    for path in (path for path in layers if path in least):
        own = layers[path]
        known = [share for share in own["share"] if share is not None]
        even = [f"{own[key]:.3g}" for key in ("effective", "base_effective")]
        ends = [f"{end(known):.1%}" if known else "-" for end in (min, max)]
        rows.append([path, str(len(own["share"])), *even, *ends, str(len(own["unused"]))])
    title = f"what the routers give the experts, of the probe's tokens at step {load['step']}{left_out}"
    show_table(screen.console, title, ("layer", *columns), rows, right=columns)
    screen.console.print(ROUTING)


def _format_median(modules: Sequence[Mapping[str, Any]], measure: str, form: str) -> str:
    known = [module[measure] for module in modules if module[measure] is not None]
    return form.format(median(known)) if known else "-"


def _show_likeness(screen: Screen, comparison: AdapterComparison) -> None:
    """Print the modules in which two runs differ most, and the median over all modules."""
    modules, middle = comparison.modules, comparison.values()["median_cosine"]
    known = {name: alike for name, alike in modules.items() if not isnan(alike.cosine)}
    least = sorted(known, key=lambda name: known[name].cosine)[:MOST_ROWS]
    left_out = f"; the {MOST_ROWS} least alike of {len(modules)} modules" if len(modules) > len(least) else ""
    rows, numbers = [], ("cosine of dW", "angles")
    for name in least:
        angles = [f"{degrees(angle):.0f}°" for angle in known[name].columns]
        rows.append((name, f"{known[name].cosine:.3f}", " to ".join(dict.fromkeys(angles[:1] + angles[-1:]))))
    title = f"{' and '.join(comparison.names)}{left_out}"
    show_table(screen.console, title, ("module", *numbers), rows, right=numbers)
    if middle is not None:
        screen.console.print(f"median cosine over {len(modules)} modules: {middle:.3f}")
    screen.console.print(ALIKE)
    if alone := [*comparison.only_first, *comparison.only_second]:
        screen.print_line(f"adapted in one of the two alone: {', '.join(alone)}")
