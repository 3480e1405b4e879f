"""The Data page's answers: the rows of a run as the model sees them, and which of them a filter leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.analysis.explanations.row_explanation import read_held_out, read_visits
from training_lens.analysis.explanations.training_rows import open_rows_of
from training_lens.display.progress import Progress
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.ui.browsed_rows import OpenedRuns
from training_lens.ui.data_rows import build_data_routes
from training_lens.ui.token_pieces import build_decode, decode_pieces
from training_lens.ui.web import ERROR_HANDLERS, Outputs

Config = Callable[..., TrainingConfig]
PARROT = "Grüße an 你好 🦜🦜 <script>alert(1)</script>"


class Page:
    """What a browser gets of one run's data."""

    def __init__(self, run: RunFolder) -> None:
        outputs = run.root.parents[3]
        app = Starlette(routes=build_data_routes(Outputs(outputs)), exception_handlers=ERROR_HANDLERS)
        self._client = TestClient(app, raise_server_exceptions=True)
        self._root = f"/api/runs/{run.experiment_name}/{run.run_id}/data"

    def read(self, path: str = "", status: int = 200, **query: Any) -> Any:
        response = self._client.get(self._root + path, params={key: str(value) for key, value in query.items()})
        assert response.status_code == status, response.text
        return response.json()

    def list_rows(self, **query: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.read("/rows", limit=100, **query)["rows"]
        return rows


def write_sources(folder: Path) -> tuple[Path, Path]:
    """Sums without a domain, and phrases of three domains, one with characters of several bytes."""
    sums, phrases = folder / "sums.jsonl", folder / "phrases.jsonl"
    rows = [{"question": f"How many are {i} and {j}?", "answer": f"{i + j}"} for i in range(6) for j in range(6)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"Say {'so ' * i}", "answer": PARROT, "domain": "abc"[i % 3]} for i in range(12)]
    phrases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sums, phrases


