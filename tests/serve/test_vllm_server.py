"""The command of vLLM has what the models need, and what vLLM would read wrongly is named before it starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from api_server import PEFT
from forked import fork, fork_command

from training_lens import TrainingConfig
from training_lens.inference.session import Session
from training_lens.serve.server_limits import ServerLimits
from training_lens.serve.vllm_server import VllmModel, build_command, find_obstacles, run_vllm


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `vllm` that writes how it was called, in front of the path."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    script = "import json, os, sys; json.dump([sys.argv[1:], os.environ.get('VLLM_API_KEY')], open('called.json', 'w'))"
    program.write_text(f"#!{sys.executable}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def read_model(sessions: dict[str, Session], name: str, tokenizer: Path) -> VllmModel:
    """A run's adapter, as if it had been trained by a chat template without domains."""
    config = sessions[name].config.replace_keys(data={"template": "chat"})
    return VllmModel(name, config, sessions[name].adapter, tokenizer)


@pytest.fixture
def tokenizer(tmp_path: Path, tiny_base: Path) -> Path:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_the_command_has_every_adapter_and_the_template(
    sessions: dict[str, Session], tokenizer: Path, vllm: Path, tiny_base: Path
) -> None:
    model = read_model(sessions, "lora", tokenizer)
    assert find_obstacles([model], has_gpu=True) == []
    command = build_command([model], "base", "127.0.0.1", 8000, ServerLimits(rows=12))
    assert command[:3] == ["vllm", "serve", str(tiny_base)]
    options = " ".join(command)
    for expected in (
        "--served-model-name base --host 127.0.0.1 --port 8000 --max-num-seqs 12",
        f"--tokenizer {tokenizer} --chat-template {tokenizer / 'chat_template.jinja'}",
        f"--enable-lora --max-loras 1 --max-lora-rank 8 --lora-modules lora={model.adapter}",
        "--dtype float32",
        "--allowed-origins []",
    ):
        assert expected in options


def test_what_vllm_would_read_wrongly_is_named(
    sessions: dict[str, Session], outputs: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    models = [read_model(sessions, name, tokenizer) for name in PEFT]
    output = {"base_output_dir": str(outputs)}
    run = str(Path(sessions["lora"].source))
    settings = TrainingConfig.model_validate({"inference": {"adapter": run}, "output": output})
    found = "\n".join(find_obstacles([*models, VllmModel.from_settings("as trained", settings)], has_gpu=False))
    for reason in (
        "there is no CUDA GPU here",
        "vllm is not installed",
        "'dora': it is a DoRA",
        "'whole': it has modules that are trained whole",
        "'as trained': vLLM cannot render its template (alpaca)",
        "'as trained': its prompts begin with a domain",
    ):
        assert reason in found
    assert "'lora'" not in found


def test_vllm_takes_the_place_of_the_process_and_gets_the_key_by_its_environment(tmp_path: Path, vllm: Path) -> None:
    def start() -> None:
        os.chdir(tmp_path)
        run_vllm(["vllm", "serve", "a model"], "sk-secret")

    process = fork(start)
    process.join(20)
    assert process.exitcode == 0
    assert json.loads((tmp_path / "called.json").read_text()) == [["serve", "a model"], "sk-secret"]


def test_where_vllm_is_asked_for_and_cannot_serve_all_reasons_are_given(tmp_path: Path, outputs: Path) -> None:
    process = fork_command(
        tmp_path, "serve", "dora", "--engine", "vllm", "--queue", "3", f"output.base_output_dir={outputs}"
    )
    process.join(30)
    error = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 2 and "no CUDA GPU" in error and "'dora': it is a DoRA" in error
    assert "only our own server takes --queue" in error and "--timeout" not in error
