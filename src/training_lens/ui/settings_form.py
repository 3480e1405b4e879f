"""The form of a run: its fields from the schema, and what is filled in as the words of a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from training_lens.config.compose import PRESETS, compose, packaged_presets, user_presets
from training_lens.config.keys import describe_unknown, known_keys, list_settings, section_model
from training_lens.config.overrides import Override, key_type, list_union_members, read_value
from training_lens.config.run_config import BASE, CODE_KEYS
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.utils.limits import read_text
from training_lens.utils.secrets import redact_text

COMMON = (
    "model.id", "model.quantization", "model.seq_len", "data.train", "data.validation", "data.val_ratio",
    "training.epochs", "training.lr", "training.batch_size", "peft.r", "peft.lora_alpha", "output.experiment_name",
)  # fmt: skip
OUR_KEYS = (BASE, "output.run_id")  # the dashboard gives them
NOT_OFFERED = (*CODE_KEYS, *OUR_KEYS)  # code is allowed on a command line, by who can read it
OF_OTHER_COMMANDS = ("prepare", "evaluation", "inference", "benchmark", "sweep")  # kept with the run, unused by train
LIMITS = {"Ge": "minimum", "Gt": "exclusive_minimum", "Le": "maximum", "Lt": "exclusive_maximum"}  # of pydantic
EXPERIMENT = "experiment"  # the group of the presets
FieldType = Literal["number", "integer", "boolean", "choice", "text", "list", "json"]


@dataclass(frozen=True)
class FormField:
    """A setting in the form.

    `choices` are all values of a choice, and the words that a number takes, too ('auto'). `nullable`: null is a value.
    `takes_text`: one line of a list is given as text, which means something else than a list of one.
    """

    key: str
    type: FieldType
    default: Any
    description: str
    common: bool
    nullable: bool
    takes_text: bool
    choices: tuple[str, ...]
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting; `key` is empty where no single one is to blame."""

    key: str
    message: str


@dataclass(frozen=True)
class FormSettings:
    """What a person filled in: a preset, or none, and values by dotted key."""

    preset: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CheckedSettings:
    """Settings as words of a command line, without those at their defaults; `config` is None if there are problems."""

    words: tuple[str, ...]
    problems: tuple[Problem, ...]
    config: TrainingConfig | None


def describe_form() -> dict[str, Any]:
    """Presets and the fields by section, as JSON values. Reads the user's presets in ./config."""
    groups = [
        {"name": name, "title": title, "trains": name.split(".")[0] not in OF_OTHER_COMMANDS, "fields": fields}
        for name, title, fields in _list_groups(TrainingConfig, "")
        if fields
    ]
    return {"presets": [_describe_preset(name) for name in list_presets()], "groups": groups}


