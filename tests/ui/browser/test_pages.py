"""Each page used as a person uses it: while a run trains, when it dies or is deleted, on any screen, by keyboard."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import fork_command
from ui.run_factory import step_line, write_run

from training_lens.display.html import (
    BulletList,
    Callout,
    PictureGrid,
    ShadedText,
    ShadedToken,
    SvgPicture,
    Table,
    write_page,
)
from training_lens.display.svg import Curve, render_chart, render_heat_map
from training_lens.runs.run_folder import PROCESS, RunFolder
from training_lens.utils.integrity import seal_line

EVIL = "<img src=x onerror=alert(1)>"
WIDTHS = (360, 1280, 2560)
TRAINING = (
    *("train", "data.max_examples=160", "training.epochs=2", "training.batch_size=4", "peft.r=4"),
    *("tracking.tensorboard=false", "output.base_output_dir=outputs", "output.run_id=live"),
)


@pytest.fixture
def own_outputs(finished_run: RunFolder, tmp_path: Path) -> Path:
    outputs = tmp_path / "outputs"
    shutil.copytree(finished_run.root, outputs / "experiments/default/runs" / finished_run.run_id)
    return outputs


def run_address(url: str, run: RunFolder) -> str:
    return f"{url}/#/run/{run.experiment_name}/{run.run_id}"


def test_a_run_is_judged_on_one_page(
    own_outputs: Path, finished_run: RunFolder, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    """From the list to the verdict, its evidence and the next command."""
    page = open_page(start_dashboard(own_outputs).url)
    page.locator(".runs").get_by_text("better, no interval").wait_for()
    page.get_by_role("link", name=finished_run.run_id).click()
    page.get_by_role("heading", name=re.compile("^Better than the base: validation loss .* found")).wait_for()
    assert "training-lens compare --run" in page.locator(".command").first.inner_text()
    for title in ("Loss", "Answers", "Evaluation", "Findings", "Layers", "Explanations", "Settings", "Files"):
        page.get_by_role("heading", name=title, exact=True).wait_for()
    assert page.locator(".uplot").count() >= 3
    page.get_by_role("link", name="Layers", exact=True).click()
    page.locator(".heat canvas").wait_for()
    page.get_by_text("The numbers as a table").first.click()
    page.locator(".chart table tbody tr").nth(8).wait_for()
    with page.expect_download() as download:
        page.get_by_text(re.compile("^[0-9]+ files$")).click()
        page.get_by_role("link", name="metadata/config.json").click()
    assert json.loads(Path(download.value.path()).read_text())["peft"]["r"] == 16


@pytest.mark.slow
def test_a_run_is_watched_by_two_while_it_trains_and_when_it_is_deleted(
    tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    run = write_run(tmp_path / "outputs", "default", "live", steps=20, status="running")
    (run.metadata / "config.json").write_text(
        (run.metadata / "config.json").read_text().replace('"max_steps": null', '"max_steps": 40')
    )
    dashboard = start_dashboard(tmp_path / "outputs")
    with run.hold_lock():
        os.utime(run.metadata / PROCESS, (0, 0))  # it trains since before its first step
        pages = [open_page(run_address(dashboard.url, run)) for _ in range(2)]
        for page in pages:
            page.get_by_role("heading", name=re.compile("^Training. So far: better than the base")).wait_for()
            page.get_by_text("20 of 40").wait_for()
        plots = [page.locator(".uplot canvas").first.element_handle() for page in pages]
        pages[1].set_viewport_size({"width": 1280, "height": 300})
        far = pages[1].locator(".uplot canvas").nth(1).element_handle()
        before = far.evaluate("node => node.toDataURL()")
        with run.metrics_file.open("a") as file:
            for step in range(21, 31):
                file.write(seal_line(step_line(step, 40)) + "\n")
        for page in pages:
            page.get_by_text("30 of 40").wait_for()
            assert page.evaluate("document.getAnimations().length") == 0  # which would draw all the time
        assert all(plot.evaluate("node => node.isConnected") for plot in plots)  # they take over what is new
        assert far.evaluate("node => node.toDataURL()") == before  # out of view: drawn when somebody looks at it
        far.scroll_into_view_if_needed()
        pages[1].wait_for_function("([node, before]) => node.toDataURL() !== before", arg=[far, before])
        os.utime(run.metadata / PROCESS, None)
        with run.metrics_file.open("a") as file:
            file.write(seal_line({"kind": "validation", "step": 30, "loss": 0.9, "time": 3.0}) + "\n")
        for page in pages:
            page.get_by_role("heading", name="Resuming after step 30.").wait_for()
    pages[0].locator(".badge", has_text="died").first.wait_for()
    pages[0].get_by_text("training-lens train --resume").wait_for()
    shutil.rmtree(run.root)
    for page in pages:
        page.get_by_text("This run was deleted.").wait_for()
        assert page.locator(".uplot").count() >= 1  # what was read stays


@pytest.mark.slow
def test_a_real_run_is_followed_from_its_first_step_to_its_verdict(
    tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    process = fork_command(tmp_path, *TRAINING)
    (tmp_path / "outputs").mkdir(exist_ok=True)
    page = open_page(start_dashboard(tmp_path / "outputs").url)
    page.get_by_role("link", name="live").click(timeout=60_000)
    page.get_by_role("progressbar").wait_for(timeout=60_000)
    page.get_by_role("heading", name=re.compile("^Better than the base")).wait_for(timeout=120_000)
    assert page.get_by_role("progressbar").count() == 0
    process.join(60)
    assert process.exitcode == 0


def test_a_held_out_prompt_is_filled_in_with_the_answer_of_its_row(
    own_outputs: Path, finished_run: RunFolder, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    page = open_page(f"{start_dashboard(own_outputs).url}/#/playground/default/{finished_run.run_id}")
    page.get_by_role("button", name="A held-out prompt").click()
    page.get_by_text(re.compile(r"^Row \S+:[0-9]+, which the adapter did not learn from\.$")).wait_for()
    page.get_by_role("heading", name="The row's own answer").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value()
    page.get_by_label("Prompt", exact=True).press("End")
    page.keyboard.type(" And why?")
    assert not page.get_by_role("heading", name="The row's own answer").is_visible()


def test_what_a_reader_chose_is_there_when_they_come_back_from_a_comparison(
    tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / "outputs", "default", name, steps=30)
    page = open_page(start_dashboard(tmp_path / "outputs").url)
    page.get_by_label("Group by").select_option("model")
    page.get_by_role("button", name="Best loss").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.innerText") == "Best loss ↑"  # the keyboard stays where it was
    for box in page.locator(".runs tbody input").all():
        box.check()
    page.get_by_role("link", name="Compare 2 runs").click()
    page.get_by_text(
        re.compile(r"training-lens compare --run \S+/(one --against \S+/two|two --against \S+/one)$")
    ).wait_for()
    signs = page.locator("main table .sign")
    assert [signs.nth(i).bounding_box()["width"] for i in range(2)] == [9, 9]  # each run in the colour of its curves
    page.go_back()
    page.get_by_role("link", name="Compare 2 runs").wait_for()
    assert page.get_by_label("Group by").input_value() == "model"
    assert page.locator("th[aria-sort]").inner_text() == "Best loss ↑"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("run/default/none", "There is no run 'none' in the experiment 'default'"),
        ("run/none", "This address names no run."),
        ("compare?run=default/one", "a comparison needs 2 to 6 runs; 1 given."),
    ],
)
def test_an_address_that_leads_nowhere_says_why(
    address: str, words: str, tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    write_run(tmp_path / "outputs", "default", "one")
    page = open_page(f"{start_dashboard(tmp_path / 'outputs').url}/#/{address}")
    page.get_by_role("alert").get_by_text(words).wait_for()
    page.get_by_role("link", name="Skip to the page").press("Enter")
    assert page.url.endswith(address)


def test_names_rows_and_answers_are_shown_as_text(
    tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    run = write_run(tmp_path / "outputs", f"a {EVIL}", "one", steps=30)
    (run.metadata / "tags.json").write_text(json.dumps([EVIL]))
    sample = {"id": EVIL, "prompt": EVIL, "expected": EVIL, "generated": f"</pre>{EVIL}", "ended": True, "loops": False}
    finding = {"event": "raised", "code": "x", "severity": "warning", "title": EVIL, "measured": EVIL, "action": EVIL}
    run.samples_file.write_text(seal_line({"step": 30, "base": False, "samples": [sample], "time": 1.0}) + "\n")
    run.findings_file.write_text(seal_line({"step": 30, **finding, "time": 1.0}) + "\n")
    page = open_page(start_dashboard(tmp_path / "outputs").url)
    page.get_by_text(f"a {EVIL}").first.wait_for()
    page.get_by_role("link", name="one").click()
    page.get_by_text(f"</pre>{EVIL}").wait_for()
    assert page.locator("main img").count() == 0


def test_a_page_goes_on_with_a_server_that_was_started_again(
    own_outputs: Path, finished_run: RunFolder, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    first = start_dashboard(own_outputs)
    page = open_page(first.url)
    page.get_by_role("link", name=finished_run.run_id).wait_for()
    first.stop()
    page.get_by_text("Not connected; trying again").wait_for()
    write_run(own_outputs, "default", "later")
    start_dashboard(own_outputs, "--port", str(first.port))
    page.get_by_role("link", name="later").wait_for()
    assert page.get_by_text("Not connected").count() == 0


@pytest.mark.slow
def test_many_runs_are_found_sorted_grouped_and_compared(
    tmp_path: Path, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    for number in range(150):
        write_run(tmp_path / "outputs", f"sweep-{number % 3}", f"run-{number:03d}", steps=2 + number)
    page = open_page(start_dashboard(tmp_path / "outputs").url)
    page.get_by_text(re.compile("^150 runs in")).wait_for()
    assert page.locator(".runs tbody tr").count() == 50
    page.get_by_role("button", name="Show 50 more").click()
    assert page.locator(".runs tbody tr").count() == 100
    page.get_by_role("button", name="Steps").click()
    assert page.locator(".runs tbody th").first.inner_text().startswith("run-149")
    page.get_by_label("Group by").select_option("experiment")
    assert page.locator(".runs .group").all_inner_texts() == ["sweep-0", "sweep-1", "sweep-2"]
    page.get_by_label("Find").fill("sweep-1 run-00")
    page.get_by_text(re.compile("^3 of 150 runs in")).wait_for()
    for box in page.locator(".runs tbody input").all()[:2]:
        box.check()
    page.get_by_role("link", name="Compare 2 runs").click()
    page.get_by_role("heading", name="2 runs side by side").wait_for()
    assert page.locator(".uplot").count() >= 1


@pytest.mark.slow
def test_a_person_without_a_mouse_reaches_a_run(
    own_outputs: Path, finished_run: RunFolder, start_dashboard: Callable[..., Any], open_page: Callable[..., Any]
) -> None:
    page = open_page(start_dashboard(own_outputs).url)
    link = page.get_by_role("link", name=finished_run.run_id)
    link.wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if link.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Loss", exact=True).wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_breaks_a_rule_of_accessibility_or_overflows_its_screen(
    theme: str,
    own_outputs: Path,
    finished_run: RunFolder,
    start_dashboard: Callable[..., Any],
    open_page: Callable[..., Any],
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-core is not installed (make test-ui)"
    )
    other = write_run(own_outputs, "default", "other", steps=30)
    url, name = start_dashboard(own_outputs).url, f"default/{finished_run.run_id}"
    pages = {
        "": "Runs",
        f"run/{name}": "Findings",
        f"compare?run={name}&run=default/{other.run_id}": "Settings that differ",
        f"playground/{name}": "Adapter",
        f"data/{name}": "Data as the model sees it",
        "new": "The command",
    }
    page = open_page(url, theme=theme)
    for address, heading in pages.items():
        page.goto(f"{url}/#/{address}")
        page.get_by_role("heading", name=heading, exact=True).first.wait_for()
        page.wait_for_timeout(1500)
        found = axe.Axe().run(page)
        assert found.violations_count == 0, f"{address}: {found.generate_report()}"
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(150)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{address} at {width}"
        page.set_viewport_size({"width": 1280, "height": 900})
    curve = Curve("loss", np.arange(3.0), np.arange(3.0), "#0072B2")
    pictures = [
        SvgPicture(render_chart([curve], "step", "loss"), "A chart"),
        SvgPicture(render_heat_map(["a"], ["b"], np.ones((1, 1))), "A map"),
    ]
    words = [Callout("warning", "It jumps", [("where", "step 7")]), ShadedText("log p", [ShadedToken("a", 1.0, "a")])]
    table = Table("A table", ["", "loss", "why"], [["row", "1.5", "a sentence that is longer than any number"]])
    write_page(
        own_outputs / "page.html",
        "A page",
        ["Words.", "# A heading", table, BulletList(["one"]), *words, PictureGrid(pictures)],
    )
    page.goto((own_outputs / "page.html").as_uri())
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_report_of_a_run_is_its_page_and_needs_no_server(
    finished_run: RunFolder, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
    from training_lens.analysis.reports.standard import StandardReports

    path = StandardReports(CheckpointAnalyzer(finished_run.root).analyze()).write(tmp_path)
    assert path.stat().st_size < 1_000_000
    page = open_page(path.as_uri())
    page.get_by_role("heading", name=re.compile("^Better than the base")).wait_for()
    page.locator(".heat canvas").wait_for()
    assert page.locator(".uplot").count() >= 3
    page.locator("#layers select").first.select_option("gradient_norm")
    page.get_by_text("Before clipping. Rows that").wait_for()
    page.get_by_role("button", name="Use dark colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
def test_a_comparison_is_a_file_as_well(finished_run: RunFolder, open_page: Callable[..., Any], tmp_path: Path) -> None:
    from training_lens.analysis.reports.page_report import write_comparison_page

    other = write_run(tmp_path / "outputs", "default", "other", steps=30)
    write_comparison_page([finished_run, other], tmp_path / "both.html")
    assert (tmp_path / "both.html").stat().st_size < 1_000_000
    page = open_page((tmp_path / "both.html").as_uri())
    page.get_by_role("heading", name="2 runs side by side").wait_for()
    page.get_by_text("peft.r").wait_for()
    page.get_by_text("The updates were not compared").wait_for()
    assert page.locator(".uplot").count() >= 2
