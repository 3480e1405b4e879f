"""A sandbox for chat templates, which are foreign code, with limits on time and output of one rendering.

The clock is checked in every loop iteration and macro. Operations that lengthen a text check the resulting length
first, since a running Python operation cannot be interrupted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from training_lens.utils.limits import TEMPLATE_CHARACTERS, TEMPLATE_SECONDS, TEMPLATE_TEXT, TEMPLATE_VALUES

SHORT = 4096  # characters; shorter texts are not counted, the time limit suffices
LENGTHENING = frozenset(
    "batch center expandtabs format indent join ljust pprint replace rjust slice string tojson translate urlencode "
    "urlize wordwrap xmlattr zfill".split()
)
WIDEST = 10_000  # most characters of padding or indent, and most bits of an integer
_WIDE_FORMAT = re.compile(r"\d{5}|\*|:[^{}]*\{")  # of '%99999d', '%*d', '{:>99999}', '{:>{width}}'


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what another one has, and limits; call `start_rendering` before each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, other: Environment) -> None:
        extensions = [type(extension) for extension in other.extensions.values()]
        super().__init__(finalize=self.finalize_value, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.globals |= other.globals
        filters = {**self.filters, **other.filters}
        self.filters |= {name: self._limit_filter(name, function) for name, function in filters.items()}
        self.start_rendering()

    def start_rendering(self) -> None:
        """Reset the limits for one rendering."""
        self._until, self._characters = time.monotonic() + TEMPLATE_SECONDS, 0

    @property
    def has_time(self) -> bool:
        """True; raises once the time is up. A property, as that is the fastest access from a template."""
        if time.monotonic() > self._until:
            raise TemplateError(f"rendering takes over {TEMPLATE_SECONDS} s")
        return True

    def check_length(self, characters: int) -> None:
        """Check that a text of so many characters is within the limits."""
        self._characters += characters
        if characters > TEMPLATE_TEXT or self._characters > TEMPLATE_CHARACTERS:
            raise TemplateError(f"makes a text of over {TEMPLATE_TEXT:,} characters, or {TEMPLATE_CHARACTERS:,} in all")

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a rendering, macro or block."""
        kept, unchecked = [], 0
        for piece in pieces:
            unchecked += len(piece)
            if unchecked > SHORT:
                self.check_length(unchecked)
                unchecked = 0
            kept.append(piece)
        return "".join(kept)

    def join_values(self, *values: Any) -> str:
        """The result of `a ~ b`."""
        return self.concat(str(self.finalize_value(value)) for value in values)

    def finalize_value(self, value: Any) -> Any:
        """Check a value before it becomes text: nested lists that share items could be of any size."""
        if not isinstance(value, str):
            _check_values(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) < SHORT:
            return left + right
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "+":
            self.check_length(_measure_length(left) + _measure_length(right))
        elif operator == "*":
            lengths = [_measure_length(value) * _as_whole_number(n) for value, n in ((left, right), (right, left))]
            self.check_length(max(lengths))
        if operator in ("*", "**"):
            left_bits, right_bits = (value.bit_length() if isinstance(value, int) else 0 for value in (left, right))
            is_power = operator == "**"
            _check_width(left_bits * abs(_as_whole_number(right)) if is_power else left_bits + right_bits)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and (__obj.__name__ in LENGTHENING or len(owner) > SHORT):
            __self._check_text(__obj.__name__, owner, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def run_checked(*args: Any, **kwargs: Any) -> Any:
            self._check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return run_checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Checks().visit(super()._parse(source, name, filename))
        return tree

    def _limit_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with a length check before it; an argument that Jinja passes before the value is kept."""
        place = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def run_checked(*args: Any, **kwargs: Any) -> Any:
            value = args[place]
            if name in LENGTHENING:
                value = self._check_filter(name, value, [*args[place + 1 :], *kwargs.values()])
                return function(*args[:place], value, *args[place + 1 :], **kwargs)
            if type(value) is str and len(value) > SHORT:
                self.check_length(len(value))
            return function(*args, **kwargs)

        return run_checked

    def _check_filter(self, name: str, value: Any, others: list[Any]) -> Any:
        """The checked value for a filter; an iterator becomes a list."""
        if name == "join":
            value = list(value)
            between = _measure_length(others[0] if others else "")
            self.check_length(sum(_measure_length(item) + between for item in value))
        if name == "format":
            self._check_format(str(value), others)
        elif isinstance(value, str):
            self._check_text(name, value, others)
        else:
            self._check_text(name, "", others)
            _check_values(value)
        return value

    def _check_text(self, name: str, text: str, arguments: list[Any]) -> None:
        """Check the length of what a method or filter would make of a text."""
        if name in LENGTHENING:
            _check_width(max((_as_whole_number(argument) for argument in arguments), default=0))
        made = len(text)
        if name == "replace" and len(arguments) >= 2:
            made += text.count(str(arguments[0])) * _measure_length(arguments[1])
        elif name == "join" and arguments:
            made += sum(_measure_length(item) + len(text) for item in _list_items(arguments[0]))
        elif name in ("indent", "expandtabs"):
            widest = max([8, *map(_as_whole_number, arguments), *map(_measure_length, arguments)])
            made += (text.count("\n") + text.count("\t") + 1) * widest
        self.check_length(made)

    def _check_format(self, text: str, arguments: Iterable[Any]) -> None:
        if _WIDE_FORMAT.search(text):
            raise TemplateError("formats a value to a width that is wide, or told by another value")
        items = (item for argument in arguments for item in (argument, *_list_items(argument)))
        longest = max(map(_measure_length, items), default=0)
        self.check_length(len(text) + (text.count("%") + text.count("{")) * longest)


class _Checks(NodeTransformer):
    """Inserts checks into a template: into each loop body and macro, and for `a ~ b`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("has_time"), node.test)
        return self._visit_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join_values")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)

    def _visit_body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("has_time")).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = _visit_body  # noqa: N815


def _check_width(width: int) -> None:
    if width > WIDEST:
        raise TemplateError(f"fills up to {width:,}; {WIDEST:,} is the most")


def _check_values(value: Any) -> None:
    """Check the number of values in lists and objects; shared values count each time."""
    level, values = [value], 0
    while level:
        level = [item for outer in level for item in _list_items(outer)]
        values += len(level)
        if values > TEMPLATE_VALUES:
            raise TemplateError(f"writes a list or object of over {TEMPLATE_VALUES:,} values")


def _list_items(value: Any) -> Iterable[Any]:
    """The values of a list or object; nothing for scalars."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def _measure_length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 8


def _as_whole_number(value: Any) -> int:
    return value if isinstance(value, int) else 0
