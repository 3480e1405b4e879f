"""Write the table of docs/templates.md: `python tools/template_reference.py`. A test holds both.

Every chat template that the trl package carries is given small conversations; what it does not show is refused.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "data"))

from trl_templates import TEMPLATES, add_special_tokens  # noqa: E402

from training_lens.config.data_sections import DataSection  # noqa: E402
from training_lens.config.schema import ModelSection  # noqa: E402
from training_lens.data.examples import Example, Message  # noqa: E402
from training_lens.data.templates import Renderer, build_renderer  # noqa: E402
from training_lens.errors import DatasetError  # noqa: E402
from training_lens.models.factory import load_tokenizer  # noqa: E402

BEGIN, END = "<!-- tools/template_reference.py -->\n", "<!-- end of the table -->\n"
HEAD = (
    "| template | a system message | tools, calls, results | a text beside a call | two calls at once |\n"
    "|---|---|---|---|---|\n"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks for it.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "what"}}},
    },
}


def _call(number: int) -> dict[str, Any]:
    return {"id": f"call0000{number}", "name": "search", "arguments": {"q": f"rice {number}", "deep": [number]}}


def _chat(said: str, *numbers: int) -> tuple[Message, ...]:
    calls = tuple(_call(n) for n in numbers)
    results = (
        Message("tool", f"result {n}", extra={"tool_call_id": f"call0000{n}", "name": "search"}) for n in numbers
    )
    return (Message("user", "Hi"), Message("assistant", said, calls=calls), *results, Message("assistant", "Ho"))


CHATS = {
    "system": ((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")), ()),
    "call": (_chat("", 1), (TOOL,)),
    "text and call": (_chat("I look.", 1), (TOOL,)),
    "two calls": (_chat("", 1, 2), (TOOL,)),
}


def table() -> str:
    """The table's rows; templates made for training (with generation marks) do as those that they are made from."""
    base = load_tokenizer(ModelSection())
    names = [name for name in TEMPLATES if not name.endswith("_training")]
    return HEAD + "".join(_row(name, _renderer(base, TEMPLATES[name])) for name in names)


def _renderer(base: Any, source: str) -> Renderer:
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = source
    add_special_tokens(tokenizer)
    return build_renderer(DataSection(template="chat"), tokenizer)


def _row(name: str, renderer: Renderer) -> str:
    cells = [_outcome(renderer, Example(messages, None, "f", 1, tools)) for messages, tools in CHATS.values()]
    return f"| {name} | {' | '.join(cells)} |\n"


def _outcome(renderer: Renderer, example: Example) -> str:
    try:
        renderer.render_example(example)
    except DatasetError as error:
        return f"refused: {_reason(str(error))}"
    template = renderer.tool_template
    if not example.tools:
        return "shown"
    if not template.shows_calls:
        return "as text"
    form = "text" if template.form.argument_format == "text" else "object"  # type: ignore[attr-defined]
    return f"shown, arguments as {form}" if template.shows_tools else f"calls shown, arguments as {form}; tools as text"


def _reason(message: str) -> str:
    if told := re.search(r"refuses a chat of [\w, ]+: (.*?)\.* Change the rows", message):
        return told[1]
    if lost := re.search(r"drops \(or changes\) (the \w+ (?:message|of))", message):
        return f"drops {lost[1].removesuffix(' of')}"
    return "calls are not shown" if "leaves out the calls" in message else "its place is not certain"


def reference(page: str) -> str:
    """The page with the table as it is now."""
    before, behind = page.split(BEGIN)
    return before + BEGIN + table() + END + behind.split(END)[1]


if __name__ == "__main__":
    file = ROOT / "docs" / "templates.md"
    file.write_text(reference(file.read_text(encoding="utf-8")), encoding="utf-8")
