"""Which fields of a source's rows hold prompt and answer: configured, or detected by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training_lens.config.data_sections import DataSection, DomainSection, FieldsSection
from training_lens.data.examples import Row
from training_lens.data.row_keys import ALIASES, FALLBACKS, LEADING, MASKS, MEANINGS, REJECTED, is_near, plain_name
from training_lens.errors import DatasetError
from training_lens.utils.formatting import did_you_mean, list_names
from training_lens.utils.limits import KEYS

DOMAIN_FIELD = "domain"
NO_FIELD = "none"  # data.fields.input=none: no key has this meaning, whatever the keys are called
DESCRIBED = {"messages": "chats", "pair": "pairs of prompt and answer", "text": "plain texts"}


@dataclass(frozen=True)
class FieldMapping:
    """The key for each meaning; None if the rows have none. One of `text`, `messages`, `instruction` is set.

    `output` of a chat is the answer to its last question. `masks` are the row's loss masks.
    """

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None
    history: str | None = None
    messages: str | None = None
    tools: str | None = None
    text: str | None = None
    label: str | None = None
    rejected: str | None = None
    domain: str | None = None
    masks: tuple[str, ...] = ()

    @property
    def row_form(self) -> str:
        return "text" if self.text else "messages" if self.messages else "pair"

    @property
    def key_by_meaning(self) -> dict[str, str]:
        """Meaning -> key, for all meanings that are set; masks under their own names."""
        found = {meaning: key for meaning, key in vars(self).items() if key and meaning != "masks"}
        return found | {mask: mask for mask in self.masks}

    def describe(self) -> str:
        """For reports: 'question -> answer', 'instruction + input -> output, domain from topic', 'messages'."""
        shown = (self.system, self.history, self.instruction, self.input, self.messages, self.tools)
        asked = " + ".join(key for key in shown if key)
        remarks = {
            f"answered by {self.output} where it ends with a question": self.messages and self.output,
            f"domain from {self.domain}": self.domain,
            f"learned where {' and '.join(self.masks)} is 1": self.masks,
            f"not learned where {self.label} is false": self.label,
            f"{self.rejected} set aside": self.rejected,
        }
        text = self.text or (f"{asked} -> {self.output}" if self.instruction else asked)
        return ", ".join([text, *(remark for remark, applies in remarks.items() if applies)])


def are_plain_texts(mappings: Collection[str], fields: FieldsSection) -> bool:
    """Whether every file was read as plain texts: its mapping then names the texts' field, and maybe the domain's."""
    text = text_field(fields)
    return text != fields.messages and all(m.split(", domain from ")[0] == text for m in mappings)


def text_field(fields: FieldsSection) -> str:
    """The field of rows that are plain texts."""
    return fields.text or ALIASES["text"][0]


Keys = Mapping[str, int]  # each key of a source, and the number of the first row that has it


def collect_keys(rows: Iterable[Row]) -> dict[str, int]:
    """All keys of the rows, each with the number of the first row that has it."""
    keys: dict[str, int] = {}
    for row in rows:
        if not row.values.keys() <= keys.keys():
            for key in row.values:
                keys.setdefault(key, row.number)
                if len(keys) > KEYS:
                    raise DatasetError(
                        f"{row.place}: the rows up to here have over {KEYS:,} different keys. Give them a few keys "
                        "that all have, with what differs in their values."
                    )
    return keys


def find_mapping(keys: Keys, data: DataSection, place: str) -> FieldMapping:
    """The mapping for rows with these keys: as configured, else detected by name.

    Raises:
        DatasetError: no prompt or answer found, several candidates, rows of several forms, or a field that this form
            cannot use, or a key with two meanings. Names the rows and the setting.
    """
    for meaning, configured in data.fields:
        if configured and not has_field(keys, configured) and not _is_left_out(meaning, configured):
            raise unknown_field_error(f"data.fields.{meaning}", configured, keys, place)
    keys = {key: number for key, number in keys.items() if key not in data.ignore_keys}
    search = _FieldSearch(keys, data.fields, place)
    form = search.find_form()
    found = {meaning: search.find_key(meaning, form) for meaning in MEANINGS[form]}
    missing = next((m for m in ("instruction", "output") if form == "pair" and not found[m]), None)
    if missing:
        raise _missing_field_error(missing, keys, place)
    domain = _find_domain_key(data.domain, keys, place)
    _require_one_meaning_each(found | {"domain": domain}, data.fields, place)
    return FieldMapping(
        **found,
        rejected=REJECTED if form != "text" and REJECTED in keys and REJECTED not in found.values() else None,
        domain=domain,
        masks=tuple(key for key in keys if plain_name(key) in MASKS and key not in found.values()),
    )


def _is_left_out(meaning: str, configured: str) -> bool:
    """Whether the user says that no key has this meaning; a prompt and an answer must have one."""
    return configured == NO_FIELD and meaning in ALIASES and meaning not in ("output", *LEADING.values())


def _require_one_meaning_each(found: Mapping[str, str | None], fields: FieldsSection, place: str) -> None:
    """Refuse a key that is read twice, as one that stands in the prompt and is its answer, too."""
    for key in found.values():
        meanings = [meaning for meaning, other in found.items() if key and other == key]
        if len(meanings) < 2:
            continue
        named = [meaning for meaning in meanings if getattr(fields, meaning, None)]
        settings = [f"data.fields.{meaning}" for meaning in named]
        given = f" ({' and '.join(settings)} {'name' if named[1:] else 'names'} it)" if named else ""
        free = next(meaning for meaning in reversed(meanings) if meaning not in named[:1])
        way = "data.domain.field=null" if free == "domain" else f"data.fields.{free}=FIELD"
        if free not in ("domain", "output", *LEADING.values()):
            way += f", or data.fields.{free}={NO_FIELD} where no field is meant"
        raise DatasetError(
            f"{place}: '{key}' is read as {' and as '.join(meanings)}{given}. A field has one meaning. Name "
            f"another for one of them: {way}."
        )


def has_field(keys: Collection[str], name: str) -> bool:
    """Whether these keys include the field, dotted or not."""
    return name in keys or ("." in name and name.split(".")[0] in keys)


def find_near_key(keys: Collection[str], meaning: str) -> str | None:
    """A key that is nearly spelled like a name of this meaning."""
    return next((key for key in keys if any(is_near(key, name) for name in ALIASES[meaning])), None)


def _missing_field_error(missing: str, keys: Keys, place: str) -> DatasetError:
    """The error that rows have no prompt or no answer; suggests a similar key."""
    near = [(meaning, find_near_key(keys, meaning)) for meaning in (missing, "messages", "text")]
    if missing == "instruction":
        near.append((missing, next((key for key in keys if plain_name(key) in ALIASES["input"]), None)))
    meaning, key = next(((meaning, key) for meaning, key in near if key), (missing, None))
    hint = f"Is it '{key}'? Name it: data.fields.{meaning}={key}" if key else f"Name it: data.fields.{missing}=FIELD"
    return DatasetError(
        f"{place}: no {'prompt' if missing == 'instruction' else 'answer'} found among its fields "
        f"({list_names(keys) or 'none'}); looked for {', '.join(ALIASES[missing])}. "
        f"{hint} (a dot leads into objects: answers.text)."
    )


def domain_from_file(file: str | Path) -> str:
    """The domain of a file's rows with data.domain.per_file: the file name without suffixes."""
    return Path(file).name.split(".")[0]


