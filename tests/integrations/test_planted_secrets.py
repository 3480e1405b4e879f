"""No secret gets into a file or a message: planted in the environment, in the config, and in errors."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from typer.testing import CliRunner, Result

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.cli import cli
from training_lens.integrations.send_run import read_delivery_states
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG/bPxRfiCY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEPlanted+/==",
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-1",
    "OPENAI_API_KEY": "sk-proj-PLANTEDplantedPLANTED",
    "MY_SERVICE_SECRET": "two\nlines that are planted",
}
SECRETS = [value for name, value in PLANTED.items() if name != "MLFLOW_TRACKING_USERNAME"]
OF_STORAGE, OF_REMOTE = "planted-password-2", "planted-password-3"

OWN = '''
import os
from training_lens.integrations import Tracker

class Leaking(Tracker):
    """A client whose errors hold its credentials."""

    name = "leaking"

    def require(self): pass

    def open(self): print("connecting with", os.environ["WANDB_API_KEY"], flush=True)

    def log(self, records):
        raise ConnectionError("x" * 370 + " refused: " + " ".join(map(repr, SECRETS)))

    def end(self): pass
'''


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, of a repository whose remote has a password, with secrets in the environment."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "leaking.py").write_text(
        f"{OWN}\n".replace("SECRETS", "[v for k, v in os.environ.items() if k in KEYS]")
    )
    with (tmp_path / "leaking.py").open("a") as file:
        file.write(f"KEYS = {sorted(PLANTED)}\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    remote = f"https://me:{OF_REMOTE}@example.com/it.git"
    subprocess.run(["git", "remote", "add", "origin", remote], check=True)
    yield tmp_path
    sys.modules.pop("leaking", None)


def contents(file: Path) -> Iterator[bytes]:
    """What a file holds: its bytes, and where these are packed, what is in them."""
    data = file.read_bytes()
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if data.startswith(b"SQLite format 3\0"):  # long values are cut to pages
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            yield "\n".join(database.iterdump()).encode()


def leaks(folder: Path, secrets: Sequence[str] = (*SECRETS, OF_STORAGE, OF_REMOTE)) -> list[str]:
    """The files under a folder that hold something planted, each with what it holds."""
    wanted = [spelling for secret in secrets for spelling in (secret, quote_plus(secret))]
    spelled = {secret: (secret.encode(), json.dumps(secret)[1:-1].encode()) for secret in wanted}
    return [
        f"{file.relative_to(folder)}: {secret}"
        for file in folder.rglob("*")
        if file.is_file()
        for data in contents(file)
        for secret, spellings in spelled.items()
        if any(spelling in data for spelling in spellings)
    ]


def test_the_search_finds_what_is_packed(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"\0" + SECRETS[0].encode())
    (tmp_path / "packed.gz").write_bytes(gzip.compress(SECRETS[1].encode()))
    with closing(sqlite3.connect(tmp_path / "some.db")) as database:
        database.execute("create table t (x)")
        database.execute("insert into t values (?)", ["x" * 4090 + SECRETS[2]])
        database.commit()
    assert {leak.split(":")[0] for leak in leaks(tmp_path)} == {"plain", "packed.gz", "some.db"}


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("tracking.custom={leaking.Leaking: {token: planted-password-1}}", "tracking.custom.leaking.Leaking.token"),
        ("tracking.custom={leaking.Leaking: {token: 123456789}}", "tracking.custom.leaking.Leaking.token"),
        ("output.mirror='s3://AKIAPLANTEDPLANTED00:planted-password-1@bucket/path'", "output.mirror"),
        ("tracking.mlflow.uri='postgresql://me:planted-password-1@host/db'", "tracking.mlflow.uri"),
        ("model.id='https://me:planted-password-1@host/model'", "model.id"),
        ("data.train=['https://me:planted-password-1@host/rows.jsonl']", "data.train[0]"),
        ("tracking.wandb.name=planted-password-1", "tracking.wandb.name"),
        ("tracking.wandb.tags=[fine,planted-password-1]", "tracking.wandb.tags[1]"),
        ("output.base_output_dir=out/planted-password-1", "output.base_output_dir"),
        ("output.mirror=s3://me:planted-password-1@bucket", "output.mirror"),
        ("tracking.samples=planted-password-1", "tracking.samples"),
        ("--config=planted-password-1.yaml", "--config"),
    ],
)
def test_a_secret_in_the_config_is_refused_by_its_key_alone(planted: Path, setting: str, key: str) -> None:
    before = {file for file in planted.rglob("*") if ".git" not in file.parts}
    result = CliRunner().invoke(cli, ["train", setting])
    assert (result.exit_code, key in result.stderr) == (2, True), result.stderr
    assert "planted-password-1" not in result.output and "123456789" not in result.output
    assert {file for file in planted.rglob("*") if ".git" not in file.parts} == before


def test_an_error_in_python_does_not_show_the_config(planted: Path) -> None:
    with pytest.raises(ValueError, match=r"output\.mirror: this looks like a secret") as caught:
        TrainingConfig.model_validate({"output": {"mirror": "s3://me:planted-password-1@bucket"}})
    assert "password-1" not in str(caught.value)


@pytest.mark.slow
def test_no_file_of_a_run_that_goes_everywhere_holds_a_secret(small_config: Callable[..., Any], planted: Path) -> None:
    config = small_config(
        tracking={
            "tensorboard": True,
            "wandb": {"mode": "offline"},
            "mlflow": {"enabled": True},
            "trackio": {"enabled": True},
            "custom": {"leaking.Leaking": {}},
            "samples": 1,
            "histograms_every": 1,
            "wait_seconds": 250,
        },
        training={"max_steps": 3},
        lens={"report": True},
        sweep={"storage": f"postgresql://me:{OF_STORAGE}@host/db"},
        output={"mirror": str(planted / "mirror")},
    )
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    ends = {state.name: state.status for state in read_delivery_states(run)}
    everywhere = ("tensorboard", "wandb", "mlflow", "trackio", "mirror")
    assert ends == {**dict.fromkeys(everywhere, "delivered"), "leaking": "waiting"}
    log = (run.logs / "run.log").read_text()
    assert "leaking: " in log and "connecting with ***" in log
    assert leaks(planted / "outputs") == leaks(planted / "mirror") == []


IN_ROWS = [
    "gsk_" + "pL4nted" * 7,
    "AIzaSyPL4nted-PL4nted-PL4nted-PL4nted_1",
    "eyJhbGciOiJIUzI1NiJ9.eyJwbGFudGVkIjoxfQ.pL4ntedpL4ntedpL4nted",
    "https://hooks.slack.com/services/T00PLANTED/B00PLANTED/pL4ntedpL4nted",
    "-----BEGIN PRIVATE KEY-----\nMIIEpL4ntedKEY\npL4nted/+/\n-----END PRIVATE KEY-----",
]


@pytest.mark.slow
def test_secrets_in_rows_are_learned_but_stand_in_no_file_that_quotes_rows(
    tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def rows_of(split: str) -> str:
        rows = [
            {"question": f"Row {i} of {split}: is this it?\n{secret}", "answer": f"Yes, {i}: {secret}!"}
            for i in range(2)
            for secret in IN_ROWS
        ]
        return f"data.{split}={write_rows(rows, f'{split}.jsonl')}"

    data = [rows_of("train"), rows_of("validation")]
    few = ["training.max_steps=2", "training.warmup_ratio=0", "tracking.samples=5", "tracking.tensorboard=true"]
    result = CliRunner().invoke(cli, ["train", *data, *few, "output.mirror=mirror", "lens.report=true"])
    assert result.exit_code == 0, result.output
    assert result.output.count("looks like a secret") == 1
    for command in (["compare", "--run", "latest"], ["report", "latest"]):
        assert CliRunner().invoke(cli, command).exit_code == 0, command
    (run,) = Path("outputs").glob("experiments/*/runs/*")
    assert "***" in (run / "logs" / "samples.jsonl").read_text()
    tells = [secret.splitlines()[-2] if "KEY" in secret else secret.split("services/")[-1] for secret in IN_ROWS]
    assert leaks(tmp_path / "outputs", tells) == leaks(tmp_path / "mirror", tells) == []


@pytest.mark.slow
def test_no_file_of_a_run_that_fails_holds_the_secret_in_its_error(
    small_config: Callable[..., Any], planted: Path
) -> None:
    class Fails(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            raise RuntimeError(f"no answer from https://host/?token={quote_plus(SECRETS[2])} {SECRETS}")

    with pytest.raises(RuntimeError, match="no answer"):
        TrainingWrapper(small_config(tracking={"tensorboard": True}), callbacks=(Fails(),)).train()
    (log,) = planted.rglob("run.log")
    assert "RuntimeError: no answer from https://host/?token=*** ['***', " in log.read_text()
    assert leaks(planted / "outputs") == []


@pytest.mark.slow
def test_sync_strikes_out_what_an_error_holds(
    small_config: Callable[..., Any], planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training_lens.integrations.delivery.TRIES_AT_THE_END", 1)
    run = TrainingWrapper(small_config(training={"max_steps": 1, "warmup_ratio": 0})).train().run_dir
    result: Result = CliRunner().invoke(cli, ["sync", run, "tracking.custom={leaking.Leaking: {}}", "--json"])
    assert result.exit_code == 1 and "***" in json.loads(result.stdout)["integrations"][0]["error"]
    lines = result.stderr.splitlines()
    ours = "".join(
        line for line in lines if not line.startswith("connecting with")
    )  # but what the client itself prints
    assert not any(secret in result.stdout + ours for secret in SECRETS)
    assert leaks(planted / "outputs") == []
