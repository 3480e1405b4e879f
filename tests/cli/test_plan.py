"""`training-lens plan`: its sums, the line that starts the run, and what it says where nothing fits."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from slow_cases import slow_but  # type: ignore[import-not-found]

Call = Callable[..., Result]
PAGE = (Path(__file__).parents[2] / "docs/plan.md").read_text(encoding="utf-8")
PRINTED = dict(re.findall(r"^(?:```|~~~)\n\$ training-lens (plan .+)\n((?:.*\n)*?)(?:```|~~~)$", PAGE, re.MULTILINE))


def read_result(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_terms_add_up_and_the_proposal_starts_the_run(call: Call) -> None:
    asked = ["plan", "--shape", "llama-8b", "--device", "l4-24", "--devices", "4", "peft.r=8", "model.seq_len=4096"]
    result = call(*asked, "--json")
    found = read_result(result)
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert [cost["layout"] for cost in found["layouts"]] == [
        "replicated",
        "sharded",
        "replicated 4-bit",
        "sharded 4-bit",
    ]
    for cost in found["layouts"]:
        assert sum(term["bytes"] for term in cost["memory"]) == cost["total_bytes"]
        assert all(term["arithmetic"] and term["basis"] for term in cost["memory"])
    assert [cost["fits"] for cost in found["layouts"]] == [False, True, True, True]
    settings = "model.id=path/to/model peft.r=8 model.seq_len=4096 training.gradient_checkpointing=true"
    launch = f"torchrun --nproc-per-node=4 -m training_lens train {settings} distributed.base=sharded"
    assert found["proposal"]["launch"] == launch
    assert launch in call(*asked).output


def test_a_config_is_planned_for_every_device_by_default(call: Call) -> None:
    result = call("plan", "+experiment=default", "--json")
    found = read_result(result)
    assert result.exit_code == 0 and found["model"]["name"] == "embedded" and len(found["devices"]) >= 9
    assert all(device["replicated"]["devices"] == 1 for device in found["devices"])
    table = call("plan", "+experiment=default").output
    assert all(device["device"] in table for device in found["devices"])


def test_one_device_is_started_without_torchrun_and_hosts_are_counted(call: Call) -> None:
    alone = read_result(call("plan", "--device", "t4-16", "--json"))
    assert alone["proposal"]["launch"] == "training-lens train"
    many = read_result(call("plan", "--device", "t4-16", "--devices", "16", "--json"))
    hosts = "--nproc-per-node=8 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=NAME"
    assert many["proposal"]["launch"] == f"torchrun {hosts} -m training_lens train distributed.base=replicated"


def test_where_nothing_fits_it_says_by_how_much_and_what_would(call: Call) -> None:
    result = call("plan", "--shape", "llama-8b", "--device", "t4-16", "--devices", "1", "peft.init=pissa")
    assert result.exit_code == 1
    assert "nothing fits on 1 x t4-16" in result.output and "of each device short" in result.output
    assert "fits on " in result.output and "model.seq_len (now 2,048)" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h100"], "Did you mean 'h100-80'?"),
        (["--shape", "llama8b"], "Did you mean 'llama-8b'?"),
        (["--device", "t4-16", "--devices", "12"], "give a multiple of it"),
        (["training.precision=fp32"], "training.precision"),
        (["model.quantization=8bit"], "model.quantization"),
    ],
)
def test_what_it_cannot_plan_is_refused(call: Call, words: list[str], message: str) -> None:
    result = call("plan", *words)
    assert result.exit_code == 2 and result.stdout == "" and message in result.stderr


def test_what_the_config_decides_is_not_planned_otherwise(call: Call) -> None:
    quantized = read_result(call("plan", "--device", "l4-24", "--devices", "1", "model.quantization=4bit", "--json"))
    assert [cost["layout"] for cost in quantized["layouts"]] == ["replicated 4-bit"]
    assert quantized["proposal"]["launch"] == "training-lens train model.quantization=4bit"
    plain = read_result(call("plan", "--device", "l4-24", "training.gradient_checkpointing=false", "--json"))
    assert not any(cost["is_checkpointed"] for cost in plain["layouts"])


@pytest.mark.parametrize("typed", slow_but(["plan --shape llama-8b"], PRINTED))
def test_the_guide_shows_what_is_printed(call: Call, typed: str) -> None:
    assert call(*shlex.split(typed)).output == PRINTED[typed]
