"""`prepare` writes clean splits whole or not at all, says what it found, and `train` starts from its cache."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from forked import fork_command  # type: ignore[import-not-found]

from training_lens import embedded
from training_lens.data.examples import SourceFile
from training_lens.data.file_readers import read_file_rows
from training_lens.utils.integrity import read_sealed

Call = Callable[..., Result]
EMBEDDED = embedded.PATHS[embedded.TRAIN]
ROWS = [
    {"question": f"Where is box {i} of the {i * i} boxes?", "answer": f"In hall {i * 7}.", "user": f"u{i % 9}"}
    for i in range(60)
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_file_rows(SourceFile(folder / name))]


@pytest.mark.parametrize("count", [240, pytest.param(2100, marks=pytest.mark.slow)])
def test_the_default_splits_a_tenth_off_and_train_starts_from_its_cache(
    call: Call, few_rows: dict[str, list[str]], tmp_path: Path, count: int
) -> None:
    """The first short rows of the embedded set, and by default all of it."""
    file, given = (few_rows["train"][0], [f"data.train={few_rows['train']}"]) if count == 240 else (EMBEDDED, [])
    report = report_of(call("prepare", *given, "--json"))
    assert report["rows_read"] == count and report["form"] == "as_read"
    parts = {"train": count * 9 // 10, "validation": count // 10}
    assert {name: split["rows"] for name, split in report["splits"].items()} == parts
    source = [json.loads(line) for line in Path(file).read_text().splitlines()]
    written = [
        row for name in ("train", "validation") for row in rows_of(tmp_path, f"outputs/data/default/{name}.jsonl")
    ]
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, source))

    caches = set((tmp_path / "outputs/cache").iterdir())
    assert len(caches) == 2
    program, order, *words = shlex.split(report["train"])
    assert (program, order) == ("training-lens", "train")
    plan = report_of(call("validate", *words, "--json"))
    assert {name: plan[f"{name}_examples"] for name in parts} == parts
    assert set((tmp_path / "outputs/cache").iterdir()) == caches


def test_the_manifest_says_what_the_files_hold(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, ROWS)
    report = report_of(
        call("prepare", f"data.train={name}", "prepare.splits={train:0.8,validation:0.1,test:0.1}", "--json")
    )
    folder = tmp_path / "outputs/data/default"
    manifest = read_sealed(folder / "manifest.json", required=True)
    assert report == {"folder": "outputs/data/default", "train": report["train"], **manifest}
    assert {path.name for path in folder.iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "manifest.json",
    }
    for split in manifest["splits"].values():
        content = (folder / split["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == split["sha256"]
        assert content.count(b"\n") == split["rows"] == split["lengths"]["examples"]
        assert split["lengths"]["tokens"] > split["supervised_tokens"] > 0
    assert manifest["sources"][name]["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert manifest["sources"][name]["rows"] == 60 and manifest["settings"]["seed"] == 0


def test_duplicates_conflicts_and_leaks_are_found_and_said(call: Call, tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(90))
    planted = [
        {"question": ROWS[3]["question"] + " ", "answer": ROWS[3]["answer"]},
        {"question": f"Read {words}", "answer": "Gladly."},
        {"question": f"Read {words} again", "answer": "gladly."},
        {"question": ROWS[5]["question"], "answer": "Nowhere."},
    ]
    name = write(tmp_path, [*ROWS, *planted])
    report = report_of(call("prepare", f"data.train={name}", "prepare.deduplicate=near", "--json"))
    exact, near, conflicts = (report[k] for k in ("duplicates_exact", "duplicates_near", "conflicting_answers"))
    assert [(item["row"], item["other"]) for item in exact["listed"]] == [(f"{name}:61", f"{name}:4")]
    assert [(item["row"], item["other"]) for item in near["listed"]] == [(f"{name}:63", f"{name}:62")]
    assert 0.9 < near["listed"][0]["similarity"] < 1 and near["listed"][0]["text"].startswith("Read word0 word1")
    assert [(item["row"], item["other"]) for item in conflicts["listed"]] == [(f"{name}:64", f"{name}:6")]
    assert sum(split["rows"] for split in report["splits"].values()) == 62
    shown = call("prepare", f"data.train={name}", "prepare.deduplicate=near", "prepare.output=again")
    said = " ".join(shown.output.split())
    for part in ("1 row: say what an earlier row says", f"{name}:61 and {name}:4", "say nearly", "answer otherwise"):
        assert part in said
    assert all(len(line) <= 80 for line in shown.output.splitlines() if "│" in line)


def test_other_answers_to_one_long_prompt_are_conflicts_and_all_stay(call: Call, tmp_path: Path) -> None:
    prompts = [" ".join(f"word{i}x{n}" for n in range(60)) for i in range(15)]
    name = write(tmp_path, [{"question": p, "answer": answer} for p in prompts for answer in ("yes", "no")])
    report = report_of(call("prepare", f"data.train={name}", "prepare.deduplicate=near", "--json"))
    assert (report["duplicates_near"]["rows"], report["conflicting_answers"]["rows"]) == (0, 15)
    assert sum(split["rows"] for split in report["splits"].values()) == 30


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_the_same_text_of_two_domains_is_a_leak_and_no_duplicate(deduplicate: str, call: Call, tmp_path: Path) -> None:
    rows = [{**{k: row[k] for k in ("question", "answer")}, "domain": d} for row in ROWS for d in ("law", "tax")]
    name = write(tmp_path, rows)
    settings = [f"data.train={name}", f"prepare.deduplicate={deduplicate}", "prepare.leakage=remove"]
    report = report_of(call("prepare", *settings, "--json"))
    assert report["duplicates_exact"]["rows"] == report["duplicates_near"]["rows"] == 0
    assert report["leaks_exact"]["rows"] == report["leaks_removed"] > 0
    folder = tmp_path / "outputs/data/default"
    learned, held = ({row["question"] for row in rows_of(folder, f"{s}.jsonl")} for s in ("train", "validation"))
    assert held and not learned & held


def test_near_prompts_with_other_answers_leak_also_where_near_rows_were_left_out(call: Call, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(60))
    name = write(tmp_path, [{"question": f"{words} {i}", "answer": f"It is {i}."} for i in range(20)])
    report = report_of(call("prepare", f"data.train={name}", "prepare.deduplicate=near", "--json"))
    assert report["duplicates_near"]["rows"] == 0 and report["leaks_near"]["rows"] > 0


@pytest.mark.parametrize("leakage", ["check", "remove", "off"])
def test_leaks_between_splits_cost_training_rows_where_asked(leakage: str, call: Call, tmp_path: Path) -> None:
    """Sixty questions, each with three answers: some of a question end up on both sides."""
    rows = [{"question": row["question"], "answer": f"{row['answer']} {n}"} for row in ROWS for n in "abc"]
    name = write(tmp_path, rows)
    settings = [f"data.train={name}", f"prepare.leakage={leakage}", "prepare.near_threshold=1"]
    report = report_of(call("prepare", *settings, "--json"))
    folder = tmp_path / "outputs/data/default"
    learned, held = ({row["question"] for row in rows_of(folder, f"{s}.jsonl")} for s in ("train", "validation"))
    assert bool(learned & held) == (leakage != "remove")
    found = report["leaks_prompt"]["rows"]
    assert (found > 0) == (leakage != "off")
    assert report["leaks_removed"] == (found if leakage == "remove" else 0)
    assert report["splits"]["train"]["rows"] == 162 - report["leaks_removed"]


def test_groups_stay_together(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, ROWS)
    settings = [f"data.train={name}", "prepare.split_by=group", "prepare.group_field=user"]
    report_of(call("prepare", *settings, "--json"))
    folder = tmp_path / "outputs/data/default"
    learned, held = ({row["user"] for row in rows_of(folder, f"{s}.jsonl")} for s in ("train", "validation"))
    assert learned and held and not learned & held and len(learned | held) == 9


def test_every_domain_has_its_share_and_files_become_domains(call: Call, tmp_path: Path) -> None:
    """The command that it gives trains on the written files as they are: no new cache is made."""
    plain = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    write(tmp_path, plain[:40], "law.jsonl")
    write(tmp_path, plain[40:], "tax.jsonl")
    settings = ["data.train=[law.jsonl,tax.jsonl]", "data.domain.per_file=true", "prepare.split_by=domain"]
    report = report_of(call("prepare", *settings, "prepare.splits={train:0.75,validation:0.25}", "--json"))
    counts = {s: {d: of["examples"] for d, of in split["domains"].items()} for s, split in report["splits"].items()}
    assert counts == {"train": {"law": 30, "tax": 15}, "validation": {"law": 10, "tax": 5}}
    caches = set((tmp_path / "outputs/cache").iterdir())
    _, *words = shlex.split(report["train"])
    plan = report_of(call("validate", *words[1:], "training.max_steps=1", "--json"))
    assert plan["domains"] == ["law", "tax"] and plan["train_examples"] == 45
    assert set((tmp_path / "outputs/cache").iterdir()) == caches


def test_many_small_domains_keep_the_shares(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, [{**row, "domain": f"d{i // 3}"} for i, row in enumerate(ROWS)])
    settings = [f"data.train={name}", "prepare.split_by=domain", "prepare.splits={train:0.8,validation:0.1,test:0.1}"]
    report = report_of(call("prepare", *settings, "--json"))
    assert [split["rows"] for split in report["splits"].values()] == [48, 6, 6]


def test_what_json_cannot_hold_beside_what_is_learned_becomes_null_and_is_said(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, [{**row, "score": float("nan") if i % 2 else 0.5} for i, row in enumerate(ROWS)])
    result = call("prepare", f"data.train={name}", "--json")
    assert result.stderr.count("'score' is NaN or infinite in 30 rows") == 1
    report_of(result)
    assert "NaN" not in (tmp_path / "outputs/data/default/train.jsonl").read_text()


@pytest.mark.slow
def test_parquet_of_named_fields_trains_from_the_cache_too(call: Call, tmp_path: Path) -> None:
    rows = [{"a": row["question"], "b": row["answer"], "topic": "xy"[i % 2]} for i, row in enumerate(ROWS)]
    write(tmp_path, rows, "my rows.jsonl")
    settings = ["data.train='my rows.jsonl'", "data.fields.instruction=a", "data.fields.output=b"]
    settings += ["data.domain.field=topic", "prepare.format=parquet", "prepare.output='an output'"]
    report = report_of(call("prepare", *settings, "--json"))
    assert report["form"] == "pair"
    assert "rows are written as instruction and output" in call("prepare", *settings, "--force").output
    caches = set((tmp_path / "outputs/cache").iterdir())
    _, *words = shlex.split(report["train"])
    plan = report_of(call("validate", *words[1:], "training.max_steps=1", "--json"))
    assert plan["domains"] == ["x", "y"] and plan["train_examples"] == 54
    assert set((tmp_path / "outputs/cache").iterdir()) == caches


REFUSING = (
    "{% for m in messages %}{% if 'box 7 ' in m.content %}{{ raise_exception('no box 7') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_bad_rows_are_all_named_or_left_out_and_listed(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(REFUSING)
    rows = [*ROWS[:20], {"question": "Who?", "answer": ""}, {"question": "Who?"}]
    name = write(tmp_path, rows)
    with (tmp_path / name).open("a") as file:
        file.write("{broken\n")
    command = ["prepare", f"data.train={name}", "data.template=t.jinja"]
    refused = call(*command)
    assert refused.exit_code == 1 and "4 of 23 rows cannot be used:" in refused.stderr
    assert all(f"row {number}: " in refused.stderr for number in (8, 21, 22, 23))
    assert "outputs/data" not in refused.stderr and not (tmp_path / "outputs/data/default").exists()

    report = report_of(call(*command, "data.on_bad_row=skip", "--json"))
    assert report["rows_read"] == 19
    bad = report["sources"][name]["bad_rows"]
    assert sorted(number for numbers in bad.values() for number in numbers) == [8, 21, 22, 23]
    words = [word for word in shlex.split(report["train"])[2:] if word != "data.on_bad_row=skip"]
    assert report_of(call("validate", *words, "--json"))["train_examples"] == 17


def test_other_histories_systems_tools_and_masks_are_no_duplicates(call: Call, tmp_path: Path) -> None:
    asked, answer = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "It sleeps."}
    earlier = {"role": "assistant", "content": "It eats."}
    chats = [
        [asked, answer],
        [asked, earlier, asked, answer],
        [asked, earlier | {"loss_weight": 0}, asked, answer],
        [{"role": "system", "content": "Be short."}, asked, answer],
        [asked, earlier | {"content": "It hunts."}, asked, answer],
    ]
    tool = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    rows = [{"messages": chat} for chat in chats] + [{"messages": chats[0], "tools": [tool]}, {"messages": chats[1]}]
    report = report_of(call("prepare", f"data.train={write(tmp_path, rows)}", "--json"))
    assert [item["row"] for item in report["duplicates_exact"]["listed"]] == ["rows.jsonl:7"]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_what_tables_and_parquet_hold_trains_as_before(file_format: str, call: Call, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Call {name} of {i}."},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": name, "arguments": {name: i}}}],
                },
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": f"Done {i}."},
            ],
        }
        for i, name in enumerate(["find", "list", "show"] * 4)
    ]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    write(tmp_path, chats, "chats.jsonl")
    tokens = [
        report_of(call("validate", f"data.train={name}", "--json"))["tokens"]
        for name in ("chats.parquet", "chats.jsonl")
    ]
    report = report_of(
        call(
            "prepare",
            "data.train=chats.parquet",
            f"prepare.format={file_format}",
            "prepare.splits={train:1.0}",
            "--json",
        )
    )
    assert tokens == [report["splits"]["train"]["lengths"]["tokens"]] * 2


def test_the_same_rows_and_seed_give_the_same_files(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, ROWS)
    one, two, other = (
        report_of(call("prepare", f"data.train={name}", f"prepare.output={out}", f"prepare.seed={seed}", "--json"))
        for out, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    files = [{split["sha256"] for split in report["splits"].values()} for report in (one, two, other)]
    assert files[0] == files[1] and not files[0] & files[2]


def test_an_earlier_result_is_replaced_by_force_alone(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, ROWS)
    report_of(call("prepare", f"data.train={name}", "prepare.output=out", "--json"))
    before = (tmp_path / "out/manifest.json").read_bytes()
    again = ["prepare", f"data.train={name}", "prepare.output=out", "prepare.seed=5"]
    refused = call(*again)
    assert refused.exit_code == 2 and "'out' is there already" in refused.stderr and "--force" in refused.stderr
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    assert call(*again, "--force").exit_code == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["seed"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "outputs", "rows.jsonl"]


def test_force_replaces_nothing_else_and_never_what_is_read(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, ROWS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear")
    refused = call("prepare", f"data.train={name}", "prepare.output=mine", "--force")
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "'mine' holds diary.txt, which prepare did not write" in said
    assert call("prepare", f"data.train={name}", "prepare.output=out").exit_code == 0
    refused = call("prepare", "data.train=out/train.jsonl", "prepare.output=out", "--force")
    assert refused.exit_code == 2 and "holds out/train.jsonl, which is to be read" in refused.stderr
    (tmp_path / "out/NOTES.txt").write_text("mine")
    refused = call("prepare", f"data.train={name}", "prepare.output=out", "--force")
    assert refused.exit_code == 2 and "'out' holds NOTES.txt, which prepare did not write" in " ".join(
        refused.stderr.split()
    )
    assert (tmp_path / "out/NOTES.txt").read_text() == "mine"
    assert (tmp_path / "mine/diary.txt").exists() and (tmp_path / "out/train.jsonl").exists()


BAD: dict[str, tuple[list[dict[str, Any]], list[str], int, str]] = {
    "a row without an answer": ([*ROWS, {"question": "Who?"}], [], 1, "row 61: has no field 'answer'"),
    "no rows": ([], [], 1, "rows.jsonl: holds no rows"),
    "a row without its group": (
        [*ROWS, {"question": "Who?", "answer": "Tom."}],
        ["prepare.split_by=group", "prepare.group_field=user"],
        1,
        "row 61: has no field 'user'",
    ),
    "a group field that no row has": (
        ROWS,
        ["prepare.split_by=group", "prepare.group_field=users"],
        1,
        "prepare.group_field: rows.jsonl has no field 'users'. Did you mean 'user'?",
    ),
    "no domains": (ROWS, ["prepare.split_by=domain"], 1, "the rows have no domain to split by"),
    "too few rows": (ROWS[:1], [], 1, "1 rows cannot be split into 2 splits (train, validation)"),
    "duplicates do not count as rows": ([ROWS[0]] * 9, [], 1, "1 rows cannot be split into 2 splits"),
    "too few groups": (
        [{**row, "user": "me"} for row in ROWS],
        ["prepare.split_by=group", "prepare.group_field=user"],
        1,
        "1 groups cannot be split into 2 splits",
    ),
    "all training rows leak": (
        [{"question": "Who?", "answer": f"Tom {i}."} for i in range(9)],
        ["prepare.leakage=remove"],
        1,
        "all 8 training rows have their like in another split",
    ),
    "a split with nothing to learn": (
        [{"question": f"{i} " * 99, "answer": "yes " * 40} for i in range(4)],
        ["model.seq_len=8", "data.truncation=drop"],
        1,
        "the split 'train': of 3 rows none has an answer within model.seq_len=8",
    ),
    "shares that are no whole": (ROWS, ["prepare.splits={train:0.9}"], 2, "the shares sum to 0.9, expected 1"),
    "no training split": (ROWS, ["prepare.splits={test:1}"], 2, "there is no 'train' among test"),
    "a split that is no name": (ROWS, ["prepare.splits={train:0.5,a.b:0.5}"], 2, "'a.b' cannot name a file"),
    "groups without a field": (ROWS, ["prepare.split_by=group"], 2, "give prepare.group_field"),
    "a field without groups": (ROWS, ["prepare.group_field=user"], 2, "give prepare.split_by=group"),
    "weights given": (ROWS, ["data.weights=[2]"], 2, "data.weights: prepare takes every row"),
    "rows drawn": (ROWS, ["data.max_examples=3"], 2, "data.max_examples: prepare takes every row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_paragraph_and_leaves_nothing(case: str, call: Call, tmp_path: Path) -> None:
    rows, settings, code, message = BAD[case]
    result = call("prepare", f"data.train={write(tmp_path, rows)}", *settings)
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert not list((tmp_path / "outputs").glob("data/*"))


def test_a_kill_in_the_middle_leaves_no_result_and_the_next_time_works(call: Call, tmp_path: Path) -> None:
    name = write(tmp_path, [{"question": f"Where is {i}?", "answer": f"In box {i}."} for i in range(5_000)])
    command = ["prepare", f"data.train={name}", "prepare.leakage=off"]
    process = fork_command(tmp_path, *command)
    building: list[Path] = []
    while not building and process.is_alive():
        time.sleep(0.005)
        building = list(tmp_path.glob("outputs/data/.tmp-*/train.jsonl"))
    process.kill()
    process.join()
    assert building and not (tmp_path / "outputs/data/default").exists()
    write(tmp_path, ROWS)
    assert call(*command).exit_code == 0
    assert (tmp_path / "outputs/data/default/manifest.json").is_file()


@pytest.mark.slow
def test_two_given_splits_keep_validation_and_lose_the_training_rows_that_it_repeats(
    call: Call, tmp_path: Path
) -> None:
    held = [
        {**ROWS[3], "question": f"So, {ROWS[3]['question'].upper()} "},
        {**ROWS[4], "answer": "Nowhere."},
        ROWS[5],
        ROWS[5],
        {"question": "Who sings in the yard at night?", "answer": "The owl.", "user": "u1"},
    ]
    train, validation = write(tmp_path, [*ROWS, ROWS[0]], "a.jsonl"), write(tmp_path, held, "b.jsonl")
    given = [f"data.train={train}", f"data.validation={validation}"]
    report = report_of(call("prepare", *given, "--json"))
    folder = tmp_path / "outputs/data/default"
    assert rows_of(folder, "validation.jsonl") == held
    assert rows_of(folder, "train.jsonl") == [row for row in ROWS if row not in ROWS[3:6]]
    kinds = ("exact", "normalized", "prompt", "near")
    assert [report[f"leaks_{kind}"]["rows"] for kind in kinds] == [1, 1, 1, 0] and report["leaks_removed"] == 3
    assert report["duplicates_exact"]["rows"] == 1
    assert set(report["sources"]) == {train, validation}
    plan = report_of(call("validate", *shlex.split(report["train"])[2:], "--json"))
    (leaks,) = (finding for finding in plan["findings"] if finding["code"] == "leaks")
    assert leaks["severity"] == "fine" and plan["validation_examples"] == 5

    checked = report_of(call("prepare", *given, "prepare.leakage=check", "--force", "--json"))
    assert checked["leaks_removed"] == 0 and checked["splits"]["train"]["rows"] == 60
    three = report_of(call("prepare", *given, "prepare.splits={train:0.9,test:0.1}", "--force", "--json"))
    assert {name: split["rows"] for name, split in three["splits"].items()} == {"train": 51, "test": 6, "validation": 5}
    for wrong in ("prepare.splits={train:0.9,validation:0.1}", "data.validation=a.jsonl"):
        assert call("prepare", *given, wrong, "--force").exit_code == 2
