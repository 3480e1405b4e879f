"""Measure the code itself: sizes, names and what recurs, as a table of one commit or of several side by side.

    python tools/code_metrics.py [COMMIT ...]

Without a commit, the working tree. Reads the syntax tree alone: nothing is imported.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG_FILE, MANY_PARAMETERS = 350, 8
PREPOSITIONS = frozenset(
    "about above after along around as at before behind below beneath beside between beyond by down during for from in "
    "inside into like near of off on onto out over past per since through to toward under until up upon via with "
    "within without".split()
)
PREFIXES = frozenset("as from on to with without".split())  # `from_json`, `on_step_end`: what Python calls such things
NO_PARTICIPLES = frozenset("feed seed need embed speed shed exceed proceed bed red".split())
IRREGULAR = frozenset(
    "begun bound brought built chosen done drawn driven fallen felt found given gone got grown heard held kept known "
    "laid left lent lost made meant met paid proven said seen sent shown spent stood taken told thought understood won "
    "written".split()
)


@dataclass
class Code:
    """What the syntax trees of a commit hold."""

    files: dict[str, str] = field(default_factory=dict)
    functions: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = field(default_factory=list)
    classes: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, text: str) -> None:
        self.files[path] = text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.append((path, node))
            elif isinstance(node, ast.ClassDef):
                self.classes.append((path, node.name))

    def names(self) -> Iterator[str]:
        """Names of functions, without those that Python gives."""
        return (node.name.strip("_") for _, node in self.functions if not node.name.startswith("__"))


def read_code(commit: str | None, below: str = "src/") -> Code:
    """The Python files of a commit below a folder; of the working tree without one."""
    code = Code()
    if commit is None:
        for path in sorted((ROOT / below).rglob("*.py")):
            code.add(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        return code
    archive = subprocess.run(["git", "archive", commit, below], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for member in packed.getmembers():
            if member.name.endswith(".py") and (file := packed.extractfile(member)):
                code.add(member.name, file.read().decode("utf-8"))
    return code


def count_lines(code: Code) -> int:
    return sum(text.count("\n") for text in code.files.values())


def is_one_word(name: str) -> bool:
    return "_" not in name


def is_participle_or_preposition(name: str) -> bool:
    """Whether a function is named as `_made`, `of` or `in_line` are; `damaged_files` has a noun."""
    first, *others = name.split("_")
    if first in PREPOSITIONS:
        return not others or first not in PREFIXES
    is_regular = bool(re.fullmatch(r"[a-z]+ed", first)) and first not in NO_PARTICIPLES
    return not others and (is_regular or first in IRREGULAR)


def recurring_modules(code: Code) -> list[str]:
    """Names of modules that stand in more than one package."""
    packages = defaultdict(set)
    for path in code.files:
        packages[Path(path).name].add(Path(path).parent)
    return sorted(name for name, places in packages.items() if len(places) > 1 and not name.startswith("__"))


def recurring_classes(code: Code) -> list[str]:
    return sorted(name for name, count in Counter(name for _, name in code.classes).items() if count > 1)


def count_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All that a caller may give; not `self` and `cls`."""
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0)


def share(code: Code, test: Callable[[str], bool]) -> str:
    names = list(code.names())
    found = sum(map(test, names))
    return f"{found:,} of {len(names):,} ({100 * found / max(len(names), 1):.0f} %)"


def measure(commit: str | None) -> dict[str, str]:
    """Each row of the table for one commit."""
    source, tests = read_code(commit), read_code(commit, "tests/")
    lengths = sorted(body_lines(node) for _, node in source.functions)
    return {
        "files in src/": f"{len(source.files):,}",
        "lines in src/": f"{count_lines(source):,}",
        "files in tests/": f"{len(tests.files):,}",
        "lines in tests/": f"{count_lines(tests):,}",
        "lines of a function: median": f"{statistics.median(lengths):.0f}",
        "lines of a function: nine in ten have at most": f"{lengths[len(lengths) * 9 // 10]}",
        "functions with a name of one word": share(source, is_one_word),
        "functions named by a participle or preposition": share(source, is_participle_or_preposition),
        "module names in more than one package": f"{len(recurring_modules(source))}",
        "class names that occur twice": f"{len(recurring_classes(source))}",
        f"functions of {MANY_PARAMETERS} parameters or more": f"{len(find_wide(source))}",
        f"files of over {LONG_FILE} lines": f"{len(find_long(source))}",
    }


def find_wide(code: Code) -> list[str]:
    return [f"{path}: {node.name}" for path, node in code.functions if count_parameters(node) >= MANY_PARAMETERS]


def find_long(code: Code) -> list[str]:
    return [path for path, text in code.files.items() if text.count("\n") > LONG_FILE]


def main(commits: list[str]) -> None:
    columns = {commit: measure(commit) for commit in commits} or {"working tree": measure(None)}
    print(f"| | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")
    code = read_code(commits[-1] if commits else None)
    for title, names in (
        ("modules", recurring_modules(code)), ("classes", recurring_classes(code)), ("wide", find_wide(code)),
        ("long", find_long(code)),
        ("participles and prepositions", sorted(set(filter(is_participle_or_preposition, code.names())))),
    ):  # fmt: skip
        print(f"\n{title}: {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
