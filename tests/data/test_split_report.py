"""What training does not see as the files have it is said, a line a thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_lens.config.data_sections import DataSection
from training_lens.data.split_report import describe_losses
from training_lens.data.templates import build_renderer
from training_lens.data.token_cache import prepare_split
from training_lens.data.token_pipeline import Preparation
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress


def notes_of(tokenizer: Any, paths: list[Path], cache: Path, **data: Any) -> str:
    section = DataSection.model_validate(data)
    ready = Preparation(section, build_renderer(section, tokenizer), TextEncoder(tokenizer), 64, "")
    split = prepare_split([str(path) for path in paths], "data.train", ready, cache, Progress())
    return "\n".join(describe_losses(split.report, 64))


def test_clean_rows_need_no_words(embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows([{"question": "Who?", "answer": "Tom."}])
    assert notes_of(embedded_tokenizer, [rows], tmp_path / "cache") == ""


def test_each_loss_has_its_line(embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    good = {"question": "Who?", "answer": "Tom <|bos|>."}
    long = {"question": "word " * 90, "answer": "never seen"}
    ended = {"question": "Who?", "answer": "Tom</s>"}
    some, none = write_rows([good, long, ended], "some.jsonl"), write_rows([long], "none.jsonl")
    said = notes_of(embedded_tokenizer, [some, none], tmp_path / "cache", truncation="keep_start")
    assert "2 of 4 rows dropped: nothing of their answer fits model.seq_len=64" in said
    assert f"nothing is left of {none}" in said
    assert "names of special tokens in the rows are read as plain text: '<|bos|>' (1)" in said
    assert "data.special_tokens=allow" in said
    assert "taken off the ends of answers: '</s>' (1)" in said
    dropped = notes_of(embedded_tokenizer, [some], tmp_path / "cache", truncation="drop")
    assert "1 of 3 rows dropped: longer than model.seq_len=64" in dropped
    cut = notes_of(embedded_tokenizer, [some], tmp_path / "cache")
    assert "1 of 3 examples cut to model.seq_len=64, 0 answer tokens lost" in cut