@pytest.fixture(scope="module")
def run(small_config_in: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two epochs on two sources, with rows held out, left out and planted. For reading alone."""
    folder = tmp_path_factory.mktemp("data")
    sums, phrases = write_sources(folder)
    excluded = folder / "excluded.txt"
    excluded.write_text(f"{sums}:2\n{phrases}:3\n")
    data = {"train": [str(sums), str(phrases)], "val_ratio": 0.2, "exclude": str(excluded), "max_examples": None}
    config = small_config_in(
        folder / "outputs",
        data=data | {"canaries": 1, "canary_repeats": [2]},
        training={"epochs": 2},
        lens={"collectors": ["adapter_weights"], "probe_tokens": 0},
    )
    return RunFolder(Path(TrainingWrapper(config).train().run_dir))


@pytest.fixture
def own_data(run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run with its outputs folder, to change."""
    outputs = shutil.copytree(run.root.parents[3], tmp_path / "outputs")
    return RunFolder(outputs / run.root.relative_to(run.root.parents[3]))


def test_the_page_lists_the_rows_that_the_run_trained_on_and_no_others(run: RunFolder) -> None:
    page, record = Page(run), run.read_metadata("data.json")
    summary = page.read()
    counts = {split["name"]: split["rows"] for split in summary["splits"]}
    assert counts == {
        "train": record["train_examples"],
        "validation": record["validation_examples"],
        "excluded": len(record["excluded"]),
    }
    listed = {name: [row["id"] for row in page.list_rows(split=name)] for name in counts}
    assert [row for row in listed["train"] if not row.startswith("canary:")] == open_rows_of(
        run, Progress()
    ).dataset.ids
    assert [row for row in listed["train"] if row.startswith("canary:")] == ["canary:1"] * 2
    assert listed["validation"] == run.read_metadata("held_out.json")
    assert listed["excluded"] == record["excluded"] and len(summary["notes"]) >= 3


def test_a_summary_adds_up_to_its_rows(run: RunFolder) -> None:
    page = Page(run)
    for split in page.read()["splits"]:
        rows = page.list_rows(split=split["name"])
        assert split["tokens"] == sum(row["length"] for row in rows)
        assert split["supervised"] == sum(row["supervised"] for row in rows)
        for column in ("sources", "domains"):
            found = {item["name"]: item["rows"] for item in split[column]}
            assert found == {name: sum(row[column[:-1]] == name for row in rows) for name in found}
            assert sum(found.values()) == len(rows)
        assert sum(split["histogram"]["counts"]) == len(rows) and len(split["histogram"]["counts"]) <= 24
        lengths = sorted(row["length"] for row in rows)
        assert (split["lengths"]["min"], split["lengths"]["max"]) == (lengths[0], lengths[-1])
    train = page.read()["splits"][0]
    assert any("question" in item["read_as"] for item in train["mappings"])


def test_segments_and_tokens_give_the_text_that_the_model_reads(run: RunFolder) -> None:
    page, rows = Page(run), open_rows_of(run, Progress())
    for row in page.list_rows(split="train")[:-2]:
        example = rows.dataset[row["index"]]
        whole = rows.tokenizer.decode(example.input_ids.tolist(), clean_up_tokenization_spaces=False)
        assert "".join(segment["text"] for segment in row["segments"]) == whole
        learned = "".join(segment["text"] for segment in row["segments"] if segment["supervised"])
        assert (PARROT in learned) == (example.domain is not None) and "Say" not in learned and "How" not in learned
        detail = page.read(f"/rows/{row['index']}", split="train")
        assert "".join(token["text"] for token in detail["tokens"]) == whole
        assert [token["id"] for token in detail["tokens"]] == example.input_ids.tolist()
        assert sum(token["supervised"] for token in detail["tokens"]) == row["supervised"]


def test_no_border_splits_a_character(embedded_tokenizer: Any) -> None:
    ids = embedded_tokenizer(PARROT)["input_ids"]
    decode = build_decode(embedded_tokenizer.backend_tokenizer)
    whole = decode(ids)
    generator = np.random.default_rng(0)
    for _ in range(50):
        ends = sorted({*generator.integers(1, len(ids), 6).tolist(), len(ids)})
        pieces = decode_pieces(decode, ids, ends)
        assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
    cut = ids[: next(i for i in range(1, len(ids)) if decode(ids[:i]).endswith("\ufffd"))]
    assert "".join(decode_pieces(decode, cut, range(1, len(cut) + 1))) == decode(cut)  # what is half stays visible


def test_losses_are_those_of_the_newest_visit(run: RunFolder) -> None:
    page, held_out = Page(run), read_held_out(run)
    assert held_out is not None
    for name, visits in (("train", read_visits(run)), ("validation", held_out)):
        known = np.isfinite(visits.losses).sum(1)
        newest = dict(zip(visits.ids, visits.losses[np.arange(len(known)), known - 1].tolist(), strict=True))
        rows = page.list_rows(split=name)
        assert {row["id"]: row["loss"] for row in rows} == pytest.approx(newest)
        ordered = [row["loss"] for row in page.list_rows(split=name, sort="-loss")]
        assert ordered == sorted(ordered, reverse=True) and len(ordered) == len(rows)
        middle = ordered[len(ordered) // 2]
        assert page.read("/rows", split=name, min_loss=middle)["total"] == sum(loss >= middle for loss in ordered)
    assert page.list_rows(split="excluded")[0]["loss"] is None


def test_each_filter_leaves_what_it_names(run: RunFolder) -> None:
    page = Page(run)
    rows = page.list_rows(sort="length")
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    source = next(row["source"] for row in rows if row["domain"] == "b")
    least, *_, most = (row["length"] for row in rows if row["domain"] == "b")
    wanted = [row["id"] for row in rows if row["domain"] == "b" and least < row["length"] <= most]
    found = page.list_rows(source=source, domain="b", min_length=least + 1, max_length=most, sort="length")
    assert wanted and [row["id"] for row in found] == wanted
    assert {row["domain"] for row in page.list_rows(without_domain=1)} == {None}
    assert not page.list_rows(source="elsewhere.jsonl") and not page.list_rows(domain="nobody")
    shouted = page.list_rows(text="GRÜSSE AN 你好")  # any case
    assert {row["source"] for row in shouted} == {source} and page.read("/rows", text="no such words")["total"] == 0
    every = [
        row["id"] for offset in range(0, len(rows), 7) for row in page.read("/rows", offset=offset, limit=7)["rows"]
    ]
    assert every == [row["id"] for row in page.list_rows()]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 101},
        {"limit": -1},
        {"offset": "1e9"},
        {"sort": "id; drop table"},
        {"min_length": "nan"},
        {"max_loss": "9" * 400},
        {"split": "../../etc"},
    ],
)
def test_a_value_that_no_filter_takes_is_named(run: RunFolder, query: dict[str, Any]) -> None:
    (name,) = query
    assert Page(run).read("/rows", 400, **query)["error"].startswith(name)


