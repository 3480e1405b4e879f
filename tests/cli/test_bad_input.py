# ruff: noqa: E501 (a line a case reads best)
"""Every kind of bad input: what, where and what to do, the exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_server import use_hub  # type: ignore[import-not-found]
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from slow_cases import slow_but
from typer.testing import CliRunner

from training_lens import embedded
from training_lens.cli import cli
from training_lens.runs.run_folder import RunFolder

GOOD = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(24)]
Make = Callable[[Path], list[str]]  # writes what it needs into the folder, gives the command's settings


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def train_on(content: bytes, name: str = "rows.jsonl", *more: str) -> Make:
    """A training file with this content."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"data.train={name}", *more]

    return make


def rows(*changed: Any, more: tuple[str, ...] = ()) -> Make:
    """Good rows, then these."""
    return train_on(lines([*GOOD, *changed]), "rows.jsonl", *more)


def settings(*given: str) -> Make:
    return lambda _folder: list(given)


def chat(*messages: dict[str, Any]) -> Make:
    return train_on(lines([{"messages": list(messages)}]))


def with_file(name: str, content: str, *given: str) -> Make:
    """Good rows, and a file beside them."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_text(content)
        return [*rows()(folder), *given]

    return make


def with_model(change: Callable[[Path], object], *more: str) -> Make:
    """Good rows, and a copy of the embedded model with something wrong in it."""

    def make(folder: Path) -> list[str]:
        model = folder / "model"
        shutil.copytree(embedded.PATHS[embedded.MODEL], model)
        change(model)
        return [*rows()(folder), "model.id=./model", *more]

    return make


def edit(name: str, **keys: Any) -> Callable[[Path], object]:
    """Set keys of a JSON file of the model; None takes one out."""

    def change(model: Path) -> None:
        values = {**json.loads((model / name).read_text()), **keys}
        (model / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def leave_out(name: str) -> Callable[[Path], object]:
    """Weights without the tensors of this name."""

    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        save_file({k: v for k, v in weights.items() if name not in k}, model / "model.safetensors", {"format": "pt"})

    return change


def replaced(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def indexed(content: str) -> Callable[[Path], object]:
    """An index with this content instead of the one weight file."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(content)

    return change


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def same_validation(folder: Path) -> list[str]:
    return [*rows()(folder), "data.validation=rows.jsonl"]


LONG = lines([{"question": f"Tell me of {i}.", "answer": "It was long. " * 20} for i in range(8)])
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
SYSTEM_ROWS = lines([{"system": "Be brief.", **row} for row in GOOD])

