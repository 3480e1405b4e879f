"""What the pages tell a reader to type exists: commands, options, keys, presets, scripts, targets of make."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from training_lens.cli import cli
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "llms.txt", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # tells of earlier versions, too
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\s|/)(?:training-lens|-m training_lens)\s+(.+)")
SCRIPT = re.compile(r"(?:^|\s|/)python3? ((?:benchmarks|tools|tests)/[\w/]+\.py)(.*)")
SETTING = re.compile(r"\+?([A-Za-z_][\w.]*)=")
KEYS = frozenset(known_keys(TrainingConfig))
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
GROUPS = {
    path.name: {file.stem for file in path.glob("*.yaml")}
    for path in (ROOT / "src/training_lens/config/presets").iterdir()
}
one_by_one = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def typed_lines(page: Path) -> list[str]:
    """The lines of a page's blocks of code, continued ones joined, and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in blocks] + inline_code(page)


def inline_code(page: Path) -> list[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


@cache
def find_command(words: tuple[str, ...]) -> tuple[Any, int]:
    """The command that the first words name, and how many they are."""
    found: Any = typer.main.get_command(cli)
    for place, word in enumerate(words):
        inner = getattr(found, "get_command", lambda *_: None)(None, word)
        if inner is None:
            return found, place
        found = inner
    return found, len(words)


def options_of(command: Any) -> set[str]:
    return {"--help", "-h", "--version"} | {
        name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
    }


def is_setting_known(word: str) -> bool:
    """Whether a word like `training.lr=1e-4` or `+experiment=dora` sets something that is there."""
    key, _, value = word.lstrip("+~").partition("=")
    if key in GROUPS:
        return all(name in GROUPS[key] for name in value.split("|")) or not value.isidentifier()
    key = key.removeprefix("sweep.space.")
    return key in KEYS or any(known.startswith(f"{key}.") or key.startswith(f"{known}.") for known in KEYS)


def find_unknown(typed: str) -> Iterator[str]:
    """The words of a command line, behind `training-lens`, that the command does not know."""
    words = shlex.split(re.sub(r"\[([^]\s]*)\]", r"\1", typed), comments=True)
    command, count = find_command(tuple(words))
    if hasattr(command, "commands") and count < len(words) and not words[count].startswith("-"):
        yield words[count]
    takes_names = any("NAME=" in str(parameter.metavar) for parameter in command.params)
    for word in words[count:]:
        if word in ("|", ">", "&&", ";", "&"):
            return
        option = word.partition("=")[0].rstrip(",.")
        if option.startswith("-") and not re.match(r"-\d|-+$", option) and option not in options_of(command):
            yield option
        elif SETTING.match(word) and not takes_names and not is_setting_known(word):
            yield word


@one_by_one
def test_commands_have_what_they_are_given(page: Path) -> None:
    typed = [match[1] for line in typed_lines(page) if (match := COMMAND.search(line)) and "COMMAND" not in line]
    assert {words: unknown for words in typed if (unknown := list(find_unknown(words)))} == {}


@one_by_one
def test_scripts_and_targets_of_make_are_there(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in typed_lines(page):
        if script := SCRIPT.search(line):
            source = (ROOT / script[1]).read_text(encoding="utf-8")
            told = set(re.findall(r"\s(--[a-z][\w-]*)", script[2].partition("#")[0]))
            assert all(f'"{option}"' in source or option == "--help" for option in told), line
        for target in re.findall(r"^make ([a-z][\w-]*)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line


@one_by_one
def test_keys_that_the_prose_names_are_keys(page: Path) -> None:
    """Also files, modules of the package, and objects of it, whose names may begin like a section."""
    named = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_][\w]*)+(?=$|=)")
    for code in inline_code(page):
        if found := named.match(code):
            is_file = found[0].endswith((".json", ".jsonl", ".html", ".gguf", ".yaml"))
            assert is_file or is_setting_known(f"{found[0]}=") or is_importable(found[0]), code


def is_importable(name: str) -> bool:
    import pkgutil

    try:
        pkgutil.resolve_name(f"training_lens.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@one_by_one
def test_options_that_the_prose_names_are_options(page: Path) -> None:
    """Of some command, of a script that the page names, or of another program whose call the page shows."""
    lines = typed_lines(page)
    scripts = [(ROOT / script[1]).read_text(encoding="utf-8") for line in lines if (script := SCRIPT.search(line))]
    elsewhere = {word for line in lines if not line.startswith("-") for word in line.split()}
    for code in inline_code(page):
        if option := re.match(r"--[a-z][\w-]*", code):
            known = option[0] in all_options() or any(f'"{option[0]}"' in script for script in scripts)
            assert known or option[0] in elsewhere, code


@cache
def all_options() -> set[str]:
    def collect(command: Any) -> set[str]:
        inner = [command.get_command(None, name) for name in getattr(command, "commands", ())]
        return options_of(command).union(*(collect(each) for each in inner))

    return collect(typer.main.get_command(cli))
