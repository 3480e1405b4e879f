"""A push brings a repository up to date with a run: whole, once, whatever comes between; nothing private leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import READ_TOKEN, TOKEN, Hub
from slow_cases import mark_slow

from training_lens import TrainingWrapper
from training_lens.config.run_config import read_run_config, remember_consent
from training_lens.errors import CheckpointError, ConfigurationError, IntegrationError
from training_lens.integrations.hub import HuggingFaceIntegration
from training_lens.integrations.hub_files import PathShortener
from training_lens.integrations.record import RunRecord
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.runs.checkpoint_format import (
    checkpoint_folder,
    list_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json, write_json
from training_lens.utils.integrity import record_hashes

REPO = "me/adapter"
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's, of its own client


def integration(run: RunFolder, **options: Any) -> HuggingFaceIntegration:
    return HuggingFaceIntegration(RunRecord(run, {"tracking": {"hub": {"repo": REPO, **options}}}))


def downloaded(folder: Path, revision: str = "main") -> Path:
    """The repository, read back by the hub's own client."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(REPO, revision=revision, local_dir=folder))


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def writes(hub: Hub) -> list[str]:
    return [line["request"] for line in hub.requests("^(POST|PUT)")]


@pytest.fixture
def own_run(embedded_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the embedded model's run: who reads a card has no other base."""
    return RunFolder(Path(shutil.copytree(embedded_run.root, tmp_path / "runs" / embedded_run.run_id)))


def test_what_is_read_back_is_the_run(hub: Hub, own_run: RunFolder, tmp_path: Path) -> None:
    pushed = integration(own_run).push()
    folder = downloaded(tmp_path / "there")
    for part in (own_run.adapter, own_run.tokenizer):
        for file in part.iterdir():
            if file.name != "adapter_config.json":
                assert (folder / file.name).read_bytes() == file.read_bytes()
    config, ours = read_json(folder / "adapter_config.json"), read_json(own_run.adapter / "adapter_config.json")
    assert config == {**ours, "base_model_name_or_path": "embedded"}
    assert read_json(folder / "training_lens/summary.json") == {
        **own_run.read_metadata("summary.json"),
        "run_dir": own_run.run_id,
    }
    repo = hub.repo(REPO)
    assert repo["private"] and len(repo["commits"]) == 2
    assert pushed.url.endswith(repo["branches"]["main"])


@pytest.mark.slow
def test_the_card_says_the_numbers_of_the_run(hub: Hub, own_run: RunFolder) -> None:
    integration(own_run).push()
    card, summary = hub.files(REPO)["README.md"].decode(), own_run.read_metadata("summary.json")
    matter = front_matter(card)
    (metric,) = matter["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == summary["validation_loss"]
    assert matter["library_name"] == "peft" and "base_model" not in matter
    base, adapter = summary["base_validation_loss"], summary["validation_loss"]
    assert f"| all rows | {base:.4f} | {adapter:.4f} | {adapter - base:+.4f} |" in card
    for split in ("train", "validation"):
        for file, sha256 in own_run.read_metadata("data.json")[split]["files"].items():
            assert f"| {split} | {Path(file).name} |" in card and sha256 in card
    assert "## What the lens saw" in card and "| domain " in card


@pytest.mark.slow
def test_the_code_of_the_card_loads_what_was_pushed(
    hub: Hub, own_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    integration(own_run).push()
    folder = downloaded(tmp_path / "there")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    values: dict[str, Any] = {}
    exec(code.replace(REPO, str(folder)), values)
    loaded = {name: p for name, p in values["model"].named_parameters() if "lora_" in name}
    saved = load_file(own_run.adapter / WEIGHTS)
    assert len(loaded) == len(saved)
    for name, tensor in saved.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_a_second_push_writes_nothing(hub: Hub, own_run: RunFolder) -> None:
    assert integration(own_run).push().url
    before = writes(hub)
    again = integration(own_run).push()
    assert not again.url and again.plan.is_done
    assert writes(hub) == before
    assert not integration(own_run).outstanding()


@pytest.mark.slow
def test_a_changed_report_is_sent_alone(hub: Hub, own_run: RunFolder) -> None:
    integration(own_run).push()
    (own_run.reports / "lens.html").write_text("<p>another</p>")
    assert integration(own_run).outstanding() == "the adapter and its card"
    assert [file.path for file in integration(own_run).push().plan.send] == ["training_lens/lens.html"]
    assert hub.files(REPO)["training_lens/lens.html"] == b"<p>another</p>"


def test_a_plan_asks_and_changes_nothing(hub: Hub, own_run: RunFolder) -> None:
    plan = integration(own_run).plan()
    assert not plan.unknown and {file.path for file in plan.send} > {"README.md", WEIGHTS}
    assert not writes(hub) and not (hub.folder / "repos/me--adapter.json").exists()
    assert not own_run.tracking.joinpath("hub/cursor.json").exists()


@pytest.mark.slow
def test_without_a_token_a_plan_asks_nobody(
    hub: Hub, own_run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    plan = integration(own_run).plan()
    assert plan.unknown.startswith("no token of the hub") and plan.send
    with pytest.raises(IntegrationError, match="no token of the hub: log in with hf auth login, or set HF_TOKEN"):
        integration(own_run).push()
    assert len(hub.requests()) == 1  # that it lives


@pytest.mark.slow
def test_trouble_on_the_way_is_waited_out(hub: Hub, own_run: RunFolder) -> None:
    hub.order(
        {"on": "POST .*/commit/", "status": 500, "times": 1},
        {"on": "GET .*/tree/", "status": 429, "headers": {"retry-after": "1"}, "times": 1},
    )
    assert integration(own_run).push().url
    assert [line["status"] for line in hub.requests("/commit/|GET .*/tree/")] == [429, 404, 500, 200, 200]
    assert hub.files(REPO)[WEIGHTS] == (own_run.adapter / WEIGHTS).read_bytes()
    assert set(hub.uploads().values()) == {1}


def test_a_busy_hub_says_when_to_ask_again(hub: Hub, own_run: RunFolder) -> None:
    hub.order({"on": "GET .*/tree/", "status": 429, "headers": {"ratelimit": '"api";r=0;t=55'}, "times": 1})
    with pytest.raises(IntegrationError, match=r"limits the rate of requests \(HTTP 429\)") as caught:
        integration(own_run).deliver(ended=True)
    assert caught.value.retry_after == 55 and not caught.value.lasting


@pytest.mark.slow
def test_the_process_keeps_its_own_client(hub: Hub, own_run: RunFolder) -> None:
    """Other threads may be in the middle of a request with it; its proxies and certificates are the user's."""
    from huggingface_hub import get_session

    client = get_session()
    before = client.send, client.timeout
    integration(own_run).push()
    assert get_session() is client and (client.send, client.timeout) == before and not client.is_closed


@pytest.mark.slow
def test_a_dropped_upload_goes_on(hub: Hub, own_run: RunFolder) -> None:
    hub.order({"on": "PUT", "drop": True, "times": 1})
    assert integration(own_run).push().url
    assert hub.files(REPO)[WEIGHTS] == (own_run.adapter / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_hub_killed_in_a_push_gets_the_rest_once(hub: Hub, own_run: RunFolder) -> None:
    """The large file is stored, the commit not made; the run keeps what it has, and sync completes it."""
    settings = own_run.read_metadata("config.json")
    settings["tracking"]["hub"]["repo"], settings["tracking"]["tensorboard"] = REPO, False
    own_run.write_metadata("config.json", settings)
    remember_consent(own_run.root, read_run_config(own_run))
    before = {name: held for name, held in contents(own_run.root).items() if "tracking/" not in name}
    hub.order({"on": "POST .*/commit/", "until": "/nowhere", "times": 1})

    def kill_and_restart() -> None:
        while not hub.is_obeying():  # the commit waits in the hub
            time.sleep(0.02)
        hub.kill()
        hub.start()

    killer = threading.Thread(target=kill_and_restart, daemon=True)
    killer.start()
    states = send_run(own_run)
    killer.join()
    assert [(state.name, state.status) for state in states] == [("hub", "delivered")]
    assert hub.files(REPO)[WEIGHTS] == (own_run.adapter / WEIGHTS).read_bytes()
    assert set(hub.uploads().values()) == {1} and len(hub.repo(REPO)["commits"]) == 2
    assert {name: held for name, held in contents(own_run.root).items() if "tracking/" not in name} == before
    assert [state.status for state in read_delivery_states(own_run)] == ["delivered"]


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
def test_checkpoints_are_those_of_the_run(hub: Hub, own_run: RunFolder, tmp_path: Path) -> None:
    """A thinned one goes in the commit in which the newer comes; one read back is intact."""
    (old,) = list_checkpoints(own_run.checkpoints)
    integration(own_run, checkpoints=True).push()
    ignored = shutil.ignore_patterns("manifest.json")
    newer = write_checkpoint(
        own_run.checkpoints, 900, None, "x", lambda f: shutil.copytree(old, f, ignore=ignored, dirs_exist_ok=True)
    )
    shutil.rmtree(old)
    integration(own_run, checkpoints=True).push()
    assert len(hub.repo(REPO)["commits"]) == 3
    places = {path.split("/")[1] for path in hub.files(REPO) if path.startswith("training_lens_checkpoints/")}
    assert places == {newer.name}
    folder = downloaded(tmp_path / "there") / "training_lens_checkpoints" / newer.name
    assert verify_checkpoint(folder).step == 900
    assert (folder / "optimizer.safetensors").read_bytes() == (newer / "optimizer.safetensors").read_bytes()
    shutil.rmtree(newer)
    assert integration(own_run, checkpoints=True).push().plan.is_done  # none here says nothing of those there


def test_a_checkpoint_thinned_while_it_is_sent_is_no_trouble(hub: Hub, own_run: RunFolder, tmp_path: Path) -> None:
    (checkpoint,) = list_checkpoints(own_run.checkpoints)
    summary = own_run.read_metadata("summary.json")
    write_json(own_run.metadata / "summary.json", {**summary, "status": "running"})
    there = integration(own_run, checkpoints=True)
    deleted = tmp_path / "deleted"
    hub.order({"on": "GET .*/tree/", "until": str(deleted), "times": 1})

    def delete_meanwhile() -> None:
        while not hub.is_obeying():
            time.sleep(0.02)
        shutil.rmtree(checkpoint)
        deleted.touch()

    killer = threading.Thread(target=delete_meanwhile, daemon=True)
    killer.start()
    there.deliver(ended=False)
    killer.join()
    assert not hub.requests("/commit/")


@pytest.mark.slow
def test_the_courier_pushes_while_the_run_trains(hub: Hub, small_config: Callable[..., Any], tmp_path: Path) -> None:
    tracking = {"hub": {"repo": REPO, "checkpoints": True}, "wait_seconds": 60, "send_seconds": 0.2}
    config = small_config(tracking=tracking, training={"save_steps": 2})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    files = hub.files(REPO)
    assert files[WEIGHTS] == (run.adapter / WEIGHTS).read_bytes()
    sent = {path.split("/")[1] for path in files if path.startswith("training_lens_checkpoints/")}
    assert sent == {folder.name for folder in list_checkpoints(run.checkpoints)}
    assert [state.status for state in read_delivery_states(run)] == ["delivered"]
    assert not [name for name in run.root.rglob("*") if name.is_file() and TOKEN.encode() in name.read_bytes()]


def test_no_secret_and_no_place_of_this_machine_is_sent(
    hub: Hub, own_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training_lens import embedded

    monkeypatch.setenv("MY_API_KEY", "sesame-open-sesame")
    base = Path(shutil.copytree(embedded.PATHS["embedded"], tmp_path / "private" / "the-base"))
    settings, adapter = own_run.read_metadata("config.json"), read_json(own_run.adapter / "adapter_config.json")
    settings["model"]["id"] = adapter["base_model_name_or_path"] = str(base)
    settings["tracking"]["custom"] = {}
    own_run.write_metadata("config.json", settings)
    write_json(own_run.adapter / "adapter_config.json", adapter)
    record_hashes(own_run.root, [own_run.adapter / "adapter_config.json"])
    page = own_run.reports / "lens.html"
    page.write_text(f"<p>sesame-open-sesame {TOKEN} {own_run.root}/logs {base}</p>")
    integration(own_run, checkpoints=True).push()
    files, request_bodies = hub.files(REPO), "".join(line["body"] for line in hub.requests())
    for word in (TOKEN, "sesame", str(tmp_path), str(embedded.PATHS["embedded"].parent)):
        assert not [path for path, content in files.items() if word.encode() in content], word
    assert TOKEN not in request_bodies
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "the-base"
    card = files["README.md"].decode()
    assert "**the-base**" in card and "base_model" not in front_matter(card)


def test_a_base_in_the_folder_where_one_stands_has_its_name(
    own_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = own_run.read_metadata("config.json")
    settings["model"]["id"] = "."
    own_run.write_metadata("config.json", settings)
    (tmp_path / "the-base").mkdir()
    monkeypatch.chdir(tmp_path / "the-base")
    names = PathShortener(RunRecord(own_run))
    assert names.base == "the-base" and names.shorten_text("0.5 nats. All.") == "0.5 nats. All."


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        ("hf_" + "unknown" * 5, REPO, r"does not accept the token of HF_TOKEN \(HTTP 401\): make a new one"),
        mark_slow((READ_TOKEN, REPO, r"may not write to 'me/adapter' \(HTTP 403\): give it that permission")),
        (TOKEN, "others/adapter", r"may not write to 'others/adapter' \(HTTP 403\).*or name a repository of your own"),
    ],
)
def test_a_refusal_lasts_and_says_what_to_do(
    hub: Hub, own_run: RunFolder, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, told: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(IntegrationError, match=told) as caught:
        integration(own_run, repo=repo).push()
    assert caught.value.lasting and token not in str(caught.value)


def test_offline_sends_nothing(hub: Hub, own_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(IntegrationError, match="HF_HUB_OFFLINE is set, so nothing is sent; unset it to push"):
        integration(own_run).push()


@pytest.mark.slow
def test_a_branch_is_made_and_main_stays(hub: Hub, own_run: RunFolder) -> None:
    integration(own_run, revision="trial").push()
    assert WEIGHTS in hub.files(REPO, "trial") and set(hub.files(REPO)) == {".gitattributes"}
    assert 'revision="trial"' in hub.files(REPO, "trial")["README.md"].decode()


def test_an_unfinished_run_pushes_its_checkpoints_alone(hub: Hub, own_run: RunFolder) -> None:
    write_json(own_run.metadata / "summary.json", {**own_run.read_metadata("summary.json"), "status": "failed"})
    with pytest.raises(CheckpointError, match="is failed and has no adapter to push"):
        integration(own_run).push()
    integration(own_run, checkpoints=True).push()
    assert {path.split("/")[0] for path in hub.files(REPO)} == {".gitattributes", "training_lens_checkpoints"}
    assert checkpoint_folder(own_run.checkpoints, 1).name.startswith("step-")


def test_a_repository_without_its_owner_is_wrong_usage() -> None:
    from training_lens.config.compose import compose

    with pytest.raises(ConfigurationError, match="'adapter' is no repository of the hub; give owner/name"):
        compose(None, ["tracking.hub.repo=adapter"])
