"""`training-lens infer`: ask a trained adapter, or a base: a prompt, a file of prompts, or a chat."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import AdapterRun, Screen, command, load_adapter_config
from training_lens.cli.missing_files import check_files
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import pluralize

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.data.sources import DataSource
    from training_lens.inference.batch import FileReport
    from training_lens.inference.session import Session

Prompt = Annotated[
    str | None, typer.Argument(help="What to ask; not with --input or --interactive.", show_default=False)
]
Input = Annotated[
    str | None, typer.Option("--input", metavar="FILE", help="Answer every row of a file, in any format of data.train.")
]
Output = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Where the answers to --input go, a JSON line each; continued if it is there."),
]
Interactive = Annotated[bool, typer.Option("--interactive", help="Chat on the terminal; /help lists its commands.")]
Domain = Annotated[str | None, typer.Option(metavar="NAME", help="One of the domains that the run was trained on.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")]


@dataclass(frozen=True)
class InferOptions:
    """Where prompts come from, and which model answers them."""

    source: Input = None
    output: Output = None
    interactive: Interactive = False
    domain: Domain = None
    base: Base = False


def infer(prompt: Prompt = None, *, asked: InferOptions, run: AdapterRun = None, options: CommandOptions) -> None:
    """Answer a prompt, token by token as it comes; or every row of a file; or chat.

    Examples: training-lens infer "A prompt" --run latest; training-lens infer "A prompt" inference=base model.id=PATH;
    training-lens infer --input rows.jsonl --output answers.jsonl inference.temperature=0.7 inference.top_p=0.9
    """
    with command(options) as screen:
        words = [prompt, *options.words] if prompt is not None else []
        prompt, words = _split_prompt(words, asked, options.json)
        settings = load_adapter_config(options.with_words(words), run, ("inference",))
        if prompt is not None:
            _answer_prompt(screen, settings, prompt, asked)
        elif asked.source and asked.output:
            name = Path(run or settings.inference.adapter).name
            _answer_file(screen, settings, asked, name)
        else:
            _start_chat(screen, settings, asked)


def _split_prompt(words: list[str], asked: InferOptions, as_json: bool) -> tuple[str | None, list[str]]:
    """The prompt, if there is one, and the settings after it; prompts must come from exactly one place."""
    prompt = words[0] if words and not is_setting(words[0]) else None
    ways = {f"the prompt '{prompt}'": prompt is not None, "--input": asked.source, "--interactive": asked.interactive}
    chosen = [name for name, yes in ways.items() if yes]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "no prompt"
        raise ConfigurationError(f"{found} given: give one of PROMPT, --input FILE --output FILE, --interactive.")
    if bool(asked.source) != bool(asked.output):
        raise ConfigurationError("--input and --output go together: a file of prompts, and a file for the answers.")
    if prompt is not None and not prompt.strip():
        raise ConfigurationError("the prompt is empty; give some text.")
    if asked.interactive and as_json:
        raise ConfigurationError("--interactive has no --json: a chat has no one result. For scripts: --input FILE.")
    return prompt, words if prompt is None else words[1:]


def is_setting(text: str) -> bool:
    """Whether a first word is no prompt but a setting: 'inference=base', 'model.id=x', '+experiment=dora'."""
    from training_lens.config.schema import TrainingConfig

    match = re.match(r"\+?([a-z_]+)[a-z_.]*=\S", text)
    return bool(match) and (text.startswith("+") or match[1] in TrainingConfig.model_fields)  # type: ignore[index]


def _open_session(screen: Screen, settings: TrainingConfig, domain: str | None) -> Session:
    from training_lens.inference.session import open_session

    session = open_session(settings)
    session.check_domain(domain)
    notes = []
    if session.continues_text:
        notes.append("this run was trained on plain texts: it continues yours, each by itself, without a template.")
    if session.domains and domain is None and session.config.data.domain.style != "none":
        notes.append(f"this run knows the domains {', '.join(session.domains)}; choose one with --domain.")
    for note in notes:
        screen.print_line(f"note: {note}", style="dim")
    return session


def _answer_prompt(screen: Screen, settings: TrainingConfig, prompt: str, asked: InferOptions) -> None:
    from training_lens.data.examples import Message
    from training_lens.inference.generator import generate_answer

    session = _open_session(screen, settings, asked.domain)
    prompt_ids = session.prompt_ids([Message("user", prompt)], asked.domain)
    on_text = None if screen.as_json else screen.write_text
    given = generate_answer(session, prompt_ids, settings.inference, base=asked.base, on_text=on_text)
    screen.console.print()
    if given.finish_reason == "length":
        end = "inference.max_new_tokens, or the model's last position"
        typer.echo(f"note: the answer was cut after {len(given.token_ids)} tokens ({end}).", err=True)
    result = {"run": session.source, "prompt": prompt, "domain": asked.domain, "base": asked.base}
    screen.print_result({**result, "answer": given.text, "finish_reason": given.finish_reason})


def _answer_file(screen: Screen, settings: TrainingConfig, asked: InferOptions, name: str) -> None:
    """Answer every row of `asked.source` into `asked.output`; `name` is the model's in a file of requests."""
    from training_lens.utils.files import resolve_file_path

    source, output = str(asked.source), str(asked.output)
    check_files([source], "--input")
    resolve_file_path(output, f"--output {output}")
    from training_lens.display.progress import Progress
    from training_lens.inference.batch import answer_file, input_file, output_file
    from training_lens.inference.session import open_session
    from training_lens.serve.batch_file import is_batch_file

    rows = input_file(source)
    answers = output_file(output, rows)
    if is_batch_file(rows.files[0]):
        _refuse_row_options(asked)
        _answer_batch_file(screen, {name: settings}, rows, answers)
        return
    session = open_session(settings)
    session.check_domain(asked.domain)
    progress = Progress(screen.console)
    report = answer_file(
        session, rows, answers, settings.inference, domain=asked.domain, base=asked.base, progress=progress
    )
    screen.print_line(_describe_report(report))
    screen.print_result(asdict(report))