def _list_groups(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """The name, title and own fields of each section, also of sections inside others."""
    for name, field in model.model_fields.items():
        section = section_model(field)
        if section:
            own = [(f"{prefix}{name}.{key}", of) for key, of in section.model_fields.items() if not section_model(of)]
            title = (section.__doc__ or "").partition("\n\n")[0]
            yield f"{prefix}{name}", title, [asdict(describe_field(*each)) for each in own if is_offered(*each)]
            yield from _list_groups(section, f"{prefix}{name}.")


def is_offered(key: str, field: FieldInfo) -> bool:
    """Whether the form has the key: not what names code, what the dashboard gives, or what may hold a password."""
    return key not in NOT_OFFERED and not field.exclude


def describe_field(key: str, field: FieldInfo) -> FormField:
    """The field of a setting."""
    present = [member for member in list_union_members(field.annotation) if member is not type(None)]
    limits = {type(limit).__name__: limit for limit in field.metadata}
    literals = [word for member in present for word in _list_literals(member)]
    return FormField(
        key=key,
        type=_find_type(key, present),
        default=field.default,
        description=field.description or "",
        common=key in COMMON,
        nullable=key_type(key).nullable,
        takes_text=str in present and len(present) > 1,
        choices=tuple(literals),
        **{LIMITS[name]: getattr(limit, name.lower()) for name, limit in limits.items() if name in LIMITS},
    )


def _list_literals(member: Any) -> list[str]:
    """The words of a literal, or of a list of them."""
    if get_origin(member) is list:
        return _list_literals(get_args(member)[0])
    return [str(value) for value in get_args(member)] if get_origin(member) is Literal else []


def _find_type(key: str, present: Sequence[Any]) -> FieldType:
    if key_type(key).form == "texts":
        return "list"
    if any(get_origin(member) in (list, dict) for member in present):
        return "json"
    types: dict[Any, FieldType] = {bool: "boolean", int: "integer", float: "number", str: "text"}
    return next((types[member] for member in present if member in types), "choice")


def list_presets() -> list[str]:
    """The names of the presets of an experiment: the package's and the user's."""
    return sorted({*packaged_presets()[EXPERIMENT], *user_presets(EXPERIMENT)})


def _describe_preset(name: str) -> dict[str, Any]:
    """A preset, what its file says of it, and the settings that it changes."""
    try:
        file = user_presets(EXPERIMENT).get(name, _packaged_file(name))
        lines = read_text(file).splitlines()
        comment = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
        summary, values = " ".join(comment), _list_changes(name)
    except (ConfigurationError, OSError) as error:
        summary, values = f"cannot be used: {redact_text(str(error))}", {}
    return {"name": name, "summary": summary, "values": values}


def _packaged_file(name: str) -> Path:
    from importlib import resources

    return Path(str(resources.files(PRESETS))) / EXPERIMENT / f"{name}.yaml"


def _list_changes(preset: str) -> dict[str, Any]:
    plain, changed = compose(), compose(None, _preset_words(preset))
    values = {key: (look_up(plain, key), look_up(changed, key)) for key in known_keys(TrainingConfig)}
    return {key: after for key, (before, after) in values.items() if before != after}


def _preset_words(preset: str) -> list[str]:
    return [f"+{EXPERIMENT}={preset}"] if preset else []


def look_up(config: TrainingConfig, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def read_settings(body: Mapping[str, Any]) -> FormSettings:
    """The settings of a request.

    Raises:
        ConfigurationError: they are not {preset, values}.
    """
    preset, values = body.get("preset") or "", body.get("values") or {}
    if not isinstance(preset, str) or not isinstance(values, dict):
        raise ConfigurationError("expected {preset: a name or null, values: {key: value}}.")
    return FormSettings(preset, values)


def check_settings(given: FormSettings, outputs: Path) -> CheckedSettings:
    """The settings as words, and everything that is wrong with them, found as the command line finds it.

    Args:
        outputs: where the run goes, as output.base_output_dir.
    """
    if given.preset and given.preset not in (known := list_presets()):
        return CheckedSettings((), (Problem("preset", f"no such preset; there are: {', '.join(known)}"),), None)
    words = _preset_words(given.preset)
    problems: list[Problem] = []
    try:
        before = compose(None, words)
    except ConfigurationError as error:  # of a preset of the user
        return CheckedSettings(tuple(words), tuple(map(_split_problem, error.problems)), None)
    for key, value in {**given.values, BASE: str(outputs)}.items():
        try:
            words += write_setting(key, value, before)
        except ConfigurationError as error:
            problems.append(Problem(key, str(error)))
    return _compose_words(CheckedSettings(tuple(words), tuple(problems), None))


def _compose_words(checked: CheckedSettings) -> CheckedSettings:
    try:
        config = compose(None, checked.words)
    except ConfigurationError as error:
        problems = map(_split_problem, error.problems)
        return replace(checked, problems=(*checked.problems, *problems))
    return checked if checked.problems else replace(checked, config=config)


def _split_problem(line: str) -> Problem:
    """A line of `compose`: 'training.lr: given ...', or a word that could not be read."""
    place, colon, message = line.partition(": ")
    head = re.split(r"[=\[]", place.strip("'"))[0]
    key = next((key for key in known_keys(TrainingConfig) if head == key or head.startswith(f"{key}.")), "")
    return Problem(key, redact_text(message if key and colon and not place.startswith("'") else line))


def write_setting(key: str, value: Any, before: TrainingConfig) -> list[str]:
    """The word that sets a key, as the shell would pass it; none if the key has this value before.

    Raises:
        ConfigurationError: the form has no such key, or no word means this value.
    """
    fields = dict(list_settings(TrainingConfig))
    if key not in fields:
        raise ConfigurationError(describe_unknown(key, list(fields), value).removeprefix(f"{key}: "))
    if key != BASE and not is_offered(key, fields[key]):
        raise ConfigurationError("this cannot be set here; start the run with training-lens train in a terminal")
    word = write_word(key, value)
    is_same = any(_is_read_as(word, same) for same in _list_equals(look_up(before, key)))
    return [] if is_same else [word.word]


def write_word(key: str, value: Any) -> Override:
    """The override that is read back as `value`. What is typed for a number is taken as it is: '1e-3'.

    Raises:
        ConfigurationError: there is none.
    """
    is_typed = isinstance(value, str) and key_type(key).form == "other"
    for raw in _list_spellings(key, value):
        word = Override(key, raw, f"{key}={raw}")
        if "\0" not in raw and (is_typed or _is_read_as(word, value)):
            return word
    shown = redact_text(repr(value))[:80]
    raise ConfigurationError(f"{shown} cannot be written on a command line; give another value, or a config file")


def _list_spellings(key: str, value: Any) -> Iterator[str]:
    """The ways to write a value; the first is what a person would type."""
    if isinstance(value, str):
        yield value
        if key_type(key).form != "other":
            yield _quote_text(value)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value) and key_type(key).form == "texts":
        yield f"[{','.join(value)}]"
        yield f"[{','.join(map(_quote_text, value))}]"
    else:
        yield _write_json(value)


def _quote_text(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted: str = QuotedString(text, Quote.double).with_quotes()
    return quoted


def _is_read_as(word: Override, value: Any) -> bool:
    try:
        return _write_json(read_value(word)) == _write_json(value)
    except ConfigurationError:
        return False


def _list_equals(value: Any) -> list[Any]:
    """A value, and others that the schema reads as the same: one text for a list of one, 2 for 2.0."""
    values = [value]
    if isinstance(value, list) and len(value) == 1:
        values += value
    if isinstance(value, float) and value.is_integer():
        values.append(int(value))
    return values


def _write_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
