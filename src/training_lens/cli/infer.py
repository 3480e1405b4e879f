"""`training-lens infer`: ask a trained adapter, or its base."""

from __future__ import annotations

from typing import Annotated

import typer

from training_lens.cli.common import (
    ConfigFile,
    Debug,
    FinishedRun,
    Json,
    Overrides,
    command,
    device_of,
    load_config,
    refuse_unused,
)

Prompt = Annotated[str, typer.Argument(help="What to ask.", show_default=False)]
Domain = Annotated[str | None, typer.Option(metavar="NAME", help="One of the domains that the run was trained on.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")]


def infer(
    prompt: Prompt,
    overrides: Overrides = None,
    domain: Domain = None,
    base: Base = False,
    run: FinishedRun = "latest",
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt, token by token as it comes. Sampling: inference.temperature=0.7 inference.top_p=0.9."""
    with command(json, debug) as screen:
        settings = load_config(config, overrides)
        from training_lens.data.types import Message
        from training_lens.errors import ConfigurationError
        from training_lens.inference.generator import answer
        from training_lens.inference.session import open_run
        from training_lens.utils.runs import find_run

        refuse_unused(overrides, ("inference.", "output.", "model.device"), "infer answers with the run's own config.")
        if not prompt.strip():
            raise ConfigurationError("the prompt is empty; give some text.")
        found = find_run(run, settings.output.base_output_dir, settings.output.experiment_name, finished=True)
        session = open_run(found, device_of(settings))
        if session.domains and domain is None and session.config.data.domain.style != "none":
            screen.console.print(
                f"note: this run knows the domains {', '.join(session.domains)}; choose one with --domain.", style="dim"
            )
        prompt_ids = session.prompt_ids([Message("user", prompt)], domain)
        write = None if json else lambda text: screen.console.print(text, end="", markup=False, soft_wrap=True)
        text = answer(session, prompt_ids, settings.inference, base=base, on_text=write)
        screen.console.print()
        screen.result({"run": str(found.root), "prompt": prompt, "domain": domain, "base": base, "answer": text})
