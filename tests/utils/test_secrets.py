"""Secrets are struck out of text, and found in settings."""

from __future__ import annotations

import pytest

from training_lens.utils.secrets import redacted, secrets_in


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 10,
        "AKIA" + "ABCD" * 4,
        "Authorization: Bearer abcdefghijkl",
        "https://user:hunter22@host/path",
        "https://bucket/key?X-Amz-Signature=0a1b2c3d4e&x=1",
    ],
)
def test_what_has_the_form_of_a_secret_is_struck_out(text: str) -> None:
    out = redacted(text)
    assert "***" in out and not any(part in out for part in ("aB3aB3", "ABCDABCD", "abcdefghijkl", "hunter22", "0a1b"))


def test_secrets_of_the_environment_are_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-positive")
    assert redacted("key correct-horse-battery of false-positive") == "key *** of false-positive"


def test_ordinary_text_stays() -> None:
    text = "step 3: loss 1.5 at https://host:8080/path, hf_short, s3://bucket/a@b"
    assert redacted(text) == text


def test_settings_that_hold_a_secret_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    settings = {
        "output": {"mirror": "ssh://me:password1@host/x", "name": "fine"},
        "tracking": {"tags": ["a", "0123456789abcdef"], "custom": {"m.T": {"token": "x", "channel": "y"}}},
        "lens": {"probe_tokens": 512},
    }
    assert list(secrets_in(settings)) == ["output.mirror", "tracking.tags", "tracking.custom.m.T.token"]
