"""Where the gain lives, as sentences, tables, a heat map and a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training_lens.analysis.explanations.module_gains import DropTest, ModuleGains
from training_lens.analysis.reports.report_files import Report
from training_lens.display.html import BulletList, Callout, Part, SvgPicture, Table
from training_lens.display.svg import render_heat_map
from training_lens.utils.formatting import format_interval, format_share

HOW = (
    "Each adapted module has a multiplier on its update, and all go from 0, the base, to 1, the adapter. A module's "
    "share is the integral of the loss's derivative by its multiplier (integrated gradients, arXiv 1703.01365); shares "
    "sum to the change of the loss. A share says where on that way the loss changed, not what happens without the "
    "module: that is measured beside it. Losses are in nats per supervised token, intervals over rows and paired; "
    "below 0 a module lowers the loss."
)
TESTED = (
    "Off: the loss without this layer's adapter, less the whole adapter's. Alone: the base with only this layer's, "
    "less the base's. Interaction: off + alone; above 0 the layer works with others, below 0 others stand in for it."
)


def build_module_report(gains: ModuleGains) -> Report:
    """The page: what the numbers say, the heat map, the measured tests of layers and drops, all modules."""
    parts: list[Part] = [_check_callout(gains), BulletList(list(describe_modules(gains)))]
    parts += [SvgPicture(draw_modules(gains), "The change of the loss in % by layer and module type; blue lowers it.")]
    parts += [layer_table(gains), TESTED, kind_table(gains), *row_tables(gains)]
    parts += ["# Dropping modules", *describe_drops(gains), drop_table(gains)]
    parts += ["# All modules", module_table(gains), "# How it was measured", f"{HOW} {_describe_rows(gains)}"]
    return Report(
        "explain-modules",
        "Where the gain lives",
        (*parts, *gains.notes),
        {**gains.as_json(), "sentences": _list_sentences(gains)},
    )


def describe_modules(gains: ModuleGains) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    at = f"{gains.change:+.4f} nats per token ({gains.confidence:.0%}: {format_interval(gains.interval)})"
    yield f"The adapter changes the loss from {gains.base_loss:.4f} to {gains.loss:.4f}, by {at}."
    if not gains.change:
        yield "The adapter changes nothing, so that there is nothing to share out."
        return
    if gains.is_complete:
        first = sorted(gains.by_layer, key=lambda group: group.share)[0]
        kind = sorted(gains.by_kind, key=lambda group: group.share)[0]
        yield (
            f"The largest shares: {_name_layer(first.name)} with {format_share(first.fraction)} of the change, the "
            f"type {kind.name} with {format_share(kind.fraction)}."
        )
    worst = max(gains.layers, key=lambda layer: layer.off)
    yield (
        f"Measured: without the adapter of {_name_layer(worst.name)} the loss rises most, by {worst.off:+.4f} "
        f"({format_interval(worst.off_interval)})."
    )
    if replaced := [layer for layer in gains.layers if layer.off < -layer.alone / 2 and layer.alone < 0]:
        names = ", ".join(layer.name for layer in replaced)
        yield f"Others stand in for most of what these layers have alone, so that shares and tests differ: {names}."


def _list_sentences(gains: ModuleGains) -> list[str]:
    """What a reader of the run's page should know: what the numbers say, whether they hold, and what can go."""
    check = [] if gains.is_complete else [describe_check(gains)]
    return [*describe_modules(gains), *check, next(describe_drops(gains))]


def describe_check(gains: ModuleGains) -> str:
    """Whether the shares can be trusted, in one line."""
    measured = f"the shares sum to the change up to {gains.residual:.2%} of it, at {gains.points} points"
    if gains.is_complete:
        return f"complete: {measured}"
    return (
        f"inconclusive: {measured}; over {gains.tolerance:.0%}, the loss bends too much on the way. The measured tests "
        "of layers and drops hold. Higher precision would decide, or a smaller scale (training-lens knob)"
    )


def _check_callout(gains: ModuleGains) -> Callout:
    title = describe_check(gains).removeprefix("complete: ")
    return Callout("fine" if gains.is_complete else "warning", f"{title[:1].upper()}{title[1:]}.")


def _describe_rows(gains: ModuleGains) -> str:
    return (
        f"{gains.rows} rows, {gains.supervised_tokens:,} supervised tokens; {gains.gradient_passes} forward and "
        f"backward passes and {gains.passes} forward passes over {gains.tokens:,} tokens."
    )


def draw_modules(gains: ModuleGains) -> str:
    """The heat map: layers down, types across, in % of the change."""
    layers = [group.name for group in gains.by_layer]
    kinds = list(dict.fromkeys(module.kind for module in gains.modules))
    values = np.full((len(layers), len(kinds)), np.nan)
    for module in gains.modules:
        place = layers.index(module.layer_name), kinds.index(module.kind)
        # The fraction of the gain is above 0 where the module lowers the loss; blue is below 0.
        sign = np.sign(gains.change) or 1.0
        values[place] = np.nan_to_num(values[place]) + 100 * sign * (module.fraction or 0.0)
    return render_heat_map(layers, kinds, values, "{:+.1f}", "layer {}, {}: {}% of the change of the loss")


