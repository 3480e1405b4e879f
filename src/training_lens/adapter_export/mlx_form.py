"""An adapter for mlx-lm: factors by the names of its modules, which are those of transformers for these models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from training_lens.adapter_export import mlx_reload
from training_lens.adapter_export.folded_lora import FoldedModule, pad_to_one_rank
from training_lens.adapter_export.model_ends import find_head, has_tied_ends
from training_lens.adapter_export.other_programs import compute_elsewhere, is_installed
from training_lens.adapter_export.update_checks import check_updates
from training_lens.errors import AdapterError
from training_lens.inference.session import Session
from training_lens.merging.verification import MergeCheck, Probes, Reference, Verification, compare_outputs
from training_lens.merging.weight_update import LowRankUpdate, load_updates
from training_lens.models.base_record import require_local_folder
from training_lens.utils.files import read_json, write_json

NO_MLX = "mlx_lm is not installed here: pip install mlx-lm (on Linux with mlx and mlx-cpu), and export again to compare"
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
# Whose layers mlx-lm calls model.layers.N, with the modules in them named as in transformers.
MODEL_TYPES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class MlxForm:
    """What is written for mlx-lm, and what its check needs once the session is gone."""

    adapter: Path
    base: str
    base_folder: Path
    quantization: str  # of the base that the adapter computed on
    stop_ids: list[int]
    scale: float
    layers: int
    modules: Sequence[FoldedModule]

    @staticmethod
    def plan(session: Session, modules: Sequence[FoldedModule], scale: float) -> MlxForm:
        """Keep what is written of a session.

        Raises:
            AdapterError: mlx-lm names this model's modules otherwise, or has one module for both ends of the model.
        """
        assert session.adapter is not None
        model, config = session.model.get_base_model(), session.model.config.get_text_config()
        if config.model_type not in MODEL_TYPES:
            raise AdapterError(
                f"--to mlx: adapters of models of type '{config.model_type}' cannot be written for mlx-lm here; these "
                f"can: {', '.join(MODEL_TYPES)}. --to plain and merge write them for other programs."
            )
        head = find_head(model)
        ends = [module.path for module in modules if module.is_embedding or module.path == head]
        if ends and has_tied_ends(model):
            raise AdapterError(
                f"'{ends[0]}' shares its weight with the model's other end, and mlx-lm has one module for both: an "
                "adapter of one end cannot be written. Merge it: training-lens merge."
            )
        base = session.config.model
        return MlxForm(
            adapter=session.adapter,
            base=base.id,
            base_folder=require_local_folder(base),
            quantization=base.quantization,
            stop_ids=sorted(session.stop_ids),
            scale=scale,
            layers=config.num_hidden_layers,
            modules=pad_to_one_rank(modules),
        )

    def write(self, session: Session, folder: Path) -> None:
        """Write the factors in float32, A as (in, rank) and B as (rank, out), and how mlx-lm is to place them."""
        tensors = {}
        for module in self.modules:
            tensors[f"{module.path}.lora_a"] = module.a.T.contiguous()
            tensors[f"{module.path}.lora_b"] = module.b.T.contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "mlx"})
        keys = sorted({name_in_layer(module.path) for module in self.modules})
        parameters = {"rank": self.modules[0].rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
        config = {
            "fine_tune_type": "lora",
            "model": self.base,
            "num_layers": self.layers,
            "lora_parameters": parameters,
        }
        write_json(folder / CONFIG, config, verbatim=True)

    def describe_use(self) -> str:
        """How the folder is loaded, as Markdown."""
        return f"```\nmlx_lm.generate --model {self.base} --adapter-path path/to/this/folder --prompt TEXT\n```\n"

    @property
    def reads_weights(self) -> bool:
        return True

    def check_file(self, folder: Path) -> tuple[MergeCheck, ...]:
        """Read the folder back, and compare it with the adapter's own files in float64."""
        return check_updates(load_updates(self.adapter), self.scale, read_mlx_updates(folder))

    def compute(self, folder: Path, given: Probes, wanted: Reference) -> tuple[Verification | None, str]:
        """What mlx-lm computes with the folder on its base, in float32 on the CPU."""
        if not is_installed("mlx_lm"):
            return None, NO_MLX
        job = {"model": str(self.base_folder), "adapter": str(folder), "stop_ids": self.stop_ids}
        found = compute_elsewhere("mlx-lm", mlx_reload.__file__, job, given)
        return compare_outputs(found.logits, found.answers, wanted, "fp32", self.quantization), ""


def name_in_layer(path: str) -> str:
    """A module's name as mlx-lm's config has it: within its layer, or whole outside of the layers."""
    within = path.split(".layers.", 1)
    return within[1].split(".", 1)[1] if len(within) == 2 else path


def read_mlx_updates(folder: Path) -> dict[str, LowRankUpdate]:
    """The updates in a folder that `mlx_lm` loads, as its LoRA layers apply them, by names of weights."""
    tensors: dict[str, Any] = load_file(folder / WEIGHTS)
    scale = read_json(folder / CONFIG)["lora_parameters"]["scale"]
    paths = {name.rpartition(".")[0] for name in tensors}
    return {
        f"{p}.weight": LowRankUpdate(tensors[f"{p}.lora_a"].T, tensors[f"{p}.lora_b"].T, scale, None) for p in paths
    }
