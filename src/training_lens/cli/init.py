"""`training-lens init`: a config file to begin with, and the questions of `--ask`, each answer checked on the spot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_lens import embedded
from training_lens.cli.common import Screen, command
from training_lens.cli.options import OutputOptions
from training_lens.errors import ConfigurationError, DatasetError, TrainingLensError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from training_lens.config.data_sections import DataSection
    from training_lens.data.examples import Row

File = Annotated[str, typer.Argument(help="The YAML file to write.", metavar="[FILE]")]
Model = Annotated[str | None, typer.Option(metavar="MODEL", help="Sets model.id: a local folder or a hub id.")]
Train = Annotated[str | None, typer.Option(metavar="FILE", help="Sets data.train; the file is looked into.")]
Validation = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Sets data.validation, or a share to hold out of --train; without it, 0.1."),
]
Ask = Annotated[bool, typer.Option("--ask", help="Ask a few questions first; Enter takes what is in brackets.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
HELD_OUT = 0.1
NO_DOMAIN, FOUND = "none", "domain"  # a field 'domain' is found by itself
Values = dict[str, Any]  # by dotted key
# No key of an experiment preset: the file would override a preset on the command line.
LIVE = ("model.id", "data.train", "data.val_ratio", "output.experiment_name")
WIDTH = 100
HEAD = """\
# Training Lens. A line with '#' right before a key is that key at its default: take the '#' away to change it.
# Check: training-lens validate --config {file}    Train: training-lens train --config {file}
"""


def init(
    file: File = "config.yaml",
    model: Model = None,
    train: Train = None,
    validation: Validation = None,
    ask: Ask = False,
    force: Force = False,
    *,
    options: OutputOptions,
) -> None:
    """Write a config file with every key, its description and its default; the main keys are set, the rest commented.

    Examples: training-lens init; training-lens init mine.yaml --train rows.jsonl --model path/to/model;
    training-lens init --ask
    """
    with command(options) as screen:
        path = _check_target(file, force)
        from training_lens.utils.files import write_text

        values = Interview(screen, asking=ask).ask_values(model, train, validation)
        write_text(path, render_skeleton(values, file))
        following = [f"training-lens {name} --config {file}" for name in ("validate", "train")]
        screen.print_line(f"wrote {file}. Next:")
        for line in following:
            screen.print_line(f"  {line}")
        screen.print_result({"file": file, "values": values, "next": following})


def _check_target(file: str, force: bool) -> Path:
    from training_lens.utils.files import resolve_file_path

    if Path(file).suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"{file}: init writes YAML; give a name that ends in .yaml.")
    path = resolve_file_path(file, file)
    if path.exists() and not force:
        raise ConfigurationError(f"{file}: is there already; give another name, or --force to write over it.")
    return path


class Interview:
    """The settings of a new config file, from options or from the user's answers; each is checked at once."""

    def __init__(self, screen: Screen, asking: bool) -> None:
        self._screen, self._asking = screen, asking
        self._fields: dict[str, str] = {}

    def ask_values(self, model: str | None, train: str | None, validation: str | None) -> Values:
        """Dotted keys and their values."""
        values = self._ask_value("model: a folder, a hub id, or 'embedded'", model, embedded.MODEL, _check_model)
        check_train = partial(self._check_rows, "data.train")
        values |= self._ask_value("training rows: a file or a glob", train, embedded.TRAIN, check_train)
        own = values.get("data.train", [embedded.TRAIN]) != [embedded.TRAIN]
        held_out = str(HELD_OUT) if own else embedded.HELDOUT
        question = "validation rows: a file, or the share of the training rows to hold out"
        values |= self._ask_value(
            question,
            validation or (held_out if own else None),
            held_out,
            lambda answer: {} if answer == held_out and not own else self._check_validation(answer),
        )
        if self._asking:
            from training_lens.data.fields import collect_keys

            keys = set(collect_keys(_first_rows(values["data.train"][0], "data.train")))
            default = FOUND if FOUND in keys else NO_DOMAIN
            values |= self._ask_value(
                "domain: the field that holds it, or none", None, default, partial(_check_domain, keys)
            )
            values |= self._ask_value("experiment name", None, "default", _check_experiment)
        return values | self._fields

    def _ask_value(self, question: str, given: str | None, default: str, check: Callable[[str], Values]) -> Values:
        """The settings that `check` makes of the option or the typed answer; asks again after an invalid one."""
        if not self._asking:
            return check(given) if given is not None else {}
        while True:
            try:
                return check(typer.prompt(question, default=given or default, err=self._screen.as_json))
            except TrainingLensError as error:
                self._screen.print_line(f"  {error}")

    def _check_rows(self, key: str, spec: str) -> Values:
        """Check that the rows can be read; fields that are not recognized are asked for."""
        from training_lens.data.fields import collect_keys, find_mapping

        if key == "data.train":
            self._fields.clear()
        data, rows = self._data_section(), _first_rows(spec, key)
        try:
            find_mapping(collect_keys(rows), data, spec)
        except DatasetError as error:
            if not self._asking:
                raise DatasetError(f"{error} Or let init ask: training-lens init --ask --train {spec}") from error
            self._screen.print_line(f"  {error}")
            self._ask_fields(set(collect_keys(rows)))
        self._screen.print_line(f"  {spec}: read as {_read_as(spec, key, self._data_section())}")
        return {key: [spec]}

    def _ask_fields(self, keys: set[str]) -> None:
        known = ", ".join(sorted(keys))
        for meaning, what in (("instruction", "the prompt"), ("output", "the answer")):
            name = typer.prompt(f"  which field is {what} ({known})", err=self._screen.as_json)
            self._fields[f"data.fields.{meaning}"] = name

    def _data_section(self) -> DataSection:
        from training_lens.config.data_sections import DataSection

        fields = {key.rsplit(".", 1)[-1]: name for key, name in self._fields.items()}
        return DataSection.model_validate({"fields": fields, "domain": {"field": None}})

    def _check_validation(self, answer: str) -> Values:
        """A share, or a file."""
        from training_lens.config.compose import validate_values

        try:
            share = float(answer)
        except ValueError:
            return self._check_rows("data.validation", answer)
        validate_values({"data": {"val_ratio": share}})
        return {"data.val_ratio": share}