def layer_table(gains: ModuleGains) -> Table:
    """A row for each layer: its share, and the measured losses without it and with it alone."""
    fractions = {group.name: group.fraction for group in gains.by_layer}
    rows = []
    for test in gains.layers:
        row = [test.name, str(test.modules), f"{test.share:+.4f}", format_share(fractions[test.name])]
        row += [f"{test.off:+.4f}", format_interval(test.off_interval)]
        row += [f"{test.alone:+.4f}", format_interval(test.alone_interval), f"{test.interaction:+.4f}"]
        rows.append(row)
    columns = ("layer", "modules", "share", "of change", "off", "interval", "alone", "interval", "interaction")
    return Table("by layer, in nats per token", columns, rows)


def kind_table(gains: ModuleGains) -> Table:
    """A row for each type of module."""
    rows = [
        [g.name, str(g.modules), f"{g.share:+.4f}", format_interval(g.interval), format_share(g.fraction)]
        for g in gains.by_kind
    ]
    return Table("by type of module, in nats per token", ("type", "modules", "share", "interval", "of change"), rows)


def row_tables(gains: ModuleGains) -> Iterator[Table]:
    """A table for the domains and one for the lengths: the change on these rows, and the share of each type in it."""
    kinds = [group.name for group in gains.by_kind]
    for by, title in (("domain", "by domain"), ("length", "by length in tokens")):
        groups = [group for group in gains.by_rows if group.by == by]
        if not groups:
            continue
        rows = []
        for group in groups:
            row = [group.name, str(group.rows), f"{group.change:+.4f}", format_interval(group.interval)]
            shares = [group.by_kind[kind] / group.change if group.change else None for kind in kinds]
            rows.append([*row, *map(format_share, shares)])
        columns = (by, "rows", "change", "interval", *kinds)
        yield Table(
            f"{title}: the change of the loss in nats per token, and the share of each type in it", columns, rows
        )


def drop_table(gains: ModuleGains) -> Table:
    """A row for each drop that was measured, after the whole adapter."""
    rows = [["none", f"{gains.parameters:,}", f"{gains.loss:.4f}", "", "", "100.0%" if gains.change < 0 else "-"]]
    for drop in gains.drops:
        name = f"{drop.label} (offered)" if drop.label == gains.offered else drop.label
        kept = f"{1 - drop.cost / -gains.change:.1%}" if gains.change < 0 else "-"
        row = [name, f"{drop.parameters:,}", f"{drop.loss:.4f}", f"{drop.cost:+.4f}"]
        rows.append([*row, format_interval(drop.interval), kept])
    title = f"without modules, those of the least gain first, of {len(gains.modules)}; losses in nats per token"
    return Table(title, ("dropped", "parameters", "loss", "change", "interval", "gain kept"), rows)


def module_table(gains: ModuleGains) -> Table:
    """A row for each module, the largest gain first."""
    rows = []
    for module in sorted(gains.modules, key=lambda m: m.share):
        row = [module.name, module.layer_name, module.kind, f"{module.parameters:,}", f"{module.share:+.6f}"]
        rows.append([*row, format_interval(module.interval, "{:+.6f}"), format_share(module.fraction)])
    columns = ("module", "layer", "type", "parameters", "share", "interval", "of change")
    return Table("shares of the change of the loss, nats per supervised token", columns, rows)


def describe_drops(gains: ModuleGains) -> Iterator[str]:
    """Which drop is offered and why, and how to use it, a line each."""
    yield f"{gains.reason[:1].upper()}{gains.reason[1:]}."
    yield (
        "The modules were chosen by their shares on these same rows: measure the smaller adapter on rows of its own "
        "before you rely on it."
    )
    if (drop := gains.find_drop(gains.offered)) is not None:
        yield f"To write it: training-lens explain modules {gains.run} --drop {drop.label} --write FOLDER"
        yield f"To train without them: peft.target_modules='{target_expression(gains, drop)}'"


def target_expression(gains: ModuleGains, drop: DropTest) -> str:
    """A regular expression for the whole paths of the modules that stay, as `peft.target_modules` takes it.

    Layers of one type are one alternative: `model\\.layers\\.(0|3)\\.mlp\\.up_proj`.
    """
    from training_lens.core.modules import LAYER

    alternatives: dict[tuple[str, str], list[str]] = {}
    for module in gains.modules:
        if module.name not in drop.dropped and not module.has_new_rows:
            found = LAYER.search(module.name)
            before, after = (module.name[: found.start(1)], module.name[found.end(1) :]) if found else (module.name, "")
            alternatives.setdefault((before, after), []).extend([found[1]] if found else [])
    return "|".join(_join_alternative(*ends, layers) for ends, layers in alternatives.items())


def _join_alternative(before: str, after: str, layers: Sequence[str]) -> str:
    number = f"({'|'.join(layers)})" if len(layers) > 1 else "".join(layers)
    return before.replace(".", r"\.") + number + after.replace(".", r"\.")


def _name_layer(name: str) -> str:
    return f"layer {name}" if name.isdigit() else f"the modules {name} the layers"
