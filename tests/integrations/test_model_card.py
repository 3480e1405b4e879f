"""A card says what the run's files say, to the letter: nothing in names and findings becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from training_lens.integrations.hub_files import PathShortener
from training_lens.integrations.model_card import render_model_card
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import write_text

ODD = [
    "<img src=x onerror=alert(1)>",
    "a|b \\| c",
    "[here](http://evil.example) ![x](y) **bold** _em_ `code` $x$ ~~no~~",
    "&lt;b&gt; line\none # two",
]


class Page(HTMLParser):
    """The tags of a page, and the texts of its table cells, row by row."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag == "code")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def card_of(run: RunFolder) -> str:
    record = RunRecord(run)
    return render_model_card(record, PathShortener(record), "me/tiny").split("---\n", 2)[2]


@pytest.fixture
def plain(own_run: RunFolder) -> set[str]:
    """The tags of a card in which all names are plain."""
    return Page(card_of(own_run)).tags


def test_names_of_domains_are_shown_to_the_letter(own_run: RunFolder, plain: set[str]) -> None:
    lines = [json.loads(line) for line in own_run.metrics_file.read_text().splitlines()]
    for line in lines:
        line.pop("crc", None)
        if line["kind"] != "step":
            line["by_domain"] = dict.fromkeys(ODD, line["loss"])
    write_text(own_run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
    own_run.write_metadata("data.json", own_run.read_metadata("data.json") | {"domains": ODD})
    page = Page(card_of(own_run))
    first = [row[0] for row in page.rows]
    assert [name for name in ODD if f"domain {' '.join(name.split())}" not in first] == []
    assert page.tags == plain


@pytest.mark.slow
def test_findings_are_shown_to_the_letter(own_run: RunFolder) -> None:
    analysis = RunRecord(own_run).analysis
    assert analysis is not None
    findings = analysis.analyze().findings
    assert any("|" in finding.measured for finding in findings), "a text that a table could take for its own"
    shown = {row[1]: row[2] for row in Page(card_of(own_run)).rows if len(row) == 3}
    for finding in findings:
        title = f"{finding.title} ({finding.where})" if finding.where else finding.title
        assert shown[title] == " ".join(finding.measured.split())


@pytest.mark.slow
def test_the_date_that_a_template_wrote_into_prompts_is_named(own_run: RunFolder) -> None:
    assert "writes a date" not in card_of(own_run)
    config = own_run.read_metadata("config.json")
    own_run.write_metadata("config.json", config | {"data": config["data"] | {"date": "2026-01-31"}})
    assert "In training it was always 2026-01-31" in card_of(own_run)