def _check_model(answer: str) -> Values:
    from training_lens.config.schema import ModelSection
    from training_lens.models.location import locate_model

    locate_model(ModelSection(id=answer))
    return {"model.id": answer}


def _first_rows(spec: str, key: str) -> list[Row]:
    """The first rows of the first source in `spec`."""
    from training_lens.data.sources import expand_sources

    rows = list(islice(expand_sources([spec], key)[0].read_rows(), 200))
    if not rows:
        raise DatasetError(f"{spec}: holds no rows.")
    return rows


def _read_as(spec: str, key: str, data: DataSection) -> str:
    """How the fields of these files are read: 'question -> answer'."""
    from training_lens.data.notes import DataNotes
    from training_lens.data.source_reader import read_source_examples
    from training_lens.data.sources import expand_sources

    notes = DataNotes()
    for file in expand_sources([spec], key):
        next(read_source_examples(file, data, notes))
    return ", ".join(dict.fromkeys(notes.mappings.values()))


def _check_domain(keys: set[str], answer: str) -> Values:
    from training_lens.utils.formatting import did_you_mean

    if answer == NO_DOMAIN:
        return {"data.domain.field": None} if FOUND in keys else {}
    if answer not in keys:
        hint = did_you_mean(answer, keys, f" The fields: {', '.join(sorted(keys))}.")
        raise ConfigurationError(f"the rows have no field '{answer}'.{hint}")
    return {} if answer == FOUND else {"data.domain.field": answer}


def _check_experiment(answer: str) -> Values:
    from training_lens.config.compose import validate_values

    validate_values({"output": {"experiment_name": answer}})
    return {"output.experiment_name": answer}


def render_skeleton(values: Mapping[str, Any], file: str = "config.yaml") -> str:
    """A YAML config: `values` (by dotted key) and the keys of `LIVE` are set, all others commented out."""
    from training_lens.config.schema import TrainingConfig

    return HEAD.format(file=file) + "".join(_render_section(TrainingConfig, values, ""))


def _render_section(section: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    from training_lens.config.keys import section_model

    indent = "  " * prefix.count(".")
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", section_model(field)
        if inner:
            yield f"\n{_render_comment(inner.__doc__ or '', indent)}{indent}{name}:\n"
            yield from _render_section(inner, values, f"{key}.")
        else:
            value = json.dumps(values.get(key, field.default), ensure_ascii=False)  # JSON is YAML
            off = "" if key in values or key in LIVE else "#"
            yield f"{_render_comment(field.description or '', indent)}{indent}{off}{name}: {value}\n"


def _render_comment(text: str, indent: str) -> str:
    return "".join(f"{indent}# {line}\n" for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False))
