"""`training-lens serve`: the OpenAI API in front of a base and its adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import Screen, command, load_adapter_config
from training_lens.cli.infer import is_setting
from training_lens.cli.options import ConfigOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.serve.server_limits import ServerLimits

Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]RUN... [KEY=VALUE]...",
        help="Each a run's id or folder, an experiment, 'latest', an adapter folder, or 'none' for the base; NAME "
        "is that of the model in the API, by default what you typed. Then settings, such as "
        "inference.max_new_tokens=512.",
        show_default=False,
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine, a key is needed.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")]
BaseName = Annotated[
    str | None, typer.Option(metavar="NAME", help="The base's name in the API. Default: its model.id.")
]
Rows = Annotated[int, typer.Option(min=1, max=1024, help="Answers that are decoded together.")]
Queue = Annotated[int, typer.Option(min=0, help="Answers that wait beyond those; more are refused with 429.")]
CacheTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the KV cache, for all together. Default: what half of the free memory holds."),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for a request, waiting included.")]
Drain = Annotated[float, typer.Option(min=0, help="Seconds to finish requests in progress, at SIGTERM or Ctrl+C.")]
Engine = Annotated[
    Literal["auto", "own", "vllm"],
    typer.Option(help="auto: vLLM where it is installed, has a GPU and reads these models correctly; else our own."),
]


OWN_LIMITS = ("queue", "cache_tokens", "timeout", "drain")  # options that vLLM does not have


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and its limits."""

    host: Host = "127.0.0.1"
    port: Port = 8000
    base_name: BaseName = None
    rows: Rows = 64
    queue: Queue = 256
    cache_tokens: CacheTokens = None
    timeout: Timeout = 600.0
    drain: Drain = 30.0
    engine: Engine = "auto"


def serve(runs: Runs = None, *, asked: ServeOptions, options: ConfigOptions) -> None:
    """Answer the OpenAI API with a base and any number of its adapters, on one copy of the base in memory.

    Examples: training-lens serve; training-lens serve support=RUN sales=OTHER_RUN --port 8000;
    TRAINING_LENS_API_KEY=KEY training-lens serve RUN --host 0.0.0.0
    """
    with command(options) as screen:
        from training_lens.serve.access_key import check_access, read_key

        key = read_key()
        check_access(asked.host, key)
        words = runs or []
        named = _name_runs([word for word in words if not is_setting(word)] or ["latest"])
        settings = [word for word in words if is_setting(word)]
        configs = {
            name: load_adapter_config(options.with_words(settings), run, ("inference",)) for name, run in named.items()
        }
        if not _try_vllm(screen, configs, asked, key):
            _serve_here(screen, configs, asked, key)


def _name_runs(words: Sequence[str]) -> dict[str, str]:
    """The references of runs by their names in the API."""
    from training_lens.config.evaluation_sections import InferenceSection

    named: dict[str, str] = {}
    for word in words:
        name, equals, reference = word.partition("=")
        if not equals or Path(word).exists():
            name, reference = Path(word).name or word, word
        if equals and name in InferenceSection.model_fields and not Path(reference).exists():
            raise ConfigurationError(f"'{word}' is read as NAME=RUN; the setting is inference.{word}.")
        if not name.strip() or not reference.strip():
            raise ConfigurationError(f"'{word}': expected NAME=RUN, or RUN alone.")
        if name in named:
            raise ConfigurationError(
                f"two models are named '{name}'; give one of them another name: OTHER={reference}."
            )
        named[name] = reference
    return named


def _build_limits(asked: ServeOptions) -> ServerLimits:
    from training_lens.serve.server_limits import ServerLimits

    limits = ServerLimits(rows=asked.rows, queue=asked.queue, seconds=asked.timeout, drain_seconds=asked.drain)
    return limits.with_cache_tokens(asked.cache_tokens) if asked.cache_tokens else limits


def _try_vllm(screen: Screen, configs: Mapping[str, TrainingConfig], asked: ServeOptions, key: str | None) -> bool:
    """Replace this process with vLLM where asked for or possible; return False where our own server answers.

    Raises:
        ConfigurationError: vLLM is asked for, and cannot serve these models here.
    """
    if asked.engine == "own":
        return False
    import torch

    from training_lens.serve.vllm_server import VllmModel, build_command, find_obstacles, is_installed, run_vllm

    models = [VllmModel.from_settings(name, settings) for name, settings in configs.items()]
    has_gpu = torch.cuda.is_available()
    if obstacles := [*find_obstacles(models, has_gpu), *_list_own_settings(configs, asked)]:
        if asked.engine == "vllm":
            raise ConfigurationError([f"--engine vllm: {obstacle}." for obstacle in obstacles])
        if has_gpu and is_installed():
            screen.print_line(f"not served with vLLM: {'; '.join(obstacles)}")
        return False
    base_name = asked.base_name or models[0].config.model.id
    command_line = build_command(models, base_name, asked.host, asked.port, _build_limits(asked))
    screen.print_line(f"serving with vLLM: {' '.join(command_line)}")
    screen.print_result({"engine": "vllm", "command": command_line})
    run_vllm(command_line, key)
    return True


def _list_own_settings(configs: Mapping[str, TrainingConfig], asked: ServeOptions) -> list[str]:
    """The settings that only our own server takes, as problems."""
    given = [
        f"--{name.replace('_', '-')}" for name in OWN_LIMITS if getattr(asked, name) != getattr(ServeOptions, name)
    ]
    for config in configs.values():
        given += [f"inference.{key}" for key in config.explicit_values().get("inference", {}) if key != "adapter"]
    return [f"only our own server takes {name}" for name in dict.fromkeys(given)]


def _serve_here(screen: Screen, configs: Mapping[str, TrainingConfig], asked: ServeOptions, key: str | None) -> None:
    from training_lens.serve.draining_server import ServedApi, serve_api
    from training_lens.serve.served_models import load_models
    from training_lens.serve.server_limits import count_cache_tokens
    from training_lens.web.listener import listen

    listen(asked.host, asked.port, 1).close()  # refuse a port in use before models load for minutes
    models, limits = load_models(configs, asked.base_name), _build_limits(asked)
    if asked.cache_tokens is None:
        limits = limits.with_cache_tokens(count_cache_tokens(models.decoders[0]))

    def announce(address: str) -> None:
        names = list(models.by_name)
        screen.print_line(f"{address} answers as {', '.join(names)}.")
        screen.print_line(
            f"up to {limits.rows} answers at a time, {limits.cache_tokens:,} tokens of KV cache; Ctrl+C ends it."
        )
        result = {"address": address, "engine": "own", "models": names, "rows": limits.rows}
        screen.print_result({**result, "cache_tokens": limits.cache_tokens, "pid": os.getpid()})

    defaults = next(iter(configs.values())).inference
    serve_api(ServedApi(models, limits, defaults), asked.host, asked.port, key, announce)
