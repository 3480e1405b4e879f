"""What a person types besides settings: --version, completion, files of init, names of runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training_lens import __version__
from training_lens.cli.common import print_table
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.training.loop.callbacks import progress_columns
from training_lens.utils.files import write_json

Call = Callable[..., Result]


def test_the_help_groups_commands_by_what_a_person_does(call: Call) -> None:
    page = call("--help").stdout
    places = [page.index(f"─ {panel} ─") for panel in ("Data", "Train", "Evaluate", "Look inside", "Ship", "Runs")]
    assert places == sorted(places) and "─ Commands ─" not in page


@pytest.mark.parametrize("command", ["analyze", "merge", "infer", "prepare", "init"])
def test_json_and_debug_are_the_last_options_of_every_command(call: Call, command: str) -> None:
    lines = call(command, "--help").stdout.splitlines()
    options = [line.split()[1] for line in lines if line.startswith(("│ --", "│ *  --"))]
    assert options[-3:] == ["--json", "--debug", "--help"]


def test_version_help_and_completion_need_no_torch(call: Call) -> None:
    assert call("--version").stdout == f"training-lens {__version__}\n"
    assert "--install-completion" in call("--help").stdout
    assert "--config" in call("train", "--help").stdout and "--from" in call("prepare", "--help").stdout
    code = (
        "import os, sys\n"
        "os.environ |= {'_TRAINING_LENS_COMPLETE': 'complete_bash', 'COMP_CWORD': '1'}\n"
        "os.environ['COMP_WORDS'] = 'training-lens tr'\n"
        "from training_lens.cli import cli\n"
        "try:\n    cli(prog_name='training-lens')\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["train"], result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "a.yaml", "--from", "axoltl"], "Did you mean 'axolotl'?"),
        (["train", "--from", "hf"], "--from hf says how --config FILE is read; give --config FILE, too."),
        (["experiment", "list", "--output.base_output_dir=x"], "Did you mean output.base_output_dir=x?"),
        (["experiment", "list", "first"], "'first' is no override; write key=value"),
        (["infer", "--inference.temperature", "1"], "Did you mean inference.temperature=1?"),
        (["train", "--config", "a.yaml", "--config", "b.yaml"], "--config b.yaml: cannot be read"),
    ],
)
def test_options_that_were_meant_otherwise(call: Call, arguments: list[str], message: str) -> None:
    Path("a.yaml").write_text("")
    result = call(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train', 'rank'? training-lens --help says"),
        (["experiment", "lst", "--json"], "Did you mean 'list'? training-lens experiment --help says"),
        (["train", "--jsn"], "No such option: --jsn (Possible options: --json"),
        (["--jsn"], "No such option: --jsn"),
        (["push"], "Missing argument 'RUN'. training-lens push --help says"),
        (["report", "--kind", "long"], "Invalid value for '--kind': 'long' is not one of 'executive'"),
    ],
)
def test_wrong_words_are_refused_in_one_paragraph(call: Call, arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_the_run_that_answers_is_named_on_standard_error(call: Call) -> None:
    for experiment, run_id in (("b", "20260101T000000Z-aaaa"), ("a", "20260102T000000Z-bbbb")):
        run = RunFolder(runs_folder("outputs", experiment) / run_id).create()
        write_json(run.metadata / "summary.json", {"status": "finished"})
        write_json(run.metadata / "config.json", {})
    for reference, meant in (("latest", "bbbb of experiment a"), ("b", "aaaa of experiment b")):
        for arguments in (["infer", "?", "--run", reference], ["merge", "--run", reference]):
            result = call(*arguments)  # no adapter is there: it is said which run lacks one
            assert result.exit_code == 1 and meant.split()[0] in result.stderr
        synced = call("sync", reference, "--status")
        assert meant in synced.stderr and meant not in synced.stdout
    named = call("sync", "--status", "output.experiment_name=b")
    assert "aaaa of experiment b" in named.stderr


def test_what_init_writes_is_a_config_for_prepare(call: Call, write_rows: Callable[..., Path]) -> None:
    rows = [{"question": f"Box {i}?", "answer": f"In {i}."} for i in range(30)]
    name = write_rows(rows, "rows (1).jsonl").name
    assert call("init", "--train", name).exit_code == 0
    result = call("prepare", "--config", "config.yaml")
    assert result.exit_code == 0, result.stderr
    assert "train on it: training-lens train --config config.yaml" in result.stdout
    assert "data.val_ratio=0" in result.stdout
    assert Path("outputs/data/default/validation.jsonl").read_text().count("\n") == 3
    for command in (["experiment", "list"], ["sync", "latest"], ["analyze"], ["infer", "?"], ["push", "latest", "a/b"]):
        assert "problems in the configuration" not in call(*command, "--config", "config.yaml").stderr


def test_no_table_is_folded_where_a_program_reads() -> None:
    page, long = StringIO(), "a path that is longer than a window is wide " * 5
    table = Table("row", "text")
    table.add_row("1", long.strip())
    print_table(Console(file=page, width=80), table)
    assert sum(long.strip() in line for line in page.getvalue().splitlines()) == 1
    assert not any(line.endswith(" ") for line in page.getvalue().splitlines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_keeps_step_loss_and_time_left_in_any_window(width: int) -> None:
    console = Console(width=width, force_terminal=True, color_system=None)
    bars = Progress(*progress_columns(width), console=console)
    bars.add_task("training", total=1000, completed=500, status="loss 12.345", speed="123,456 tokens/s")
    with console.capture() as captured:
        console.print(bars.get_renderable())
    (line,) = captured.get().rstrip().splitlines()
    assert "500/1000" in line and "loss 12.345" in line and "ETA" in line and "-:--:--" in line
    assert ("tokens/s" in line) == (width > 60) and len(line.rstrip()) <= width