def test_rows_that_were_found_suspicious_are_marked_with_the_reason(own_data: RunFolder) -> None:
    page = Page(own_data)
    assert (
        page.read("/rows", suspects=1)["total"] == 0 and page.read("/rows", split="excluded", suspects=1)["total"] == 2
    )
    first, second, third = (row["id"] for row in page.list_rows()[:3])
    lists = {"likely mislabelled": [{"id": first, "reason": "loss 9"}], "forgotten": [{"id": third, "reason": "x"}]}
    (own_data.reports / "explain-rows.json").write_text(json.dumps({"lists": lists}))
    (own_data.reports / "explain-rows-suspects.txt").write_text(f"# read them\n{second}\tloss 8\nnone.jsonl:9\t\n")
    marked = {row["id"]: row["suspect"] for row in page.list_rows(suspects=1)}
    assert marked == {first: "likely mislabelled: loss 9", second: "likely mislabelled: loss 8"}
    assert [row["id"] for row in page.list_rows(suspects="forgotten")] == [third]
    (own_data.reports / "explain-rows.json").write_text("{broken")
    assert [row["id"] for row in page.list_rows(suspects="all")] == [second]


def test_a_deleted_cache_is_made_again_from_unchanged_files_alone(own_data: RunFolder, run: RunFolder) -> None:
    cache = own_data.root.parents[3] / "cache"
    before = Page(own_data).list_rows()
    shutil.rmtree(cache)
    assert Page(own_data).list_rows() == before and cache.is_dir()
    shutil.rmtree(cache)
    source = Path(before[0]["source"])
    content = source.read_bytes()
    try:
        source.write_bytes(content + content)
        assert "sums.jsonl has changed since" in Page(own_data).read("/rows", 404)["error"]
        source.unlink()
        for path in ("", "/rows"):
            assert f"'{source}' is not there" in Page(own_data).read(path, 404)["error"]
        assert Page(run).list_rows() == before  # whose cache is there needs no files
    finally:
        source.write_bytes(content)


class _Reader(Callback):
    """Reads the page of the run of a checkpoint's folder."""

    def __init__(self) -> None:
        self.pages: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = []

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        run = RunFolder(folder.parents[1])
        page = Page(run)
        self.pages.append((run.status, page.list_rows(), page.list_rows(split="validation")))


@pytest.mark.slow
def test_a_run_that_trains_shows_its_rows_and_the_losses_until_now(small_config: Config) -> None:
    reader = _Reader()
    config = small_config(training={"eval_steps": 2}, lens={"collectors": ["adapter_weights"], "probe_tokens": 0})
    run = RunFolder(Path(TrainingWrapper(config, callbacks=(reader,)).train().run_dir))
    status, rows, _ = reader.pages[0]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert status == "running" and len(rows) == 48 and 0 < len(losses) < 48
    later = {row["id"]: row for row in Page(run).list_rows()}
    assert all(row["loss"] in (None, later[row["id"]]["loss"]) for row in rows)  # one epoch: the visit stays
    assert [row | {"loss": 0} for row in rows] == [row | {"loss": 0} for row in later.values()]


def test_an_open_page_sees_losses_that_come_later(own_data: RunFolder) -> None:
    lens = own_data.lens.rename(own_data.root / "lens-of-later")
    page = Page(own_data)
    assert {row["loss"] for row in page.list_rows()} == {None} and page.read()["splits"][0]["losses"] is None
    lens.rename(own_data.lens)
    assert None not in {row["loss"] for row in page.list_rows()}


def test_a_long_row_is_cut_and_says_how_much_is_left(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.ui.data_rows.LONGEST_LISTED", 10)
    row = Page(run).list_rows(sort="-length")[0]
    assert row["cut"] and row["left"] == row["length"] - 10
    assert Page(run).read(f"/rows/{row['index']}")["cut"] is False
    assert "no row 999" in Page(run).read("/rows/999", 404)["error"]


def test_a_search_that_stops_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.ui.row_filters.MOST_SEARCHED", 5)
    found = Page(run).read("/rows", text="how many")
    assert found["total"] == 5 and found["remark"].startswith("The search stopped after 5 of")


def test_few_runs_stay_open_and_one_that_was_replaced_is_opened_anew(own_data: RunFolder, run: RunFolder) -> None:
    opened = OpenedRuns(most=1)
    first = opened.open_run(own_data)
    assert opened.open_run(own_data) is first
    (own_data.metadata / "data.json").touch()
    second = opened.open_run(own_data)
    assert second is not first
    opened.open_run(run)
    assert opened.open_run(own_data) is not second


def test_the_embedded_run_has_its_domains_in_both_splits(finished_run: RunFolder) -> None:
    train, validation = Page(finished_run).read()["splits"]
    assert train["rows"] == 64 and len(train["domains"]) == 3 == len(validation["domains"])
    assert train["losses"]["rows"] == 64 and train["losses"]["every"] == 1
