"""The frame of `training-lens watch`: a run as lines that fit a terminal. Pure: values in, lines out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from training_lens.display.terminal_chart import ACCENT, DIM
from training_lens.ui.layer_reader import LayerMap
from training_lens.ui.run_state import PREPARING, TRAINING, RunState
from training_lens.ui.terminal_sections import (
    BOLD,
    GUTTER,
    FrameSection,
    build_chart,
    build_findings,
    build_layers,
    build_samples,
    build_validations,
    fit_line,
    pad_line,
    show_foreign,
)
from training_lens.utils.formatting import format_seconds

TABLE_BESIDE = 72  # columns from which the validations stand beside the chart
STATUS_STYLES = {"training": "green", "finished": "green", "preparing": ACCENT, "interrupted": "yellow"}
KEYS = "q ends this view; the run goes on"
ASCII = str.maketrans("●◦○━─…▁▂▃▄▅▆▇█↵", "*oo=-~.:-=+*%#|")


def compose_frame(state: RunState, layers: LayerMap | None, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` columns."""
    top = [_write_title(state, width), _write_progress(state, width)]
    bottom = _write_end(state) if state.headline else [Text.assemble((f" {KEYS}", DIM))]
    sections = list_sections(state, layers, width)
    body: list[Text] = []
    for section, lines in zip(sections, allot_lines(sections, height - len(top) - len(bottom) - 2), strict=True):
        if lines:
            body += [Text(), *_draw_section(section, width, lines)]
    frame = [*top, *body, Text(), *bottom]
    return [fit_line(line, width) for line in frame][:height]


def list_sections(state: RunState, layers: LayerMap | None, width: int) -> list[FrameSection]:
    """What there is to show, from top to bottom; the first ones keep their place where there is little."""
    is_beside = width >= TABLE_BESIDE
    sections = [build_chart(state, has_table=is_beside)]
    if not is_beside:
        sections.append(build_validations(state))
    if state.status != PREPARING:
        sections.append(build_findings(state))
    if state.samples:
        sections.append(build_samples(state))
    if layers is not None:
        sections.append(build_layers(layers))
    return sections


def allot_lines(sections: Sequence[FrameSection], lines: int) -> list[int]:
    """Lines for each section: what it needs while there are enough, then one after the other up to what it can use.

    A blank line stands before each but the first; a section that does not fit gets none.
    """
    given: list[int] = []
    for section in sections:
        needed = section.sizes[0] + any(given)
        given.append(section.sizes[0] if needed <= lines else 0)
        lines -= needed if given[-1] else 0
    grew = True
    while grew:
        grew = False
        for index in sorted(range(len(sections)), key=lambda index: sections[index].turn):
            section = sections[index]
            larger = next((size for size in section.sizes if size > given[index]), None)
            if given[index] and larger is not None and larger - given[index] <= lines:
                lines -= larger - given[index]
                given[index], grew = larger, True
    return given


def _draw_section(section: FrameSection, width: int, lines: int) -> list[Text]:
    """The lines of a section, with its name and notes to the left of them."""
    labels = [Text.assemble((f" {section.name}", BOLD)), *(Text(" ").append_text(note) for note in section.notes)]
    drawn = section.draw(max(1, width - GUTTER - 1), lines)[:lines]
    return [
        pad_line(labels[i] if i < len(labels) else Text(), GUTTER).append_text(line) for i, line in enumerate(drawn)
    ]


def _write_title(state: RunState, width: int) -> Text:
    """The run's names, and its status at the right."""
    status = Text(show_foreign(state.status, 20), f"bold {STATUS_STYLES.get(state.status, 'red')}")
    names = Text.assemble(" ", (show_foreign(state.run_id, width), BOLD))
    for name in filter(None, (state.experiment, state.model)):
        names.append(f"  {show_foreign(name, width)}", DIM)
    return pad_line(names, width - status.cell_len - 1).append_text(status)


def _write_progress(state: RunState, width: int) -> Text:
    """Steps, a bar, the time that is left, and the speed."""
    step, total = state.progress.get("step", 0), state.progress.get("total_steps")
    if state.status == PREPARING:
        return Text(" preparing: data and model are loaded, and the base is validated", DIM)
    words = [f"{step / total:.0%}"] if total else []
    if state.progress.get("is_starting"):
        words.append("resuming: data and model are loaded")
    elif state.status == TRAINING and (left := state.progress.get("remaining_seconds")):
        words.append(f"{format_seconds(left)} left")
    if (speed := state.progress.get("tokens_per_second")) and not state.progress.get("is_starting"):
        words.append(f"{speed:,.0f} tokens/s")
    steps, end = f" step {step:,} of {total:,}" if total else f" step {step:,}", "   ".join(words)
    line = Text.assemble((steps, BOLD))
    room = width - len(line) - len(end) - 6
    if total and room >= 8:
        filled = min(room, round(room * step / total))
        line.append("  ").append("━" * filled, ACCENT).append("─" * (room - filled), DIM)
    return line.append(f"   {end}")


def _write_end(state: RunState) -> list[Text]:
    """What became of the run, if more is known than its status, and the verdict; of a run that trains, so far."""
    detail = [Text(f" {show_foreign(state.detail, 500)}", "red")] if state.detail else []
    return [
        *detail,
        Text.assemble(("" if state.is_over else " so far:", DIM), (f" {show_foreign(state.headline, 500)}", BOLD)),
    ]


def translate_to_ascii(lines: Sequence[Text]) -> list[Text]:
    """The lines for a terminal that shows ASCII alone: dots of curves become ':', other characters '?'."""
    return [Text(_translate_text(line.plain), spans=line.spans) for line in lines]


def _translate_text(text: str) -> str:
    dotted = "".join(":" if "\u2800" <= letter <= "\u28ff" else letter for letter in text.translate(ASCII))
    return dotted.encode("ascii", "replace").decode("ascii")