def _find_domain_key(domain: DomainSection, keys: Keys, place: str) -> str | None:
    if domain.per_file:
        return None
    if domain.field == "auto":
        there = [key for key in keys if plain_name(key) == DOMAIN_FIELD]
        if len(there) > 1:
            raise DatasetError(
                f"{place}: {' and '.join(map(repr, there))} could each be the domain. Say which: "
                f"data.domain.field={there[0]}."
            )
        return there[0] if there else None
    if domain.field and not has_field(keys, domain.field):
        raise unknown_field_error("data.domain.field", domain.field, keys, place)
    return domain.field


@dataclass(frozen=True)
class _FieldSearch:
    """Finds the form of a source's rows and the key of each meaning."""

    keys: Keys
    fields: FieldsSection
    place: str

    def find_form(self) -> str:
        """The form of the rows (text, messages or pair): as configured, else the only possible one."""
        asked = [form for form, leading in LEADING.items() if getattr(self.fields, leading)]
        if len(asked) > 1:
            named = " and ".join(f"data.fields.{LEADING[form]}" for form in asked)
            raise DatasetError(f"{self.place}: {named} choose two forms of rows. Keep one.")
        form = asked[0] if asked else self._find_only_form()
        unused = next((m for m, key in self.fields if key not in (None, NO_FIELD) and m not in MEANINGS[form]), None)
        if unused:
            raise DatasetError(
                f"{self.place}: data.fields.{unused} cannot be used. The rows are read as {DESCRIBED[form]}, which may "
                f"have {', '.join(MEANINGS[form])}. Take it out, or choose another form with "
                f"{' or '.join(f'data.fields.{leading}' for other, leading in LEADING.items() if other != form)}."
            )
        return form

    def _find_only_form(self) -> str:
        required = {form: ("instruction", "output") if form == "pair" else (form,) for form in MEANINGS}
        there = {form: [self._find_present_keys(name) for name in names] for form, names in required.items()}
        there = {form: found for form, found in there.items() if all(found)}
        if self.fields.output and "pair" in there:
            return "pair"
        if len(there) > 1:
            seen = [f"{' -> '.join(f[0] for f in found)} (row {self.keys[found[0][0]]})" for found in there.values()]
            ways = [f"data.fields.{LEADING[form]}={found[0][0]}" for form, found in there.items()]
            raise DatasetError(
                f"{self.place}: could be read as {' or as '.join(seen)}. Say which: {' or '.join(ways)}; rows of "
                "several forms belong into several files."
            )
        if there:
            return self._require_text_alone(next(iter(there)))
        has_prompt = self._find_present_keys("instruction") or find_near_key(self.keys, "instruction")
        return "messages" if self._find_rated_chats() and not has_prompt else "pair"

    def _require_text_alone(self, form: str) -> str:
        """The form, unless rows of plain text also have a prompt or an answer, which would be left out."""
        answers = self._find_present_keys("output")
        beside = answers or self._find_present_keys("instruction")
        if form != "text" or not beside:
            return form
        text, missing = self._find_present_keys("text")[0], "instruction" if answers else "output"
        raise DatasetError(
            f"{self.place}: '{text}' would be read as plain text, without '{beside[0]}'. For pairs of prompt and "
            f"answer: data.fields.{missing}={text}; for the text alone: data.fields.text={text}."
        )

    def _find_rated_chats(self) -> list[str]:
        """The key of rated whole chats: chosen, if there is rejected."""
        return [key for key in FALLBACKS["messages"] if key in self.keys and REJECTED in self.keys]

    def _find_present_keys(self, meaning: str) -> list[str]:
        """Candidate keys for a meaning: the configured one, or those with one of its names in any case."""
        if configured := getattr(self.fields, meaning):
            left_out = _is_left_out(meaning, configured) and not has_field(self.keys, configured)
            return [] if left_out else [configured]
        names = ALIASES[meaning]
        found = [key for key in self.keys if plain_name(key) in names]
        return sorted(found, key=lambda key: names.index(plain_name(key)))

    def find_key(self, meaning: str, form: str) -> str | None:
        """The key for a meaning; None if there is none. Several are an error."""
        there = self._find_present_keys(meaning)
        if form == "messages" and meaning == "output" and not self.fields.output:
            chats = self._find_present_keys("messages")
            there = [key for key in self._find_rated_chats() if chats and key not in chats]
        elif not there and not getattr(self.fields, meaning):
            fallbacks = [key for key in self.keys if plain_name(key) in FALLBACKS.get(meaning, ())]
            there = self._find_rated_chats() if meaning == "messages" else fallbacks
        if len(there) > 1:
            seen = " and ".join(f"'{key}' (row {self.keys[key]})" for key in there)
            raise DatasetError(
                f"{self.place}: {seen} could each be the {meaning}. Say which: data.fields.{meaning}={there[0]}; "
                "rows of several forms belong into several files."
            )
        return there[0] if there else None


def unknown_field_error(key: str, name: str, keys: Collection[str], place: str) -> DatasetError:
    """The error that the setting `key` names a field that no row has; suggests the nearest one."""
    hint = did_you_mean(name, keys, f" Its fields: {list_names(keys)}.")
    return DatasetError(f"{key}: {place} has no field '{name}'.{hint}")
