"""Questions in Python: texts to a session, texts back."""

from __future__ import annotations

from collections.abc import Sequence

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError
from training_lens.inference.generator import generate_answer, generate_answers
from training_lens.inference.session import Session
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def answer_texts(
    session: Session,
    prompts: str | Sequence[str],
    settings: InferenceSection,
    *,
    base: bool = False,
    domain: str | None = None,
) -> str | list[str]:
    """The answer to a text; or to a list of texts a list of answers. How many were cut is logged.

    Args:
        base: answer as the base model, without the adapter.

    Raises:
        ConfigurationError: something else than texts, an empty one, or one that leaves no room to answer.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    _require_texts(texts)
    ids = [session.prompt_ids([Message("user", text)], domain) for text in texts]
    if isinstance(prompts, str):
        given = [generate_answer(session, ids[0], settings, base=base)]
    else:
        given = generate_answers(session, ids, settings, base=base)
    if cut := sum(answer.finish_reason == "length" for answer in given):
        logger.info(
            "%d of %d answers were cut at max_new_tokens (%d), or at the model's last position",
            cut, len(given), settings.max_new_tokens,
        )  # fmt: skip
    return given[0].text if isinstance(prompts, str) else [answer.text for answer in given]


def _require_texts(texts: Sequence[object]) -> None:
    if not isinstance(texts, Sequence):
        raise ConfigurationError(f"a prompt is a text, or a list of texts; given {type(texts).__name__}.")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigurationError(f"prompt {number} is a {type(text).__name__}, expected a text.")
        if not text.strip():
            raise ConfigurationError(f"prompt {number} is empty; give some text.")
