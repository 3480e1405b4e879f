"""`vllm serve` in place of our own server: the command for the same models, and the reasons not to use it.

vLLM reads adapters by its own rules. It refuses DoRA, drops keys of an adapter's configuration that it does not know,
such as `rank_pattern`, and renders prompts only by a chat template in Jinja. So every model is checked before vLLM is
started, and every reason why its answers would differ from those of `infer` is named.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.config.run_config import read_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.data.templates import uses_chat_template
from training_lens.models.adapter_files import read_config
from training_lens.models.location import locate_model
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import uses_own_model
from training_lens.serve.server_limits import ServerLimits

PROGRAM = "vllm"
KEY_VARIABLE = "VLLM_API_KEY"  # read by vLLM: a key on the command line could be seen by every user of the machine
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNREAD: Mapping[str, str] = {  # keys of an adapter's configuration
    "use_dora": "it is a DoRA, which vLLM refuses",
    "rank_pattern": "it has a rank_pattern, which vLLM leaves out",
    "alpha_pattern": "it has an alpha_pattern, which vLLM leaves out",
    "modules_to_save": "it has modules that are trained whole, which vLLM refuses",
    "lora_bias": "it has biases, which vLLM refuses",
    "trainable_token_indices": "it has rows of its own for new tokens, which vLLM does not load; merge it",
    "target_parameters": "it adapts parameters of experts, which vLLM leaves out",
}


@dataclass(frozen=True)
class VllmModel:
    """A run or adapter folder as vLLM is to serve it."""

    name: str
    config: TrainingConfig  # of the run; for a bare adapter or the base, the command line's
    adapter: Path | None
    tokenizer: Path | None
    has_domains: bool = False

    @classmethod
    def from_settings(cls, name: str, settings: TrainingConfig) -> VllmModel:
        """What `inference.adapter` names."""
        reference = settings.inference.adapter
        if uses_own_model(reference):
            adapter = Path(reference) if Path(reference).is_dir() else None
            return cls(name, settings, adapter, adapter if adapter and (adapter / "tokenizer.json").is_file() else None)
        run = RunFolder(Path(reference))
        config, domains = read_run_config(run), run.read_metadata("data.json")["domains"]
        is_shown = bool(domains) and config.data.domain.style != "none"
        return cls(name, config, run.served_adapter, run.tokenizer, is_shown)

    @property
    def chat_template(self) -> Path | None:
        """The file of the chat template that rendered training's prompts; None if they were not rendered by one."""
        file = self.tokenizer / "chat_template.jinja" if self.tokenizer else None
        asked = self.config.data.template
        return file if file and file.is_file() and (asked == "auto" or uses_chat_template(asked)) else None

    @property
    def rank(self) -> int:
        return int(read_config(self.adapter)["r"]) if self.adapter else 0

    def find_faults(self) -> Iterator[str]:
        """Why vLLM would give other answers than `infer`."""
        values: Mapping[str, Any] = read_config(self.adapter) if self.adapter else {}
        yield from (f"'{self.name}': {why}" for key, why in UNREAD.items() if values.get(key))
        if self.rank > RANKS[-1]:
            yield f"'{self.name}': its rank is {self.rank}; vLLM takes {RANKS[-1]} at most"
        if self.config.model.quantization == "8bit":
            yield f"'{self.name}': its base is in 8 bits, which vLLM does not load"
        if self.tokenizer and not self.chat_template:
            yield f"'{self.name}': vLLM cannot render its template ({self.config.data.template})"
        if self.has_domains:
            yield f"'{self.name}': its prompts begin with a domain, which vLLM cannot add"


def is_installed() -> bool:
    return shutil.which(PROGRAM) is not None


def find_obstacles(models: Sequence[VllmModel], has_gpu: bool) -> list[str]:
    """Every reason why vLLM cannot serve these models here; empty if it can."""
    found = [] if has_gpu else ["there is no CUDA GPU here"]
    if not is_installed():
        found.append("vllm is not installed: pip install vllm, in an environment of its own if it needs another torch")
    for model in models:
        found += model.find_faults()
    bases = {(model.config.model.id, model.config.model.revision) for model in models}
    if len(bases) > 1:
        found.append(f"the models have {len(bases)} bases: {', '.join(sorted(base for base, _ in bases))}")
    templates = {model.chat_template.read_bytes() for model in models if model.chat_template}
    if len(templates) > 1:
        found.append("the models have different chat templates, and vLLM takes only one")
    return found


def build_command(models: Sequence[VllmModel], base_name: str, host: str, port: int, limits: ServerLimits) -> list[str]:
    """The command, as a list. Each model keeps its name; the base is `base_name`."""
    model = models[0].config.model
    command = [PROGRAM, "serve", locate_model(model), "--served-model-name", base_name]
    command += ["--host", host, "--port", str(port), "--max-num-seqs", str(limits.rows)]
    command += ["--allowed-origins", "[]"]  # vLLM's default lets pages of every site read answers
    command += ["--generation-config", "auto"]  # as here: the model's generation_config.json counts
    dtype = model.dtype if model.dtype != "auto" else models[0].config.training.precision
    command += ["--dtype", DTYPES.get(dtype, "auto")]
    if model.revision:
        command += ["--revision", model.revision]
    if model.trust_remote_code:
        command += ["--trust-remote-code"]
    if model.quantization == "4bit":
        command += ["--quantization", "bitsandbytes"]
    if first := next((one for one in models if one.tokenizer), None):
        command += ["--tokenizer", str(first.tokenizer)]
        command += ["--chat-template", str(first.chat_template)] if first.chat_template else []
    adapters = [one for one in models if one.adapter]
    if adapters:
        rank = next(rank for rank in RANKS if rank >= max(one.rank for one in adapters))
        command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{one.name}={one.adapter}" for one in adapters)]
    return command


def run_vllm(command: Sequence[str], key: str | None) -> None:
    """Replace this process by vLLM: signals reach it directly, and its exit code is this process's. Does not return."""
    environment = dict(os.environ) | ({KEY_VARIABLE: key} if key else {})
    os.execvpe(command[0], list(command), environment)  # noqa: S606 (no shell: a list of our own words)
