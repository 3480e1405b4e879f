"""The pages say what the code does."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig

ROOT = Path(__file__).parents[1]


def test_the_key_reference_is_that_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from config_reference import reference  # type: ignore[import-not-found]

    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run python tools/config_reference.py"


def test_the_names_of_other_trainers_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from coming_from_reference import reference  # type: ignore[import-not-found]

    assert (ROOT / "docs/coming-from.md").read_text() == reference(), "run python tools/coming_from_reference.py"


def test_the_table_of_templates_is_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from template_reference import reference  # type: ignore[import-not-found]

    page = (ROOT / "docs/templates.md").read_text()
    assert page == reference(page), "run python tools/template_reference.py"


PAGES = sorted([*ROOT.glob("*.md"), ROOT / "llms.txt", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert target.startswith("http") or found.exists(), target
        assert not anchor or target.startswith("http") or anchor in list_anchors(found.read_text()), (
            f"{target}#{anchor}"
        )


def list_anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_embedded_set_is_what_its_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the seed, byte for byte; held-out rows share nothing with training."""
    import json
    from dataclasses import asdict

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from small_world import DOMAINS, instruction_sets  # type: ignore[import-not-found]

    train, heldout = instruction_sets(3, 2100, 330)
    folder = ROOT / "src/training_lens/embedded"
    for rows, name in ((train, "train.jsonl"), (heldout, "heldout.jsonl")):
        assert (folder / name).read_text() == "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    assert not {(r.instruction, r.input) for r in train} & {(r.instruction, r.input) for r in heldout}
    assert {r.domain for r in train} == {r.domain for r in heldout} == set(DOMAINS)
    assert len({r.skill for r in heldout}) == 4 and len(train) >= 2000 and len(heldout) >= 300


def test_the_embedded_model_is_small_and_safe() -> None:
    files = list((ROOT / "src/training_lens/embedded/base").iterdir())
    assert sum(f.stat().st_size for f in files) <= 6_000_000
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl", ".py")]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_functions_that_maintainers_are_sent_to_exist(page: str) -> None:
    """`room/module.py` `Class.method`: the file is there and defines each part of the name."""
    references = re.findall(
        r"`(?:src/training_lens/)?([a-z_/]+/[a-z_]+\.py)`(?:\s+`([A-Za-z_.]+)`)?", (ROOT / page).read_text()
    )
    for path, name in references:
        file = next(f for f in (ROOT / "src/training_lens" / path, ROOT / path) if f.exists())
        for part in filter(None, name.split(".")):
            assert re.search(rf"^ *(def|class) {part}\b|^{part}\b", file.read_text(), re.MULTILINE), f"{path} {name}"


def test_the_python_page_names_what_python_finds() -> None:
    """`room.module.name` of the page resolves: a module, or an attribute of one."""
    rooms = "|".join(p.name for p in (ROOT / "src/training_lens").iterdir() if (p / "__init__.py").exists())
    text = (ROOT / "docs/python.md").read_text()
    names = re.findall(rf"`(?:training_lens\.)?((?:{rooms})\.[A-Za-z_][\w.]*)", text)
    keys = known_keys(TrainingConfig)
    missing = [name for name in names if name not in keys and not _is_importable(f"training_lens.{name}")]
    assert len(names) > 20 and missing == []


def _is_importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
