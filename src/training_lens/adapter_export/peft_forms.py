"""The two forms in PEFT's format: the adapter as it is, and a plain LoRA that any loader reads correctly."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from training_lens.adapter_export.folded_lora import FoldedModule, pad_to_one_rank, short_target_names
from training_lens.adapter_export.update_checks import check_copies, check_updates
from training_lens.inference.session import Session
from training_lens.merging.verification import MergeCheck, Probes, Reference, Verification, verify_folder
from training_lens.merging.weight_update import PREFIX, LowRankUpdate, load_updates
from training_lens.models.adapter_files import CONFIG, WEIGHTS, read_config
from training_lens.models.adapter_scale import scale_adapter
from training_lens.models.adapters import save_adapter
from training_lens.models.base_files import save_tokenizer
from training_lens.models.base_record import require_local_folder
from training_lens.models.factory import read_facts
from training_lens.models.location import locate_model
from training_lens.models.model_classes import public_class
from training_lens.models.quantization import loading_options
from training_lens.utils.files import write_json


@dataclass(frozen=True)
class PeftForm:
    """What is written in PEFT's format, and what its checks need once the session is gone."""

    adapter: Path
    scale: float
    modules: Sequence[FoldedModule] | None  # of a plain LoRA; None: the adapter as it is
    quantization: str  # of the base that the adapter computes on
    job: dict[str, Any]  # how the checking process is to load the adapter on its base
    is_resized: bool  # the base got rows for tokens that it lacked

    @staticmethod
    def plan(session: Session, modules: Sequence[FoldedModule] | None, scale: float) -> PeftForm:
        """Keep what the checks need of a session."""
        assert session.adapter is not None
        model = session.config.model
        options = loading_options(model, "fp32")
        job = {
            "is_adapter": True,
            "class": public_class(session.model),
            "base": locate_model(model),
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "quantization": options["quantization_config"].to_dict() if options else None,
            "vocabulary": session.model.config.get_text_config().vocab_size,
            "device": str(session.device),
            "stop_ids": sorted(session.stop_ids),
            "pad_id": session.pad_id,
        }
        is_resized = job["vocabulary"] != read_facts(model).vocabulary
        return PeftForm(session.adapter, scale, modules, model.quantization, job, is_resized)

    def write(self, session: Session, folder: Path) -> None:
        """Write adapter and tokenizer."""
        if self.modules is None:
            write_peft(session, self.scale, folder)
        else:
            write_plain(session, self.modules, folder)
        model = session.config.model
        save_tokenizer(session.tokenizer, folder, require_local_folder(model), model.trust_remote_code)

    def describe_use(self) -> str:
        """How the folder is loaded, as Markdown."""
        name, base = self.job["class"], self.job["base"]
        resize = f"base.resize_token_embeddings({self.job['vocabulary']})\n" if self.is_resized else ""
        return (
            f"```python\nfrom peft import PeftModel\nfrom transformers import {name}\n\n"
            f'base = {name}.from_pretrained("{base}")\n{resize}'
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n```\n'
        )

    @property
    def reads_weights(self) -> bool:
        """False for a scaled adapter that is more than low-rank updates: only its answers are compared."""
        return self.modules is not None or self.scale == 1 or self._is_low_rank

    @property
    def _is_low_rank(self) -> bool:
        updates = load_updates(self.adapter).values()
        return all(isinstance(update, LowRankUpdate) and update.magnitude is None for update in updates)

    def check_file(self, folder: Path) -> tuple[MergeCheck, ...]:
        """Read the written folder back, and compare it with the adapter's own files."""
        if self.modules is None and self.scale == 1:
            return (check_copies(self.adapter, folder, (CONFIG, WEIGHTS)),)
        copies = () if self.modules else (check_copies(self.adapter, folder, (CONFIG,)),)
        if not self.reads_weights:
            return copies
        return (*copies, *check_updates(load_updates(self.adapter), self.scale, load_updates(folder)))

    def compute(self, folder: Path, given: Probes, wanted: Reference) -> tuple[Verification | None, str]:
        """What plain transformers and PEFT compute with the folder, in a fresh process."""
        return verify_folder(folder, given, wanted, "fp32", self.quantization, self.job), ""


def write_peft(session: Session, scale: float, folder: Path) -> None:
    """The adapter's two files, copied; with a scale, saved again by PEFT with the update multiplied."""
    assert session.adapter is not None
    if scale != 1:
        scale_adapter(session.model, scale)
        save_adapter(session.model, folder)
    copied = (CONFIG,) if scale != 1 else (CONFIG, WEIGHTS)
    for name in copied:
        shutil.copyfile(session.adapter / name, folder / name)


def write_plain(session: Session, modules: Sequence[FoldedModule], folder: Path) -> None:
    """A LoRA of one rank whose alpha is that rank, so that alpha / r is 1 for every loader, in float32."""
    padded = pad_to_one_rank(modules)
    tensors: dict[str, Tensor] = {}
    for module in padded:
        a, b = ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module.path}.{a}": module.a, f"{PREFIX}{module.path}.{b}": module.b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, _plain_config(session, padded), verbatim=True)


def _plain_config(session: Session, modules: Sequence[FoldedModule]) -> dict[str, Any]:
    """Every key that a loader may read, also those at PEFT's defaults, so that none is guessed."""
    assert session.adapter is not None
    own, rank = read_config(session.adapter), modules[0].rank
    everything = [path for path, _ in session.model.get_base_model().named_modules() if path]
    originals = [path for path in everything if ".base_layer" not in path and ".lora_" not in path]
    config = {
        "peft_type": "LORA",
        "task_type": own.get("task_type"),
        "base_model_name_or_path": own.get("base_model_name_or_path") or locate_model(session.config.model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": short_target_names([module.path for module in modules], originals),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return config | ({"fan_in_fan_out": True} if own.get("fan_in_fan_out") else {})
