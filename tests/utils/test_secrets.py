"""Secrets are struck out of text, and found in settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote_plus

import pytest
from forked import fork_command  # type: ignore[import-not-found]

from training_lens.utils.secrets import find_secret_keys, redact_text


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("hf_" + "aB3" * 10, "aB3aB3"),
        ("AKIA" + "ABCD" * 4, "ABCDABCD"),
        ("sk-proj-" + "aB3_" * 8, "aB3_"),
        ("github_pat_" + "aB3" * 10, "aB3aB3"),
        ("Authorization: Bearer abcdefghijkl", "abcdefghijkl"),
        ("Authorization: Basic dXNlcjpodW50ZXIyMg==", "dXNlcjpo"),
        ("https://user:hunter22@host/path", "hunter22"),
        ("redis://:hunter22@host:6379/0", "hunter22"),
        ("s3://key:with/slash+22@bucket/path", "slash"),
        ("https://0123456789abcdef0123@github.com/me/it.git", "0123456789"),
        ("https://bucket/key?X-Amz-Signature=0a1b2c3d4e&x=1", "0a1b"),
        ("https://me.blob.core.windows.net/a?sv=2&sig=0a1b2c3d4e", "0a1b"),
        ("https://host/v1?api_key=0a1b2c3d4e", "0a1b"),
        ('<a href="https://host/v1?x=1&amp;sig=0a1b2c3d4e">it</a>', "0a1b"),
        ("gsk_" + "aB3" * 17, "aB3aB3"),
        ("AIza" + "SyB-c_1" * 5, "SyB-c_1"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r", "dBjft"),
        (json.dumps("first\neyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP"), "dBjft"),
        (json.dumps("first\nAKIA" + "ABCD" * 4), "ABCDABCD"),
        ("https://hooks.slack.com/services/T0A/B0B/aB3aB3aB3aB3", "aB3aB3"),
        ("https://discord.com/api/webhooks/123456/aB3-aB3_aB3", "aB3-"),
        ("xoxb-1234567890-aB3aB3aB3aB3", "aB3aB3"),
        ("glpat-aB3aB3aB3aB3aB3aB3aB3", "aB3aB3"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/\nIBAAK==\n-----END RSA PRIVATE KEY-----", "IBAAK"),
        (json.dumps("-----BEGIN PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END PRIVATE KEY-----\n"), "IBAAK"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\ncut sho", "b3Blb"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalr"),
        ("DefaultEndpointsProtocol=https;AccountKey=" + "aB3+" * 20 + "==;x", "aB3+"),
    ],
)
def test_what_has_the_form_of_a_secret_is_struck_out(text: str, secret: str) -> None:
    out = redact_text(text)
    assert secret in text and "***" in out and secret not in out


@pytest.mark.parametrize(
    "variable",
    "WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN MLFLOW_TRACKING_PASSWORD OPENAI_API_KEY PGPASSWORD "
    "GITHUB_PAT SMTP_PASS AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_KEY my_secret".split(),
)
def test_secrets_of_the_environment_are_struck_out(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "correct-horse-battery")
    assert redact_text("key correct-horse-battery.") == "key ***."


@pytest.mark.parametrize("written", [str, quote_plus, json.dumps, repr, lambda value: value.split("\n")[0]])
def test_a_secret_is_known_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, written: Callable[[str], str]
) -> None:
    value = """wJalr/X+t 'n"FEMI\nand a second line"""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{value}\n")
    assert redact_text(f"<{written(value)}>").strip("<>\"'") == "***"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-positive"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/google.json"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/home/me/token"),
        ("HF_TOKEN_PATH", "/home/me/token"),
        ("DB_PASSWORD", "training"),
        ("API_TOKEN", "none"),
    ],
)
def test_a_place_or_a_common_word_is_no_secret(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert redact_text(f"the value {value} stays") == f"the value {value} stays"


@pytest.mark.parametrize(
    "start", ["://a:b", "eyJaaaaaaaaaa", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "://:", "-"]
)
def test_searching_a_text_of_beginnings_takes_no_squared_time(start: str) -> None:
    text = start * (300_000 // len(start))
    began = time.process_time()
    redact_text(text)
    assert time.process_time() - began < 5


def test_ordinary_text_stays() -> None:
    text = """step 3: loss 1.5 at https://host:8080/path, hf_short, s3://bucket/a@b, http://host:5000/run@main,
    ssh://me@host/path, pad_token=<|endoftext|>, a Bearer bond, Basic training, task-based-learning-of-adapters,
    -----BEGIN CERTIFICATE-----, eyJ.a.b, a risk-adjusted-return-on-capital, AIzawa"""
    assert redact_text(text) == text


def test_settings_that_hold_a_secret_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    settings = {
        "output": {"mirror": "ssh://me:password1@host/x", "name": "fine"},
        "tracking": {"tags": ["a", "0123456789abcdef"], "custom": {"m.T": {"token": "x", "channel": "y"}}},
        "lens": {"probe_tokens": 512},
    }
    assert list(find_secret_keys(settings)) == ["output.mirror", "tracking.tags[1]", "tracking.custom.m.T.token"]


def test_a_key_of_a_secret_is_one_in_lists_and_as_a_number_but_not_in_rows() -> None:
    settings = {
        "tracking": {"custom": {"m.T": {"channels": [{"password": 12345678}], "token_file": "a", "secret": ["b"]}}},
        "data": {"train": [{"token": "the"}], "validation": ["https://me:password1@host/rows.jsonl"]},
    }
    assert list(find_secret_keys(settings)) == [
        "tracking.custom.m.T.channels[0].password",
        "tracking.custom.m.T.secret[0]",
        "data.validation[0]",
    ]


def test_a_traceback_shows_no_secret(tmp_path: Path) -> None:
    token = "hf_" + "AbCd1234" * 4 + "xy"
    process = fork_command(tmp_path, "report", "--debug", token)
    process.join()
    out, errors = ((tmp_path / f"{name}.txt").read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 1 and "Traceback" in errors and "CheckpointError" in errors
    assert token not in errors + out and "***" in errors
