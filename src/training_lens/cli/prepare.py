"""`training-lens prepare`: rows to clean splits, with what was found on the way, and their tokens in the cache."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from training_lens.cli.common import Screen, command, load_config, show_table
from training_lens.cli.missing_files import check_base, check_rows
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.config.data_sections import DataSection
    from training_lens.config.schema import TrainingConfig
    from training_lens.preparation.prepare_splits import PreparationResult

SHOWN = 3  # findings of a kind
NAMED = 40  # sources and domains that a table lists
FINDING_TEXTS = {
    "duplicates_exact": "say what an earlier row says; left out",
    "duplicates_near": "say nearly what an earlier row says; left out",
    "conflicting_answers": "answer otherwise than an earlier row of the same prompt; kept",
    "leaks_exact": "say what a row of another split says",
    "leaks_normalized": "say what a row of another split says, but for case, punctuation or leading words",
    "leaks_prompt": "ask what a row of another split asks, and answer otherwise",
    "leaks_near": "say nearly what a row of another split says",
}
FORMS = {"pair": "instruction and output", "messages": "messages", "text": "text"}

Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result in the output folder.")]


def prepare(options: CommandOptions, force: Force = False) -> None:
    """Clean and split data.train into a folder: duplicates left out, leaks between splits found, tokens cached.

    Rows of data.validation are kept as they are, and training rows that they repeat are left out.

    Examples: training-lens prepare data.train=rows.jsonl prepare.deduplicate=near;
    training-lens prepare data.train=rows.jsonl data.validation=held_out.jsonl;
    training-lens prepare data.train=rows.jsonl prepare.split_by=group prepare.group_field=user_id
    """
    with command(options) as screen:
        settings = load_config(options)
        check_rows(settings)
        check_base(settings)
        _require_room(settings, force)
        from training_lens.display.progress import Progress
        from training_lens.preparation.prepare_splits import prepare_splits

        prepared = prepare_splits(settings, Progress(screen.console), force)
        train = _train_command(prepared, settings.data, options)
        _show_sources(screen, prepared.manifest)
        _show_findings(screen, prepared.manifest)
        _show_splits(screen, prepared)
        _show_lengths(screen, prepared)
        screen.print_line(f"\nsaved in {prepared.folder}\ntrain on it: {train}")
        screen.print_result({"folder": str(prepared.folder), "train": train, **prepared.manifest})


def _require_room(settings: TrainingConfig, force: bool) -> None:
    folder = settings.prepared_folder
    if folder.exists() and not force:
        raise ConfigurationError(
            f"prepare.output: '{folder}' is there already. Give another folder, or replace it with --force."
        )


def _train_command(prepared: PreparationResult, data: DataSection, options: CommandOptions) -> str:
    """The command that trains on the written files, with the settings given to prepare.

    Args:
        data: the settings that the sources were read with; keys that differ for the written files are set.
    """
    changed = {
        key: value for key, value in _reading_settings(prepared.data).items() if _reading_settings(data)[key] != value
    }
    replaced = ("data.train", "data.val_ratio", "prepare.", *changed)
    if "validation" in prepared.splits:
        replaced = (*replaced, "data.validation")
    words = ["training-lens", "train", *(word for file in options.config or [] for word in ("--config", file))]
    words += [text for text in options.words if not text.lstrip("+").startswith(replaced)]
    words += [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    for name in ("train", "validation"):
        if name in prepared.splits:
            words.append(f"data.{name}={_quote_path(str(prepared.folder / prepared.splits[name].file))}")
    if data.val_ratio and options.config:
        words.append("data.val_ratio=0")
    return shlex.join(words)


def _reading_settings(data: DataSection) -> dict[str, Any]:
    """The settings of fields and domain, by dotted key."""
    return {
        f"data.{section}.{key}": value
        for section in ("fields", "domain")
        for key, value in getattr(data, section).model_dump().items()
    }


def _quote_path(path: str) -> str:
    """The path as the value of an override."""
    return path if re.fullmatch(r"[\w/.:@+-]+", path) else json.dumps(path, ensure_ascii=False)


def _show_sources(screen: Screen, manifest: dict[str, Any]) -> None:
    sources = manifest["sources"]
    rows = [(name, f"{source['rows']:,}", source["read_as"]) for name, source in list(sources.items())[:NAMED]]
    if len(sources) > NAMED:
        rows.append((f"and {len(sources) - NAMED} more", "", ""))
    screen.console.print()
    title = f"{manifest['rows_read']:,} rows read"
    show_table(screen.console, title, ("source", "rows", "read as"), rows, right=("rows",))


def _show_findings(screen: Screen, manifest: dict[str, Any]) -> None:
    """Print each kind of finding, with a few rows."""
    show = screen.console.print
    show("\nwhat was found", style="bold")
    for kind, meaning in FINDING_TEXTS.items():
        count, listed = manifest[kind]["rows"], manifest[kind]["listed"]
        if not count:
            continue
        show(f"  {count:,} {'rows' if count > 1 else 'row'}: {meaning}", soft_wrap=True)
        for item in listed[:SHOWN]:
            alike = f" ({item['similarity']:.0%})" if kind.endswith("near") else ""
            show(f"    {item['row']} and {item['other']}{alike}: {item['text']}", markup=False, soft_wrap=True)
    if not any(manifest[kind]["rows"] for kind in FINDING_TEXTS):
        show("  nothing")
    if manifest["leaks_removed"]:
        show(f"  {manifest['leaks_removed']:,} of them taken out of the training split (prepare.leakage=remove)")
    elif any(manifest[kind]["rows"] for kind in FINDING_TEXTS if kind.startswith("leaks")):
        show("  prepare.leakage=remove takes those of the training split out")


def _show_splits(screen: Screen, prepared: PreparationResult) -> None:
    """Print rows and tokens of each split, and its examples by domain."""
    splits = list(prepared.splits.values())
    rows = [
        ["rows", *(f"{split.rows:,}" for split in splits)],
        ["examples that training keeps", *(f"{split.lengths.examples:,}" for split in splits)],
        ["tokens", *(f"{split.lengths.tokens:,}" for split in splits)],
        ["learned tokens", *(f"{split.supervised_tokens:,}" for split in splits)],
    ]
    domains = sorted({domain for split in splits for domain in split.domains})
    rows += [["examples by domain"]] if domains else []
    for domain in domains[:NAMED]:
        examples = (split.domains[domain].examples if domain in split.domains else 0 for split in splits)
        rows.append([f"  {domain}", *(f"{count:,}" for count in examples)])
    rows += [[f"  and {len(domains) - NAMED} more"]] if len(domains) > NAMED else []
    screen.console.print()
    show_table(screen.console, "splits", ["", *prepared.splits], rows, right=list(prepared.splits))
    form = prepared.manifest["form"]
    if form != "as_read":
        screen.console.print(f"rows are written as {FORMS[form]}: what is learned of them, without their other keys")


def _show_lengths(screen: Screen, prepared: PreparationResult) -> None:
    from training_lens.preparation.statistics import compute_length_statistics, draw_histogram

    lengths = compute_length_statistics(prepared.token_lengths)
    shares = ", ".join(f"{float(share):.0%} up to {value:,}" for share, value in lengths.quantiles.items())
    screen.console.print(Text.assemble(("\ntokens of an example", "bold"), f": mean {lengths.mean:.1f}, {shares}"))
    for line in draw_histogram(prepared.token_lengths):
        screen.print_line(line)
