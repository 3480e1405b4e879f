"""`training-lens plan`: memory of each device and time for a model on several devices, and the line that starts it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from training_lens.cli.common import Screen, command, load_config, show_table
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.training.device_rates import DeviceRates
    from training_lens.training.layout_costs import LayoutCost, Workload
    from training_lens.training.model_shape import ModelShape

NOTHING_FITS = 1  # exit code
RENDEZVOUS = "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=NAME"
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        help="A model without its files: llama-1b, -3b, -8b, -70b or -405b, or a config.json. Default: model.id.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The GPU, such as h100-80 or rtx4090-24. Default: a table of all."),
]
Devices = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="How many; beyond 8 a multiple of 8. Default: the fewest that hold it."),
]
Tokens = Annotated[int, typer.Option(min=1, metavar="N", help="Training tokens of the whole run, all epochs together.")]
ExampleTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Mean tokens of an example.")]


def plan(
    shape: Shape = None,
    device: Device = None,
    devices: Devices = None,
    tokens: Tokens = 10_000_000,
    example_tokens: ExampleTokens = 512,
    *,
    options: CommandOptions,
) -> None:
    """Say what training takes on several GPUs: memory of each and time, with the base replicated, sharded or in 4 bits.

    Shows the arithmetic, and the line that starts the run. Reads no data and no weights. Exit code 1 if nothing fits.

    Examples: training-lens plan --shape llama-8b; training-lens plan --shape llama-70b --device h100-80 --devices 8;
    training-lens plan model.id=PATH peft.r=64 model.seq_len=4096 --device l4-24
    """
    with command(options) as screen:
        settings = load_config(options)
        from training_lens.training.device_rates import PER_HOST, find_device

        if devices and devices > PER_HOST and devices % PER_HOST:
            raise ConfigurationError(f"--devices {devices}: hosts have {PER_HOST} GPUs here; give a multiple of it.")
        chosen = find_device(device) if device else None
        from training_lens.training.model_shape import read_shape

        sizes = read_shape(settings, shape)
        workload = _read_workload(settings, sizes, min(example_tokens, sizes.seq_len), tokens)
        _show_model(screen, sizes, workload)
        words = _list_words(options, shape)
        if chosen is None:
            found = _show_devices(screen, sizes, workload, devices)
        else:
            found = _show_device(screen, sizes, workload, (chosen, devices), words)
        screen.print_result({"model": asdict(sizes), "workload": asdict(workload), **found})
        if not found["fits"]:
            raise typer.Exit(NOTHING_FITS)


def _read_workload(settings: TrainingConfig, shape: ModelShape, example_tokens: int, tokens: int) -> Workload:
    """What the config decides of the work, and which layouts can train it.

    Raises:
        ConfigurationError: settings whose costs are not known here.
    """
    from training_lens.training.layout_costs import LAYOUTS, Workload, is_4bit

    model, training = settings.model, settings.training
    if training.precision == "fp32":
        raise ConfigurationError("training.precision: plan has the devices' rates in 16 bits; leave it at auto.")
    if model.quantization == "8bit":
        raise ConfigurationError("model.quantization: plan knows none and 4bit; give one of them.")
    layouts = list(LAYOUTS)
    if model.quantization == "4bit" or settings.peft.init == "pissa":  # which needs the weights unquantized
        layouts = [name for name in layouts if is_4bit(name) == (model.quantization == "4bit")]
    is_set = "gradient_checkpointing" in training.model_fields_set
    return Workload(
        examples=training.batch_size * training.gradient_accumulation_steps,
        example_tokens=example_tokens,
        run_tokens=tokens,
        weight_bytes=4 if model.dtype == "fp32" else 2,
        layouts=tuple(layouts),
        checkpointing=(training.gradient_checkpointing,) if is_set else (False, True),
    )


def _list_words(options: CommandOptions, shape: str | None) -> list[str]:
    """The words of the launch line that come from this command line."""
    files = [word for file in options.config or [] for word in ("--config", file)]
    files += ["--from", options.origin] if options.origin else []
    words = [word for word in options.words if not word.startswith("distributed.")]
    if shape and not any(word.startswith("model.id=") for word in words):
        words.insert(0, "model.id=path/to/model")
    return [*files, *words]


def write_launch(cost: LayoutCost, words: list[str]) -> str:
    """The line that starts this layout; on several hosts each of them runs it.

    Args:
        words: options and settings that the user gave.
    """
    from training_lens.training.layout_costs import is_4bit, is_sharded
    from training_lens.utils.secrets import redact_text

    added = [*words]
    if cost.is_checkpointed and not any(word.startswith("training.gradient_checkpointing=") for word in words):
        added.append("training.gradient_checkpointing=true")
    if is_4bit(cost.layout) and "model.quantization=4bit" not in words:
        added.append("model.quantization=4bit")
    line = "training-lens train"
    if cost.devices > 1:
        added.append(f"distributed.base={'sharded' if is_sharded(cost.layout) else 'replicated'}")
        hosts = f" --nnodes={cost.hosts} {RENDEZVOUS}" if cost.hosts > 1 else ""
        line = f"torchrun --nproc-per-node={cost.devices // cost.hosts}{hosts} -m training_lens train"
    return redact_text(" ".join([line, *map(shlex.quote, added)]))


def _show_model(screen: Screen, shape: ModelShape, workload: Workload) -> None:
    from training_lens.training.layout_costs import count_token_flops
    from training_lens.utils.formatting import format_count

    tokens, trainable = workload.example_tokens, format_count(shape.trainable)
    flops, more = (count_token_flops(shape, tokens, way) / 1e9 for way in (False, True))
    size, run = format_count(shape.parameters), format_count(workload.run_tokens)
    frozen, queries = format_count(shape.multiplied), format_count(shape.attention_width)
    for line in (
        f"{shape.name}: {size} parameters, {shape.layers} layers; adapter: {shape.adapter}, {trainable} parameters",
        f"a token: 4 x {frozen} (frozen weights) + 6 x {trainable} (adapter) + 6 x {tokens} x {queries} (attention) = "
        f"{flops:,.1f} GFLOP; with gradient checkpointing {more:,.1f}",
        f"a step: {workload.examples} examples on all devices together, of {tokens:,} tokens (--example-tokens), at "
        f"most {shape.seq_len:,}; the run: {run} tokens (--tokens)",
    ):
        screen.print_line(line)


def _show_devices(screen: Screen, shape: ModelShape, workload: Workload, devices: int | None) -> dict[str, Any]:
    """A table of all devices: the fewest that hold each layout, or whether it fits on so many."""
    from training_lens.training.device_rates import DEVICES

    found = []
    for device in DEVICES.values():
        by_layout = {cost.layout: cost for cost in _cost_layouts(shape, workload, (device, devices))}
        found.append((device, {name: by_layout.get(name) for name in workload.layouts}))
    columns = ("device", *workload.layouts)
    rows = [(device.name, *map(_describe_cell, costs.values())) for device, costs in found]
    screen.console.print()
    title = "the fewest devices that hold it, and the run's time" if devices is None else f"on {devices} devices"
    show_table(screen.console, title, columns, rows)
    screen.print_line(
        "* with gradient checkpointing. --device NAME shows the arithmetic, and the line that starts the run"
    )
    every = [
        {"device": device.name, **{name: cost and _as_json(cost) for name, cost in costs.items()}}
        for device, costs in found
    ]
    fits = any(cost is not None and cost.fits for _, costs in found for cost in costs.values())
    return {"fits": fits, "devices": every}


def _cost_layouts(shape: ModelShape, workload: Workload, given: tuple[DeviceRates, int | None]) -> list[LayoutCost]:
    """Each layout on so many devices; where no number is given, each on the fewest that hold it."""
    from training_lens.training.layout_costs import compare_layouts, find_smallest

    device, devices = given
    if devices is not None:
        return compare_layouts(shape, device, devices, workload)
    return list(find_smallest(shape, device, workload).values())


def _describe_cell(cost: LayoutCost | None) -> str:
    """A cell of a table: number of devices and time, or what is missing."""
    from training_lens.utils.formatting import format_size

    if cost is None:
        return "-"
    if not cost.fits:
        return f"{cost.devices}: {format_size(cost.missing)} short"
    return f"{cost.devices}: {_describe_range(cost.run_seconds)}{' *' if cost.is_checkpointed else ''}"


def _show_device(
    screen: Screen, shape: ModelShape, workload: Workload, given: tuple[DeviceRates, int | None], words: list[str]
) -> dict[str, Any]:
    """The layouts on one kind of device, with their arithmetic, and the proposal."""
    from training_lens.training.layout_costs import choose_layout
    from training_lens.utils.formatting import format_size

    device, devices = given
    _show_rates(screen, device)
    costs = _cost_layouts(shape, workload, given)
    fewest = min((cost.devices for cost in costs if cost.fits), default=0)
    proposal = choose_layout([cost for cost in costs if cost.devices == fewest])
    for cost in costs:
        _show_layout(screen, cost, device, words)
    if proposal:
        what = f": {proposal.layout} base on {proposal.devices} x {device.name}"
        screen.console.print(Text.assemble(("\nproposed", "bold"), what), soft_wrap=True)
        screen.print_line(f"  {write_launch(proposal, words)}")
        if proposal.hosts > 1:
            screen.print_line("  on each host: HOST is the first one's name, NAME any name for this run")
        if proposal.devices > workload.examples:
            idle = f"{proposal.devices - workload.examples} of {proposal.devices} devices have nothing to do"
            screen.print_line(f"  {idle}: a step has {workload.examples} examples; raise training.batch_size")
    else:
        nearest = min(costs, key=lambda cost: cost.missing)
        screen.print_line(f"\nnothing fits on {devices or 'any number of'} x {device.name}")
        screen.print_line(f"  nearest: {nearest.layout} base, {format_size(nearest.missing)} of each device short")
        for line in _list_ways_out(shape, device, workload):
            screen.print_line(f"  {line}")
    return {
        "fits": proposal is not None,
        "device": asdict(device),
        "layouts": [_as_json(cost, write_launch(cost, words)) for cost in costs],
        "proposal": proposal and _as_json(proposal, write_launch(proposal, words)),
    }


def _list_ways_out(shape: ModelShape, device: DeviceRates, workload: Workload) -> list[str]:
    """What would fit where nothing does: other numbers of these devices, the next larger ones, shorter examples."""
    from training_lens.training.device_rates import DEVICES
    from training_lens.training.layout_costs import find_smallest, is_4bit

    lines = []
    larger = sorted((d for d in DEVICES.values() if d.memory > device.memory), key=lambda d: d.memory)
    for candidate in (device, *larger):
        fitting = [cost for cost in find_smallest(shape, candidate, workload).values() if cost.fits]
        if fitting:
            best = min(fitting, key=lambda cost: (cost.devices, is_4bit(cost.layout)))
            lines.append(f"fits on {best.devices} x {candidate.name}: {best.layout} base")
    return [*lines[:3], f"or lower model.seq_len (now {shape.seq_len:,}), whose longest example sets the least memory"]


def _show_rates(screen: Screen, device: DeviceRates) -> None:
    screen.print_line(
        f"{device.name}: {device.title}, {device.memory // 2**30} GiB, {device.flops / 1e12:,.0f} TFLOP/s in "
        f"{device.precision}, {device.memory_bandwidth / 1e9:,.0f} GB/s, {device.link.name} "
        f"{device.link.bandwidth / 1e9:,.0f} GB/s one way (published: {device.source})"
    )
    network = device.link.network_source
    source = network if network.startswith("assumed") else f"published: {network}"
    screen.print_line(f"between hosts: {device.link.network / 1e9:,.1f} GB/s one way ({source})")


def _show_layout(screen: Screen, cost: LayoutCost, device: DeviceRates, words: list[str]) -> None:
    from training_lens.utils.formatting import format_size

    way = ", gradient checkpointing" if cost.is_checkpointed else ""
    total, usable = format_size(cost.total), format_size(cost.usable)
    verdict = "fits" if cost.fits else f"does not fit: {format_size(cost.missing)} short"
    head = f"\n{cost.layout} base on {cost.devices} x {device.name}{way}"
    screen.console.print(Text.assemble((head, "bold"), f": {verdict} ({total} of {usable})"), soft_wrap=True)
    memory = [(term.name, format_size(term.bytes), term.arithmetic, str(term.basis)) for term in cost.memory]
    memory.append(("sum", total, f"usable: 0.8 x ({device.memory // 2**30} - 1) GiB = {usable}", ""))
    show_table(screen.console, "", ("memory of a device", "", "arithmetic", "basis"), memory)
    if not cost.fits:
        return
    if cost.host_bytes:
        screen.print_line(f"memory of a host while its processes load the base: up to {format_size(cost.host_bytes)}")
    screen.console.print()
    times = [(term.name, _describe_range((term.low, term.high)), term.arithmetic) for term in cost.time]
    overlap = "messages hidden behind the computation, or after it" if cost.devices > 1 else ""
    times.append(("step", _describe_range(cost.step_seconds), overlap))
    show_table(screen.console, "", ("time of a step", "", "arithmetic"), times)
    low, high = cost.tokens_per_second
    screen.print_line(f"{low:,.0f} to {high:,.0f} tokens/s; the run {_describe_range(cost.run_seconds)}")
    screen.print_line(write_launch(cost, words))


def _describe_range(seconds: tuple[float, float]) -> str:
    from training_lens.utils.formatting import format_seconds

    low, high = (f"{value * 1000:.3g} ms" if value < 1 else format_seconds(value) for value in seconds)
    return f"{low} to {high}"


def _as_json(cost: LayoutCost, launch: str | None = None) -> dict[str, Any]:
    """A layout as `--json` prints it; `launch`: the line that starts it."""
    sums = {"fits": cost.fits, "total_bytes": cost.total, "missing_bytes": cost.missing, "hosts": cost.hosts}
    return {**asdict(cost), **sums, **({"launch": launch} if launch and cost.fits else {})}
