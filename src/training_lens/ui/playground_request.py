"""What a request to the playground may ask: a prompt or a chat, a domain, sampling, and the adapter's scale."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message, Role
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import did_you_mean, list_names

Side = Literal["base", "adapter"]
SIDES: tuple[Side, ...] = ("base", "adapter")
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
LONGEST_PROMPT = 100_000  # characters of all turns together
MOST_TURNS = 200
MOST_NEW_TOKENS = 4096
LARGEST_SCALE = 1.5
SMALLEST_TOP_P = 1e-9  # for 0: the likeliest token alone
PROMPT_KEYS = ("prompt", "messages", "domain")


@dataclass(frozen=True)
class Prompt:
    """A chat that ends with the user's turn."""

    messages: tuple[Message, ...]
    domain: str | None


@dataclass(frozen=True)
class Limits:
    """A number from `least` to `most`."""

    least: float
    most: float
    is_whole: bool = False

    def read_value(self, name: str, value: Any) -> float:
        """The value of the key `name`.

        Raises:
            ConfigurationError: it is no such number.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and self.least <= value <= self.most and not (self.is_whole and value % 1):
            return int(value) if self.is_whole else float(value)
        kind = "whole number" if self.is_whole else "number"
        raise ConfigurationError(
            f"{name}: {_quote_value(value)} is given; expected a {kind} from {self.least:g} to {self.most:.10g}."
        )


NUMBERS = {
    "temperature": Limits(0, 5),
    "top_p": Limits(0, 1),
    "top_k": Limits(0, 2**31 - 1, is_whole=True),
    "max_new_tokens": Limits(1, MOST_NEW_TOKENS, is_whole=True),
    "seed": Limits(0, 2**31 - 1, is_whole=True),
    "scale": Limits(0, LARGEST_SCALE),
}
ANSWER_KEYS = (*PROMPT_KEYS, *NUMBERS, "sides")


@dataclass(frozen=True)
class Question:
    """A prompt, how answers are sampled, which models answer, and what the adapter's update is multiplied by."""

    prompt: Prompt
    settings: InferenceSection
    scale: float
    sides: tuple[Side, ...]


def list_sampling(settings: InferenceSection) -> dict[str, float]:
    """The sampling settings as a request has them: `top_k` 0 takes all tokens."""
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or 0,
        "max_new_tokens": min(settings.max_new_tokens, MOST_NEW_TOKENS),
        "seed": settings.seed,
    }


def read_prompt(body: Mapping[str, Any], known: Collection[str] = PROMPT_KEYS) -> Prompt:
    """The prompt of a request's body.

    Raises:
        ConfigurationError: names the first thing that is wrong.
    """
    _check_keys(body, known, "")
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise ConfigurationError("give one of prompt (a text) and messages (a list of turns).")
    domain = body.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise ConfigurationError(f"domain: {_quote_value(domain)} is given; expected a text or null.")
    if body.get("prompt") is not None:
        messages: tuple[Message, ...] = (Message("user", _read_text(body["prompt"], "prompt")),)
    else:
        messages = _read_messages(body["messages"])
    length = sum(len(message.text) for message in messages)
    if length > LONGEST_PROMPT:
        raise ConfigurationError(f"the prompt has {length:,} characters; at most {LONGEST_PROMPT:,} are taken.")
    return Prompt(messages, domain or None)


def read_question(body: Mapping[str, Any], settings: InferenceSection, scale: float) -> Question:
    """The question of a request's body; `settings` and `scale` are taken for keys that it lacks.

    Raises:
        ConfigurationError: names the first thing that is wrong.
    """
    prompt = read_prompt(body, ANSWER_KEYS)
    values: dict[str, Any] = list_sampling(settings) | {"scale": scale}
    given = {name: body[name] for name in NUMBERS if body.get(name) is not None}
    values |= {name: NUMBERS[name].read_value(name, value) for name, value in given.items()}
    scale = values.pop("scale")
    values |= {"top_k": values["top_k"] or None, "top_p": values["top_p"] or SMALLEST_TOP_P}
    return Question(prompt, settings.model_copy(update=values), scale, _read_sides(body.get("sides")))


def _read_sides(value: object) -> tuple[Side, ...]:
    sides = list(SIDES) if value is None else value
    if not isinstance(sides, list) or not sides or any(side not in SIDES for side in sides):
        raise ConfigurationError(f"sides: {_quote_value(value)} is given; expected a list of {list_names(SIDES)}.")
    return tuple(side for side in SIDES if side in sides)


def _read_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_TURNS:
        raise ConfigurationError(f"messages: expected a list of 1 to {MOST_TURNS} turns.")
    messages = tuple(_read_message(turn, f"messages[{place}]") for place, turn in enumerate(value))
    if messages[-1].role != "user":
        raise ConfigurationError("messages: the last turn must be the user's, so that there is something to answer.")
    return messages


def _read_message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigurationError(f"{name}: {_quote_value(turn)} is given; expected an object with role and content.")
    _check_keys(turn, ("role", "content"), f"{name}.")
    role = turn.get("role")
    if role not in ROLES:
        raise ConfigurationError(f"{name}.role: {_quote_value(role)} is given; expected one of {list_names(ROLES)}.")
    return Message(role, _read_text(turn.get("content"), f"{name}.content", may_be_empty=role == "assistant"))


def _read_text(value: object, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name}: {_quote_value(value)} is given; expected a text.")
    if not value.strip() and not may_be_empty:
        raise ConfigurationError(f"{name} is empty; give some text.")
    return value


def _check_keys(values: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            hint = did_you_mean(key[:40], known)
            raise ConfigurationError(
                f"{_quote_value(prefix + key)} is no key here; there are {list_names(known)}.{hint}"
            )


def _quote_value(value: object) -> str:
    """A value from a request as a message shows it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