def _refuse_row_options(asked: InferOptions) -> None:
    if asked.base or asked.domain:
        raise ConfigurationError(
            f"--input {asked.source} is in OpenAI's batch format: each line's body names its model, which may be the "
            "base, and its domain. Leave --base and --domain out."
        )


def _answer_batch_file(screen: Screen, configs: Mapping[str, TrainingConfig], rows: DataSource, output: Path) -> None:
    """Answer a file in OpenAI's batch format, whose lines name one of these models, or their base."""
    from training_lens.display.progress import Progress
    from training_lens.serve.batch_file import answer_batch_file
    from training_lens.serve.served_models import load_models

    models = load_models(configs)
    screen.print_line(f"{rows.name} is in OpenAI's batch format; the models are {', '.join(models.by_name)}.")
    settings = next(iter(configs.values())).inference
    report = answer_batch_file(models, rows, output, settings, Progress(screen.console))
    screen.print_line(_describe_report(report))
    screen.print_result(asdict(report))


def _describe_report(report: FileReport) -> str:
    """One line on what became of the rows."""
    if report.resumed == report.answered:
        line = f"{report.output} is finished: all {report.answered} answers are there, nothing was changed"
    else:
        before = f", {report.resumed} of them before" if report.resumed else ""
        line = f"{report.answered} of {report.rows} rows answered in {report.output}{before}"
    line += f"; {pluralize(len(report.passed_over), 'row')} passed over." if report.passed_over else "."
    if report.cut:
        line += (
            f"\n{report.cut} of the {report.answered} answers were cut (finish_reason length): they reached "
            "inference.max_new_tokens, or the model's last position, before they ended."
        )
    if report.unmarked:
        line += (
            f"\n{report.unmarked} answers were written by an earlier version, which did not note whether it cut them."
        )
    return line


def _start_chat(screen: Screen, settings: TrainingConfig, asked: InferOptions) -> None:
    from training_lens.inference.chat import Conversation

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lets input() edit its line)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are then refused as a prompt
    session = _open_session(screen, settings, asked.domain)
    chat = Conversation(session, settings.inference, screen.write_text, asked.domain, asked.base)
    screen.write_text(f"{session.source} listens. /help lists the commands, /quit leaves.\n")
    try:
        while chat.handle_line(input("> ")):
            pass
    except EOFError:
        screen.write_text("\n")
