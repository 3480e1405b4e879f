"""`training-lens validate`: what `train` would do, without training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from training_lens.cli.common import Screen, command, load_config, show_table
from training_lens.cli.missing_files import check_training
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.data.split_report import SplitReport
    from training_lens.training.estimate import RunEstimate
    from training_lens.training.plan import RunPlan

EXAMPLES = 3
ENDS = 700  # characters shown of the start and of the end of a long example
NAMED = 40  # sources and domains that a table lists


def validate(options: CommandOptions) -> None:
    """Check everything that train needs, and show what it would do: config, examples, counts, steps, an estimate.

    Reads data, tokenizer and model; trains nothing that is kept. Exit code 0 only if train would start.
    """
    with command(options) as screen:
        settings = load_config(options)
        check_training(settings)
        import yaml

        from training_lens.training.estimate import estimate_run
        from training_lens.training.run import TrainingWrapper

        plan = TrainingWrapper(settings, console=screen.console).plan()
        screen.console.print("\nthe run's config", style="bold")
        screen.print_line(yaml.safe_dump(plan.config.model_dump(), sort_keys=False).rstrip())
        _show_examples(screen, plan)
        for name, split in plan.splits.items():
            _show_sources(screen, name, split.report)
        screen.console.print("\nwhat it would train on", style="bold")
        for name, value in (plan.count_rows_and_steps() | plan.duplicates).items():
            screen.console.print(f"  {name.replace('_', ' '):30} {value:>12,}")
        _show_findings(screen, plan)
        estimate = estimate_run(plan)
        _show_estimate(screen, estimate)
        screen.print_result(_as_json(plan, estimate))


def _as_json(plan: RunPlan, estimate: RunEstimate | None) -> dict[str, Any]:
    return {
        "config": plan.config.model_dump(),
        **plan.count_rows_and_steps(),
        "domains": plan.domains,
        **plan.duplicates,
        "splits": {name: asdict(split.report) for name, split in plan.splits.items()},
        "findings": [asdict(finding) for finding in plan.findings],
        "estimate": asdict(estimate) if estimate else None,
    }


def _show_examples(screen: Screen, plan: RunPlan) -> None:
    """Print three examples as the model sees them, with supervised tokens in green and underlined."""

    from training_lens.data.tokenization import decode_spans

    rows = plan.train.spread_positions(EXAMPLES)
    marks = ("", "") if screen.console.is_terminal else ("«", "»")  # where there are no colours
    legend = ((f"{marks[0]}learned{marks[1]}", "green underline"), ", ", ("read", "dim"))
    screen.console.print(Text.assemble((f"\n{len(rows)} of the training examples", "bold"), ": ", *legend))
    for row in rows:
        example = plan.train[int(row)]
        learned = int(example.loss_mask[1:].sum())
        screen.print_line(f"\n{example.id}: {len(example.input_ids)} tokens, {learned} learned")
        text = Text()
        for part, is_learned in decode_spans(plan.tokenizer, example.input_ids, example.loss_mask):
            shown, style = (f"{marks[0]}{part}{marks[1]}", "green underline") if is_learned else (part, "dim")
            text.append(shown, style)
        screen.console.print(_shorten_example(text), soft_wrap=True)


def _shorten_example(text: Text) -> Text:
    if len(text) <= 2 * ENDS:
        return text
    return Text("\n").join([text[:ENDS], Text(f"... {len(text) - 2 * ENDS} characters ...", "italic"), text[-ENDS:]])


def _show_sources(screen: Screen, name: str, report: SplitReport) -> None:
    """Print rows by source and by domain, the first of them."""
    sources, domains = list(report.mappings.items()), list(report.domains.items())
    rows = [(source, f"{report.examples_by_file.get(source, 0):,}", mapping) for source, mapping in sources[:NAMED]]
    rows += [(f"  domain {domain}", f"{count:,}", "") for domain, count in domains[:NAMED]]
    if more := len(sources) + len(domains) - len(rows):
        rows.append((f"and {more} more", "", ""))
    screen.console.print()
    title = f"data.{name}: {report.rows:,} rows, {report.examples:,} examples"
    show_table(screen.console, title, ("source", "examples", "read as"), rows, right=("examples",))


def _show_findings(screen: Screen, plan: RunPlan) -> None:
    """Print what the checks before the first step found, with what to do; of what is fine, its number."""
    shown = [f for f in plan.findings if f.severity != "fine" and f.confidence != "inconclusive"]
    clean = f" ({len(plan.findings) - len(shown)} of {len(plan.findings)} checks found nothing)"
    screen.console.print(Text.assemble(("\npreflight", "bold"), clean))
    for found in shown:
        style = "yellow" if found.severity in ("problem", "warning") else "dim"
        screen.console.print(Text.assemble((f"  {found.severity}: ", style), found.title), soft_wrap=True)
        for line in filter(None, (found.measured, found.action)):
            screen.print_line(f"    {line}")


def _show_estimate(screen: Screen, estimate: RunEstimate | None) -> None:
    from training_lens.training.step_costs import describe_others
    from training_lens.utils.formatting import format_seconds, format_size

    if estimate is None:
        return
    how = f"measured on {estimate.measured_steps} of its steps"
    if estimate.layers:
        how += f" with {' and '.join(map(str, estimate.layers))} layers and random weights, extrapolated to all"
    screen.console.print(Text.assemble(("\nestimate", "bold"), f" ({how})"))
    low, high = format_seconds(estimate.seconds_low), format_seconds(estimate.seconds_high)
    screen.console.print(f"  training       {format_seconds(estimate.seconds)} ({low} to {high})")
    if others := describe_others(estimate.others_share):
        screen.console.print(f"                 {others}: the run takes longer or less, as they do")
    screen.console.print(f"  validations    {format_seconds(estimate.validation_seconds)}")
    screen.console.print(f"  peak memory    {format_size(estimate.peak_bytes)}")
    screen.console.print(f"  micro-batches  of at most {estimate.micro_batch_tokens:,} tokens")
