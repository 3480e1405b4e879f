"""`training-lens infer`: ask a trained adapter, or a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import (
    ConfigFile,
    Debug,
    Json,
    Overrides,
    Screen,
    command,
    load_config,
    refuse_unused,
)

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.inference.session import Session

Prompt = Annotated[str, typer.Argument(help="What to ask.", show_default=False)]
Domain = Annotated[str | None, typer.Option(metavar="NAME", help="One of the domains that the run was trained on.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")]
Run = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Short for inference.adapter=RUN: a run's id or folder, or an adapter folder."),
]


def infer(
    prompt: Prompt,
    overrides: Overrides = None,
    domain: Domain = None,
    base: Base = False,
    run: Run = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt, token by token as it comes. Sampling: inference.temperature=0.7 inference.top_p=0.9."""
    with command(json, debug) as screen:
        settings = _settings(config, overrides, run)
        _answer(screen, settings, prompt, domain, base)


def _settings(config: str | None, overrides: list[str] | None, run: str | None) -> TrainingConfig:
    """The config, with `--run` as the adapter; settings that the adapter would not heed are refused."""
    from training_lens.errors import ConfigurationError

    named = [text for text in overrides or [] if text.startswith("inference.adapter=")]
    if run and named:
        raise ConfigurationError(f"--run {run} and {named[0]} both name an adapter; keep one.")
    settings = load_config(config, overrides, {"inference": {"adapter": run}} if run else None)
    from training_lens.inference.session import uses_own_model

    own = ("model.", "data.") if uses_own_model(settings.inference.adapter) else ("model.device",)
    refuse_unused(overrides, ("inference", "output.", *own), "a run answers with its own config.")
    return settings


def _answer(screen: Screen, settings: TrainingConfig, prompt: str, domain: str | None, base: bool) -> None:
    from training_lens.data.types import Message
    from training_lens.errors import ConfigurationError
    from training_lens.inference.generator import answer

    if not prompt.strip():
        raise ConfigurationError("the prompt is empty; give some text.")
    session = _open(screen, settings, domain)
    prompt_ids = session.prompt_ids([Message("user", prompt)], domain)

    def write(text: str) -> None:
        screen.console.print(text, end="", markup=False, soft_wrap=True)

    text = answer(session, prompt_ids, settings.inference, base=base, on_text=None if screen.as_json else write)
    screen.console.print()
    screen.result({"run": session.source, "prompt": prompt, "domain": domain, "base": base, "answer": text})


def _open(screen: Screen, settings: TrainingConfig, domain: str | None) -> Session:
    from training_lens.inference.session import open_session

    session = open_session(settings)
    session.check_domain(domain)
    if session.domains and domain is None and session.config.data.domain.style != "none":
        screen.console.print(
            f"note: this run knows the domains {', '.join(session.domains)}; choose one with --domain.",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
    return session