# name: (what it is, exit code, what the message must say)
CASES: dict[str, tuple[Make, int, str]] = {
    # files
    "missing file": (with_file("a.txt", "", "data.train=row.jsonl"), 1, r"'row\.jsonl' is not there\. Did you mean"),
    "missing folder": (settings("data.train=no/rows.jsonl"), 1, "no folder 'no'"),
    "a folder": (lambda f: rows()(f) and ["data.train=."], 1, r"is a folder, expected files .*its 1 files"),
    "glob without match": (settings("data.train=*.jsonl"), 1, "matches no file"),
    "empty path": (settings("data.train=''"), 1, r"data\.train: an empty path"),
    "unknown ending": (train_on(b"a", "rows.txt"), 1, r"ending '\.txt' is not readable; expected \.json,"),
    "empty file": (train_on(b""), 1, r"rows\.jsonl: holds no rows"),
    "empty list": (train_on(b"[]", "rows.json"), 1, r"rows\.json: holds no rows"),
    "only a header": (train_on(b"question,answer\n", "rows.csv"), 1, r"rows\.csv: holds no rows"),
    "not UTF-8": (train_on(b'{"question": "\xff", "answer": "b"}\n'), 1, r"line 1: is not UTF-8 .*Save the file as UTF-8"),
    "UTF-16": (train_on('{"question": "a"}'.encode("utf-16")), 1, "UTF-16 text, and JSON is UTF-8"),
    "binary": (train_on(b"\x00\x01\x02\x03"), 1, "is binary, no text"),
    "gzip by another name": (train_on(gzip.compress(lines(GOOD), mtime=0)), 1, r"end its name in \.gz"),
    "cut gzip": (train_on(gzip.compress(lines(GOOD), mtime=0)[:-20], "rows.jsonl.gz"), 1, "broken gzip data"),
    "broken JSON line": (train_on(lines(GOOD) + b'{"question": \n'), 1, "line 25: broken JSON"),
    "broken JSON": (train_on(b'[{"question": "a"', "rows.json"), 1, r"rows\.json, line 1: broken JSON"),
    "lists that are no chats": (train_on(b"[[1]]\n[2]\n"), 1, "none of its 2 rows can be used"),
    "two lists": (train_on(b'{"a": [{}], "b": [{}]}', "rows.json"), 1, r"2 lists of rows \(a, b\)"),
    "duplicate key": (train_on(b'{"question": "a", "answer": "b", "answer": "c"}\n'), 1, "key 'answer' stands there twice"),
    "ragged table": (train_on(b"question,answer\na,b\na\n", "rows.csv"), 1, "row 3: has 1 cells, the first row names 2"),
    "two delimiters": (train_on(b"a;b,c\n1;2,3\n", "rows.csv"), 1, r"delimiter could be .*data\.csv\.delimiter=comma"),
    "columns of one name": (train_on(b"answer,answer\na,b\n", "rows.csv"), 1, "two columns are named 'answer'"),
    "broken Parquet": (train_on(b"PAR1 and no more", "rows.parquet"), 1, "broken Parquet"),
    # rows
    "null": (rows({"question": "a", "answer": None}), 1, "row 25: 'answer' is null"),
    "NaN": (train_on(b'{"question": "a", "answer": NaN}\n'), 1, "row 1: 'answer' is NaN"),
    "empty answer": (rows({"question": "a", "answer": ""}), 1, "row 25: 'answer' is empty"),
    "white space": (rows({"question": "a", "answer": " \n"}), 1, "row 25: 'answer' is only white space"),
    "a list for text": (rows({"question": ["a"], "answer": "b"}), 1, "row 25: 'question' is a list, expected text"),
    "nested": (rows({"question": {"text": "a"}, "answer": "b"}), 1, "row 25: 'question' is a dict, expected text"),
    "missing field": (rows({"question": "a"}), 1, r"row 25: has no field 'answer' \(its fields: question\)"),
    "no prompt": (train_on(lines([{"a": "b", "answer": "c"}])), 1, r"no prompt found .*data\.fields\.instruction=FIELD"),
    "no answer": (train_on(lines([{"question": "b"}])), 1, r"no answer found .*data\.fields\.output=FIELD"),
    "two answers": (train_on(lines([{**GOOD[0], "output": "x"}])), 1, r"Say which: data\.fields\.output="),
    "mixed forms": (rows({"messages": [USER, ASSISTANT]}), 1, r"messages \(row 25\) or as question -> answer \(row 1\)"),
    "unknown field": (rows(more=("data.fields.output=anwser",)), 1, "no field 'anwser'. Did you mean 'answer'"),
    "unknown domain field": (rows(more=("data.domain.field=topic",)), 1, r"data\.domain\.field: .*no field 'topic'"),
    "chat without answer": (chat(USER), 1, "ends with a user message"),
    "chat that begins with the answer": (chat(ASSISTANT), 1, "begins with a message of the assistant"),
    "unknown role": (chat({"role": "robot", "content": "a"}), 1, "message 1: role 'robot' is none of"),
    "half a surrogate": (train_on(b'{"question": "a", "answer": "\\ud800"}\n'), 1, r"row 1: 'answer' holds half a surrogate pair"),
    "endless brackets": (train_on(b"[" * 200_000 + b"\n"), 1, "line 1: JSON that cannot be read"),
    "a number of thousands of digits": (train_on(b'{"answer": ' + b"9" * 6000 + b"}\n"), 1, "line 1: JSON that cannot be read"),
    "calls that are no list": (chat(USER, {**ASSISTANT, "tool_calls": 5}), 1, "'tool_calls' is a int"),
    "thoughts apart": (chat(USER, {**ASSISTANT, "reasoning_content": "hm"}), 1, "would not be learned. Put it into"),
    "an image": (chat({"role": "user", "content": [{"type": "image"}]}, ASSISTANT), 1, "a part of type 'image'"),
    "half a loss weight": (chat(USER, {**ASSISTANT, "loss_weight": 0.5}), 1, "'loss_weight' is 0.5, expected 0 or 1"),
    "broken call": (chat(USER, {"from": "function_call", "value": "no"}), 1, "expected a function call in JSON"),
    # what is left after preparation
    "validation is training": (same_validation, 1, "all 24 validation examples are training examples too"),
    "answers all cut": (
        train_on(LONG, "rows.jsonl", "model.seq_len=16", "data.truncation=keep_start", "data.template=plain"), 1, "answers of all 8 examples are cut"
    ),
    "nothing fits": (rows(more=("model.seq_len=8", "data.truncation=drop")), 1, "of 24 rows none has an answer within"),
    "one row to split": (train_on(lines(GOOD[:1]), "rows.jsonl", "data.val_ratio=0.5"), 2, "one example cannot be split"),
    # templates
    "template syntax": (with_file("t.jinja", "{% for %}", "data.template=t.jinja"), 2, r"t\.jinja, line 1: "),
    "missing template": (rows(more=("data.template=no.jinja",)), 2, r"'no\.jinja' cannot be read"),
    "unknown template": (rows(more=("data.template=alpcaa",)), 2, r"data\.template: 'alpcaa' .*Did you mean 'alpaca'"),
    "pattern without answer": (rows(more=("data.template='Q: {instruction}'",)), 2, r"needs \{instruction\}, and \{output\}"),
    "template that fails": (with_file("t.jinja", "{{ 1 / 0 }}", "data.template=t.jinja"), 2, "division by zero"),
    "template without content": (with_file("t.jinja", "hello", "data.template=t.jinja"), 2, "cannot be trained with"),
    "system message dropped": (
        lambda f: [*with_file("t.jinja", DROPS)(f), *train_on(SYSTEM_ROWS)(f), "data.template=t.jinja"],
        1, r"rows\.jsonl(.|\n)*the chat template t\.jinja drops .*the system message",
    ),
    # models
    "no model folder": (rows(more=("model.id=./modle",)), 1, r"model\.id: no folder"),
    "no config": (with_model(lambda m: (m / "config.json").unlink()), 1, "holds no config.json"),
    "only pickles": (with_model(only_pickles), 1, r"only pytorch_model\.bin, which may run code"),
    "cut weights": (with_model(cut_weights), 1, r"weights of '\./model' cannot be loaded|is broken"),
    "tensors left out": (with_model(leave_out("layers.0.mlp")), 1, "lack 3 of the model's tensors"),
    "config of another size": (with_model(edit("config.json", num_hidden_layers=6)), 1, "lack 9 of the model's tensors"),
    "a wider config": (with_model(edit("config.json", intermediate_size=999)), 1, "another shape than its config.json"),
    "a config of wrong type": (with_model(edit("config.json", hidden_size="abc")), 1, "configuration of './model' .*hidden_size"),
    "a model of images": (with_model(replaced("config.json", '{"model_type": "vit"}')), 1, "type 'vit', which generates no text"),
    "a model that encodes": (with_model(edit("config.json", model_type="t5")), 1, "is an encoder-decoder .*Give a decoder-only model"),
    "a config without size": (with_model(edit("config.json", hidden_size=0)), 1, "not a language model: .*hidden_size 0"),
    "negative positions": (with_model(edit("config.json", max_position_embeddings=-5)), 1, "max_position_embeddings -5"),
    "tokenizer of wrong type": (with_model(edit("tokenizer_config.json", model_max_length="a")), 1, "tokenizer of './model' cannot"),
    "config that is a list": (with_model(replaced("config.json", "[]")), 1, "configuration of './model' cannot be loaded"),
    "broken index": (with_model(indexed("{")), 1, r"index\.json is no valid JSON"),
    "empty index": (with_model(indexed("{}")), 1, r"index\.json has no weight_map"),
    "index of other files": (with_model(indexed('{"weight_map": {"a": "b.safetensors"}}')), 1, r"b\.safetensors is broken or missing"),
    "broken tokenizer": (with_model(replaced("tokenizer.json", "{")), 1, "tokenizer of './model' cannot be loaded"),
    "no tokenizer": (with_model(lambda m: [f.unlink() for f in m.glob("*token*")]), 1, "tokenizer of './model'"),
    "no EOS": (with_model(edit("tokenizer_config.json", eos_token=None)), 1, "has no EOS token.*Its special tokens:"),
    "vocabulary beyond the embedding": (with_model(edit("config.json", vocab_size=600)), 1, "ids up to 658, its embedding 600"),
    "seq_len beyond the positions": (rows(more=("model.seq_len=4096",)), 2, "has 512 positions; give at most 512"),
    "an unknown device": (rows(more=("model.device=cuda:7",)), 2, r"model\.device: 'cuda:7' is not available"),
    # adapters
    "targets match nothing": (rows(more=("peft.target_modules=[q_porj]",)), 1, "no module .*'q_porj'.*'?q_proj"),
    "pattern matches nothing": (rows(more=("peft.target_modules='.*attn_proj'",)), 1, r"peft\.target_modules: .*attn_proj"),
    "rank above the width": (rows(more=("peft.r=4000",)), 1, r"peft\.r.*4000"),
    "DoRA on an embedding": (
        rows(more=("peft.use_dora=true", "peft.target_modules=[embed_tokens]")), 1, "embed_tokens.*Embedding"
    ),
    "rank pattern of nothing": (rows(more=("peft.rank_pattern={q_porj: 4}",)), 1, r"peft\.rank_pattern: .*q_porj"),
    "module to save that is not there": (rows(more=("peft.modules_to_save=[lm_haed]",)), 1, "modules_to_save: .*lm_haed"),
    "no adapter to go on from": (rows(more=("peft.from_adapter=./nowhere",)), 1, r"nowhere"),
    # settings
    "unknown key": (rows(more=("training.lerning_rate=1",)), 2, r"training\.lerning_rate: unknown key"),
    "wrong type": (rows(more=("training.epochs=many",)), 2, r"training\.epochs: given 'many'"),
    "several problems": (rows(more=("training.lr=7", "peft.r=0")), 2, "2 problems in the configuration"),
    "unknown preset": (rows(more=("+experiment=quick",)), 2, r"experiment=quick: no such preset; there are: .*quick_test"),
    "no override": (rows(more=("training.lr",)), 2, "is no override; write key=value"),
    "config file missing": (rows(more=("--config", "no.yaml")), 2, r"--config no\.yaml: cannot be read"),
    "config file broken": (with_file("c.yaml", "a: [1", "--config", "c.yaml"), 2, r"--config c\.yaml: no valid YAML"),
    "weights for other entries": (rows(more=("data.weights=[1,2]",)), 2, r"2 weights for 1 entries"),
    "a weight of nothing": (rows(more=("data.weights=[0.01]",)), 2, r"entry 1 of data\.train, with weight 0\.01, gives none"),
    "two validations": (lambda f: [*same_validation(f), "data.val_ratio=0.1"], 2, "are both given; keep one"),
    "validating on nothing": (rows(more=("training.eval_steps=2",)), 2, r"eval_steps: needs validation data"),
    "cycles without restarts": (rows(more=("training.scheduler_cycles=3",)), 2, "need scheduler=cosine_with_restarts"),
    "PiSSA on a quantized base": (rows(more=("peft.init=pissa", "model.quantization=4bit")), 2, "pissa needs the weights"),
    # output
    "folder not writable": (
        with_file("outputs", "a file stands here"), 2, r"output\.base_output_dir: cannot write in 'outputs'"
    ),
    "a name that is a path": (rows(more=("output.experiment_name=a/b",)), 2, "cannot name a folder"),
}  # fmt: skip


