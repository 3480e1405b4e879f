"""Splits are tokenized once, kept whole or not at all, and made anew when anything that decides them changes."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.data.templates import build_renderer
from training_lens.data.token_cache import Split, prepare_split
from training_lens.data.token_pipeline import Preparation, tokenizer_hash
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.utils.logging import ROOT

ROWS = [{"question": f"Where is {i}?", "answer": f"In box {i}.", "domain": "ab"[i % 2]} for i in range(30)]


def preparation(tokenizer: Any, seq_len: int = 64, **data: Any) -> Preparation:
    section = DataSection.model_validate(data)
    renderer = build_renderer(section, tokenizer)
    return Preparation(section, renderer, TextEncoder(tokenizer), seq_len, tokenizer_hash(tokenizer))


def prepare(tokenizer: Any, path: Path, cache: Path, seq_len: int = 64, **data: Any) -> Split:
    return prepare_split([str(path)], "data.train", preparation(tokenizer, seq_len, **data), cache, Progress())


def test_the_second_time_comes_from_the_cache(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path, cache = write_rows(ROWS), tmp_path / "cache"
    first = prepare(embedded_tokenizer, path, cache)
    made = next(cache.iterdir()).stat().st_mtime_ns
    again = prepare(embedded_tokenizer, path, cache)
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [made]
    assert again.fingerprint == first.fingerprint and again.report == first.report
    for a, b in zip(first.dataset, again.dataset, strict=True):
        assert a.id == b.id and a.input_ids.tolist() == b.input_ids.tolist()


def test_rows_that_differ_in_white_space_alone_are_duplicates(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    spaced = {"question": "Where  is\n0? ", "answer": "In box 0."}
    digests = prepare(
        embedded_tokenizer, write_rows([ROWS[0], spaced, ROWS[1]]), tmp_path / "cache", domain={"field": None}
    ).dataset.digests
    assert digests[0] == digests[1] != digests[2]


def test_what_decides_the_tokens_decides_the_fingerprint(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    prints = {
        prepare(embedded_tokenizer, write_rows(ROWS), cache).fingerprint,
        prepare(embedded_tokenizer, write_rows(ROWS), cache, seq_len=63).fingerprint,
        prepare(embedded_tokenizer, write_rows(ROWS), cache, mask_prompt=False).fingerprint,
        prepare(embedded_tokenizer, write_rows(ROWS), cache, domain={"style": "hash"}).fingerprint,
        prepare(embedded_tokenizer, write_rows(ROWS[1:]), cache).fingerprint,
    }
    assert len(prints) == 5


def test_the_report_counts_what_came_and_what_was_lost(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [*ROWS, {"question": "long " * 80, "answer": "never seen", "domain": "a"}]
    rows += [{"question": "Say it.", "answer": "word " * 80, "domain": "b"}]
    split = prepare(embedded_tokenizer, write_rows(rows), tmp_path / "cache", truncation="keep_start")
    report = split.report
    assert (report.rows, report.examples) == (32, 31)
    assert (report.dropped_without_answer, report.truncated) == (1, 1)
    assert report.supervised_tokens_lost > 10
    assert report.domains == {"a": 15, "b": 16}
    assert report.tokens == split.dataset.lengths.sum()
    assert report.supervised_tokens == split.dataset.supervised_counts.sum()
    assert list(report.mappings.values()) == ["question -> answer, domain from domain"]


def test_learning_prompts_supervises_every_token(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = prepare(embedded_tokenizer, write_rows(ROWS), tmp_path / "cache", mask_prompt=False).dataset
    assert (dataset.supervised_counts == dataset.lengths - 1).all()


def test_a_bad_row_leaves_no_cache(embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows([*ROWS, {"question": "no answer", "domain": "a"}])
    with pytest.raises(DatasetError, match=r"row 31: has no field 'answer'"):
        prepare(embedded_tokenizer, path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"), [([], "holds no rows"), ([{"question": "x " * 99, "answer": "y"}], "nothing to learn")]
)
def test_files_with_nothing_to_learn_are_refused(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        prepare(embedded_tokenizer, write_rows(rows), tmp_path / "cache", truncation="keep_start")


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_cache_and_the_next_time_works(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows(ROWS * 500)
    outputs = tmp_path / "outputs"
    command = [
        sys.executable,
        "-m",
        "training_lens",
        "validate",
        f"data.train={path}",
        f"output.base_output_dir={outputs}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    building: list[Path] = []
    while not building and process.poll() is None:
        time.sleep(0.005)
        building = list(outputs.glob("cache/.tmp-*/examples.arrow"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert building and not [p for p in (outputs / "cache").iterdir() if not p.name.startswith(".tmp-")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_domains_share_one_prefix_in_training_and_inference(embedded_tokenizer: Any) -> None:
    ready = preparation(embedded_tokenizer, domain={"style": "hash"})
    from training_lens.data.examples import Example, Message

    example = Example((Message("user", "Hi"), Message("assistant", "Yes")), "law", "f", 1)
    trained = ready.renderer.render_example(example)[0]
    asked = ready.renderer.render_prompt([Message("user", "Hi")], "law")[0]
    assert trained == asked and trained.text != ready.renderer.render_prompt([Message("user", "Hi")], "tax")[0].text


def test_a_long_prompt_is_asked_as_it_was_trained(embedded_tokenizer: Any) -> None:
    from training_lens.data.examples import Example, Message, TextSegment
    from training_lens.data.token_pipeline import encode_training_prompt, tokenize

    long = Example((Message("user", "word " * 99), Message("assistant", "Yes it is.")), None, "f", 1)
    for truncation in ("keep_end", "keep_start"):
        whole = preparation(embedded_tokenizer).encoder.encode_prompt([TextSegment("word " * 99, False)])
        seq_len = 64 if truncation == "keep_end" else len(whole) + 8
        ready = preparation(embedded_tokenizer, seq_len, truncation=truncation)
        (tokenized,) = tokenize([long], ready)
        assert tokenized is not None
        first = tokenized.loss_mask.argmax()
        assert encode_training_prompt(long, ready) == tokenized.input_ids[:first].tolist()


def test_entries_follow_the_setting_and_not_the_cache(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = write_rows(ROWS[:10], "a.jsonl"), write_rows(ROWS[10:], "b.jsonl")
    ready, cache = preparation(embedded_tokenizer), tmp_path / "cache"
    for order in ([a, b], [b, a]):
        split = prepare_split([str(p) for p in order], "data.train", ready, cache, Progress())
        assert split.entries == {str(order[0]): 0, str(order[1]): 1}
        assert split.dataset.files[0] == str(order[0])


def test_rows_without_a_learned_answer_are_counted_apart(
    embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    muted = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss_weight": 0}]}
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report = prepare(embedded_tokenizer, write_rows([muted, said]), tmp_path / "cache").report
    assert (report.examples, report.dropped_by_weight, report.dropped_without_answer) == (1, 1, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_made_anew_and_said(
    embedded_tokenizer: Any,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger(ROOT), "propagate", True)
    path, cache = write_rows(ROWS), tmp_path / "cache"
    first = prepare(embedded_tokenizer, path, cache)
    tokens = [e.input_ids.tolist() for e in first.dataset]
    (folder,) = cache.iterdir()
    for file in sorted(folder.iterdir()):
        whole, middle = file.read_bytes(), file.stat().st_size // 2
        file.write_bytes(
            whole[:middle] + (bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if damage == "flip" else b"")
        )
        if damage == "delete":
            file.unlink()
        caplog.clear()
        again = prepare(embedded_tokenizer, path, cache)
        assert again.report == first.report
        assert [e.input_ids.tolist() for e in again.dataset] == tokens
        assert len({r.message for r in caplog.records if "tokenized again" in r.message}) == 1, file
        assert file.read_bytes() == whole and [p.name for p in cache.iterdir()] == [folder.name]
