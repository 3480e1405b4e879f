"""`training-lens push`: what it says it sends is what arrives; wrong words are one line and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result
from hub_server import Hub

from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import write_json

Call = Callable[..., Result]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of its client


@pytest.mark.slow
def test_what_a_dry_run_lists_is_what_a_push_sends(call: Call, hub: Hub, own_run: RunFolder) -> None:
    listed = json.loads(call("push", str(own_run.root), "me/tiny", "--dry-run", "--json").stdout)
    assert not listed["sent"] and listed["compared"] and not hub.requests("^(POST|PUT)")
    sent = json.loads(call("push", str(own_run.root), "me/tiny", "--json").stdout)
    assert sent["sent"] and sent["url"].startswith(hub.url) and sent["files"] == listed["files"]
    there = hub.files("me/tiny")
    assert {file["path"]: file["bytes"] for file in sent["files"]} == {
        path: len(content) for path, content in there.items() if path != ".gitattributes"
    }
    assert hub.repo("me/tiny")["private"]
    again = call("push", str(own_run.root), "me/tiny")
    assert again.exit_code == 0 and "me/tiny has all of it already" in again.stdout


def test_options_say_where_and_what(call: Call, hub: Hub, own_run: RunFolder) -> None:
    own = "tracking.hub.repo=me/open"
    result = call("push", str(own_run.root), own, "--public", "--checkpoints", "--revision", "trial", "--json")
    assert result.exit_code == 0, result.stderr
    assert not hub.repo("me/open")["private"] and set(hub.files("me/open")) == {".gitattributes"}
    assert any(path.startswith("training_lens_checkpoints/") for path in hub.files("me/open", "trial"))


@pytest.mark.slow
@pytest.mark.parametrize("dry", [pytest.param((), marks=pytest.mark.slow), ("--dry-run",)])
def test_a_repository_that_others_see_is_told(call: Call, hub: Hub, own_run: RunFolder, dry: tuple[str, ...]) -> None:
    call("push", str(own_run.root), "me/open", "--public")
    (own_run.reports / "lens.html").write_text("new")
    told = call("push", str(own_run.root), "me/open", *dry)
    assert told.exit_code == 0
    assert "me/open exists already, and stays public: everyone sees what is sent there" in told.stdout + told.stderr


def test_wrong_words_are_wrong_usage(call: Call, own_run: RunFolder) -> None:
    run = str(own_run.root)
    for words, said in {
        (run,): "names no tracking.hub.repo; give one: training-lens push",
        (run, "tiny"): "'tiny' is no repository of the hub; give owner/name",
        (run, "me/tiny", "training.lr=1"): "push sends a run as it is. It takes output.*, tracking.hub.*",
        (run, "me/tiny", "tracking.hub.repo=me/other"): "me/tiny and tracking.hub.repo=me/other both name a repository",
        (): "Missing argument 'RUN'",
    }.items():
        result = call("push", *words)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr


def test_what_cannot_be_pushed_is_one_line(call: Call, own_run: RunFolder) -> None:
    missing = call("push", "lates", "me/tiny", f"output.base_output_dir={own_run.root}")
    assert missing.exit_code == 1 and "Did you mean 'latest'?" in missing.stderr
    write_json(own_run.metadata / "summary.json", own_run.read_metadata("summary.json") | {"status": "failed"})
    unfinished = call("push", str(own_run.root), "me/tiny", "--dry-run")
    assert unfinished.exit_code == 1 and "is failed and has no adapter to push" in " ".join(unfinished.stderr.split())


def test_a_refusal_of_the_hub_is_one_line(call: Call, hub: Hub, own_run: RunFolder) -> None:
    refused = call("push", str(own_run.root), "others/tiny")
    assert refused.exit_code == 1 and "may not write to 'others/tiny' (HTTP 403)" in " ".join(refused.stderr.split())
