"""Runs that are in a mirror, for commands that read runs: a copy of them here."""

from __future__ import annotations


def is_url(reference: str) -> bool:
    """Whether a run is named by a URL; file:// is one of a folder."""
    return "://" in reference


def copied_here(reference: str, base_output_dir: str, *, finished: bool | None) -> str:
    """The run that a reference means: of a URL, the folder of a copy under {base_output_dir}/cache/runs.

    Args:
        finished: which run of a mirror is the latest; see `find_run`.

    Raises:
        CheckpointError: there is no such run in the mirror, or it is damaged.
        IntegrationError: no answer.
    """
    if not is_url(reference):
        return reference
    from training_lens.integrations.fetching import fetch_to_read

    return str(fetch_to_read(reference, base_output_dir, finished=finished).root)
