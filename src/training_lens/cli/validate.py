"""`training-lens validate`: what `train` would do, without training."""

from __future__ import annotations

from training_lens.cli.common import ConfigFile, Debug, Json, Overrides, command, load_config


def validate(overrides: Overrides = None, config: ConfigFile = None, json: Json = False, debug: Debug = False) -> None:
    """Check config and data, and show the config, rows, batches and steps of the run. Trains nothing."""
    with command(json, debug) as screen:
        settings = load_config(config, overrides)
        import yaml

        from training_lens.training.wrapper import TrainingWrapper

        plan = TrainingWrapper(settings, console=screen.console).plan()
        values, numbers = plan.config.model_dump(), plan.numbers()
        screen.console.print("\n[bold]the run's config[/]")
        screen.console.print(yaml.safe_dump(values, sort_keys=False).rstrip(), markup=False, soft_wrap=True)
        screen.console.print("\n[bold]what it would train on[/]")
        for name, value in numbers.items():
            screen.console.print(f"  {name.replace('_', ' '):28} {value:>10,}")
        if plan.domains:
            screen.console.print(f"  {'domains':28} {', '.join(plan.domains)}", markup=False)
        screen.result({"config": values, **numbers, "domains": plan.domains})