def test_there_are_more_than_forty_kinds() -> None:
    assert len(CASES) > 40


@pytest.mark.parametrize(
    ("command", "name"),
    slow_but(
        [("train", name) for name in list(CASES)[::2]],
        [*(("train", name) for name in CASES), *(("validate", name) for name in list(CASES)[::12])],
    ),
)
def test_bad_input_is_said_and_leaves_nothing(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, exit_code, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [command, *make(tmp_path)])
    said = " ".join(result.output.split())
    assert result.exit_code == exit_code, said
    assert "Traceback" not in said and isinstance(result.exception, SystemExit), result.exception
    assert re.search(message, said), said
    assert_nothing_half_written(tmp_path)


def assert_nothing_half_written(folder: Path) -> None:
    outputs = folder / "outputs"
    assert not list(outputs.rglob(".tmp-*")) if outputs.is_dir() else True
    assert not (outputs / "experiments").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_model.safetensors", lambda content: content[:-1000], r"adapter_model\.safetensors is broken"),
        ("adapter_config.json", lambda _: b"{}", r"adapter_config\.json names no peft_type"),
        (
            "adapter_config.json",
            lambda content: content.replace(b'"r": 16', b'"r": "abc"'),
            r"adapter_config\.json has a wrong value\. r: given 'abc', expected a whole number",
        ),
        ("tokenizer.json", lambda _: b"{", "tokenizer in .*adapter .*cannot be loaded"),
    ],
)
def test_a_broken_adapter_folder_answers_nothing_and_says_why(
    name: str, change: Callable[[bytes], bytes], message: str, finished_run: RunFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(finished_run.adapter, folder)
    shutil.copytree(finished_run.tokenizer, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    result = CliRunner().invoke(cli, ["infer", "Hi", f"inference.adapter={folder}"])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert re.search(message, said), said


@pytest.mark.parametrize("command", ["validate", "train"])
def test_a_run_is_never_written_over(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "outputs/experiments/default/runs/mine"
    (there / "metadata").mkdir(parents=True)
    (there / "metadata/summary.json").write_text('{"status": "finished"}')
    result = CliRunner().invoke(cli, [command, *rows()(tmp_path), "output.run_id=mine"])
    assert result.exit_code == 2 and "the run 'mine' exists already" in " ".join(result.output.split())
    assert [path.name for path in there.rglob("*")] == ["metadata", "summary.json"]


class Hub(BaseHTTPRequestHandler):
    """The part of a hub that says no: nothing is there, and one repository is gated."""

    def do_HEAD(self) -> None:
        gated = "gated" in self.path
        self.send_response(200 if self.path == "/" else 403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to it is restricted." if gated else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.id=nobody/nothing", r"model\.id: 'nobody/nothing' is not a local folder.*check the id"),
        ("model.id=somebody/gated", r"model\.id: 'somebody/gated' .*gated"),
        ("data.train=hub:nobody/nothing", r"data\.train: 'hub:nobody/nothing' cannot be had"),
    ],
)
def test_missing_and_gated_hub_ids_say_what_to_check(
    hub: str, given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    use_hub(hub, monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)  # else it asks the real one again and again
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["validate", *rows()(tmp_path), given])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), said
    assert re.search(message, said), said
    assert_nothing_half_written(tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_is_marked(tmp_path: Path) -> None:
    """On a real file system of 3 MB, which the checkpoints overflow."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting needs unshare with user namespaces")
    small = tmp_path / "small"
    small.mkdir()
    arguments = [*rows()(tmp_path), f"output.base_output_dir={small}", "peft.r=64", "training.lr=1e-3"]
    script = (
        f"mount -t tmpfs -o size=3m tmpfs {small} && {sys.executable} -m training_lens train {' '.join(arguments)}; "
        f"code=$?; cat {small}/experiments/default/runs/*/metadata/summary.json; find {small} -name '.tmp-*'; exit $code"
    )
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "No space left" in " ".join(result.stderr.split()), result.stderr
    assert '"status": "failed"' in result.stdout and ".tmp-" not in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["experiment", "show", "~nobody-here/run"],
        ["sync", "~nobody-here"],
        ["validate", "data.train=~nobody-here/rows.jsonl"],
        ["validate", "model.id=~nobody-here/model"],
        ["infer", "hello", "inference.adapter=~nobody-here/adapter"],
        ["report", "~nobody-here"],
        ["train", "--config", "~nobody-here/config.yaml"],
        ["train", "peft.from_adapter=~nobody-here/adapter"],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_a_path_that_is_not_there(call: Callable[..., Any], words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code in (1, 2) and "~nobody-here" in result.stderr
