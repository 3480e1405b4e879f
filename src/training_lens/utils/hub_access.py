"""A quick check that the Hugging Face hub answers: its own libraries retry for minutes without a network."""

from __future__ import annotations

from training_lens.errors import TrainingLensError

TIMEOUT_SECONDS = 5


def require_hub(asked: str, error: type[TrainingLensError]) -> None:
    """Raise `error` if the hub, needed for what is `asked`, does not answer, unless the user set HF_HUB_OFFLINE."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        request = Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 (the user's own HF_ENDPOINT)
        urlopen(request, timeout=TIMEOUT_SECONDS).close()  # noqa: S310 (through the user's proxy, if any)
    except HTTPError:
        return  # it answers
    except OSError as problem:
        raise error(
            f"{asked} is no local path, and the hub at {constants.ENDPOINT} cannot be reached ({problem}). "
            "Give a local path, or go online."
        ) from problem
