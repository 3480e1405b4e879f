"""The requests of the OpenAI API, as this server takes them.

Each key of a request is one of three kinds. Most are used. `IGNORED` ones change no answer: they are accepted, and the
response header `x-ignored-fields` names them. All others are refused, so that no setting is lost silently; keys of the
API that this server lacks are accepted only at the value that changes nothing (`NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training_lens.serve.api_errors import ApiError
from training_lens.utils.expected_values import describe_expected
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.limits import load_bounded_json

MOST_CHOICES = 32  # answers of one request: n times its prompts
MOST_LOGPROBS = 20
MOST_STOPS = 16
LARGEST_SCALE = 1.5  # of an adapter's update, as in the playground
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
}
SHAPES = {  # of keys that take several types
    "stop": f"text of 1 to 1000 characters, or a list of at most {MOST_STOPS} such texts",
    "prompt": "text, a list of texts, a list of tokens, or a list of lists of tokens",
}
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """What both endpoints take; None stands for the server's own setting, see `inference.*`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    domain: str | None = None
    adapter_scale: float | None = Field(None, ge=0, le=LARGEST_SCALE)
    ignore_eos: bool | None = None  # go on to the longest answer, as load tests need it

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def longest_answer(self) -> int | None:
        """In tokens."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens are named beside each token; None: no log-probabilities."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None

    @property
    def longest_answer(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt describes."""
        return [] if self.tool_choice == "none" else self.tools or []

    def check_keys(self) -> None:
        """Refuse keys that do not go together.

        Raises:
            ApiError: names the key.
        """
        if self.tool_choice not in (None, "none", "auto"):
            raise _refuse(
                "tool_choice",
                f"{self.tool_choice!r} is given; this server takes 'none' and 'auto': it cannot force calls.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise _refuse("top_logprobs", "is given without logprobs=true.")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _refuse("max_tokens", "differs from max_completion_tokens; give one.")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def check_keys(self) -> None:
        """Refuse a request without a prompt, or with too many; raises as `ChatRequest.check_keys`."""
        if not self.prompts or not all(self.prompts):
            raise _refuse("prompt", "is empty; give text or tokens.")
        if len(self.prompts) * self.choices > MOST_CHOICES:
            raise _refuse(
                "prompt", f"{len(self.prompts)} prompts times n={self.choices} are over {MOST_CHOICES} answers."
            )


ApiRequest = TypeVar("ApiRequest", ChatRequest, CompletionRequest)


def read_request(body: bytes, kind: type[ApiRequest]) -> tuple[ApiRequest, list[str]]:
    """The request in a body, and the names of its keys that are ignored.

    Raises:
        ApiError: it is not JSON, or has keys or values that this server does not take; names the first.
    """
    try:
        values = load_bounded_json(body, parse_constant=_refuse_constant)
    except (ValueError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"The body holds a {type(values).__name__}, expected an object.", "invalid_json")
    ignored = sorted(values.keys() & IGNORED)
    for key in values.keys() & NEUTRAL.keys():
        if values[key] not in NEUTRAL[key]:
            raise _refuse(key, "is not supported by this server. Leave it out.", "unsupported_parameter")
    try:
        request = kind.model_validate({k: v for k, v in values.items() if k not in IGNORED and k not in NEUTRAL})
    except ValidationError as error:
        raise _explain_problem(error, kind) from error
    request.check_keys()
    return request, ignored


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _refuse(key: str, why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{key}: {why}", code, key)


def _explain_problem(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    problem = error.errors(include_url=False)[0]
    key = str(problem["loc"][0]) if problem["loc"] else None
    place = ".".join(map(str, problem["loc"]))[:200]
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(str(key), list(kind.model_fields))
        return ApiError(400, f"{place}: unknown parameter.{hint}", "unknown_parameter", key)
    if problem["type"] == "missing":
        return ApiError(400, f"{place}: is missing.", "missing_required_parameter", key)
    if problem["type"] == "too_short":
        return ApiError(400, f"{place}: is empty; give at least one.", "invalid_value", key)
    if key in SHAPES:
        return ApiError(400, f"{key}: expected {SHAPES[key]}.", "invalid_value", key)
    expected = f", expected {words}" if (words := describe_expected(problem)) else f"; {problem['msg']}"
    return ApiError(400, f"{place}: given {str(problem['input'])[:100]!r}{expected}.", "invalid_value", key)
