"""The GGUF forms: an adapter beside a base in GGUF, and the whole merged model; for llama.cpp and Ollama."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.adapter_export.folded_lora import FoldedModule
from training_lens.adapter_export.gguf_checks import (
    NO_LLAMA,
    LlamaJob,
    check_gguf_weights,
    compute_in_llama_cpp,
)
from training_lens.adapter_export.gguf_files import (
    ADAPTER,
    MODEL,
    Kind,
    read_gguf_adapter,
    write_gguf_adapter,
    write_gguf_model,
)
from training_lens.adapter_export.gguf_tensors import GgufNames
from training_lens.adapter_export.gguf_tokenizer import StopTokens, tokenizer_values
from training_lens.adapter_export.modelfile import write_modelfile
from training_lens.adapter_export.other_programs import is_installed
from training_lens.adapter_export.update_checks import check_updates
from training_lens.config.schema import ModelSection
from training_lens.inference.session import Session
from training_lens.merging.merge_tensors import check_mergeable, merge_weights
from training_lens.merging.verification import MergeCheck, Probes, Reference, Verification
from training_lens.merging.weight_update import list_tied_rows, load_updates
from training_lens.models.base_record import stored_precision
from training_lens.models.factory import load_model
from training_lens.models.quantization import dequantize_model
from training_lens.utils.devices import get_device
from training_lens.utils.files import write_text

KINDS: dict[str, Kind] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
TEXTS = 8  # whose tokens are compared


@dataclass(frozen=True)
class GgufForm:
    """What is written as GGUF, and what its checks need once the session is gone."""

    base: ModelSection
    adapter: Path
    scale: float
    modules: Sequence[FoldedModule]  # none: the whole model is written
    kind: Kind
    config: Any  # of the model
    tokenizer: dict[str, Any]  # the values that describe it
    stop_ids: list[int]
    texts: dict[str, list[int]]
    new_tokens: tuple[str, ...]  # that the base got rows for

    @property
    def is_merged(self) -> bool:
        return not self.modules

    @staticmethod
    def plan(session: Session, modules: Sequence[FoldedModule], scale: float, dtype: str, given: Probes) -> GgufForm:
        """Find out whether llama.cpp has the architecture and the tokenizer, before anything is written.

        Args:
            modules: the adapter's updates; none: they are merged into the weights.
            dtype: of merged weights; 'auto' is that of the base's files.

        Raises:
            AdapterError: it lacks one of the two, or the adapter cannot be merged.
        """
        if not modules:
            check_mergeable(session.model)
        assert session.adapter is not None
        config, base = session.model.config, session.config.model
        GgufNames.find(config)
        kind = KINDS[stored_precision(base)] if dtype == "auto" else dtype
        rows = config.get_text_config().vocab_size
        return GgufForm(
            base=base,
            adapter=session.adapter,
            scale=scale,
            modules=modules,
            kind="f32" if modules else kind,  # type: ignore[arg-type]
            config=config,
            tokenizer=tokenizer_values(session.tokenizer, rows, find_stop_tokens(session))
            | _begin_as_trained(given, session),
            stop_ids=sorted(session.stop_ids),
            texts=_list_texts(session, given),
            new_tokens=tuple(session.config.data.new_tokens),
        )

    def write(self, session: Session, folder: Path) -> None:
        """Write the file. Of a merged one the session's model is used up."""
        source = [f"FROM ./{MODEL}"] if self.is_merged else ["FROM path/to/base.gguf", f"ADAPTER ./{ADAPTER}"]
        write_text(folder / "Modelfile", write_modelfile(session, source))
        if not self.is_merged:
            write_gguf_adapter(session.model.get_base_model(), self.modules, folder / ADAPTER)
            return
        merged = merge_weights(session.model, self.scale).model
        write_gguf_model(merged, self.tokenizer, self.kind, folder / MODEL, self._name)

    def describe_use(self) -> str:
        """How the file is used, as Markdown."""
        if self.is_merged:
            return f"```\nllama-cli -m {MODEL}\n```\n"
        return (
            "For the base as GGUF, of any kind of weights that llama.cpp has:\n\n"
            f"```\nllama-cli -m path/to/base.gguf --lora {ADAPTER}\n```\n"
        )

    @property
    def _name(self) -> str:
        """A name without 'phi3': llama.cpp expects Phi-3's own tokens in a model of that name."""
        name = Path(self.base.id).name
        has_tokens = "<|endoftext|>" in self.tokenizer["tokenizer.ggml.tokens"]
        return name if has_tokens or "phi" not in name.lower() else "model"

    @property
    def reads_weights(self) -> bool:
        return True

    def check_file(self, folder: Path) -> tuple[MergeCheck, ...]:
        """Read the file back, and compare it with the adapter's own files in float64."""
        updates = load_updates(self.adapter)
        if self.is_merged:
            base = self._load_base()
            updates |= list_tied_rows(updates, base.state_dict())
            return check_gguf_weights(folder / MODEL, base, updates, self.scale, self.kind)
        return check_updates(updates, self.scale, read_gguf_adapter(self.config, folder / ADAPTER, self.modules))

    def _load_base(self) -> Any:
        return dequantize_model(load_model(self.base, get_device("cpu"), "fp32", self.new_tokens))

    def compute(self, folder: Path, given: Probes, wanted: Reference) -> tuple[Verification | None, str]:
        """What llama.cpp computes with the file, and why it does not where it cannot be called here.

        An adapter is tried on its base as GGUF in float32, which is written for that and removed.
        """
        if not is_installed("llama_cpp"):
            return None, NO_LLAMA
        if self.is_merged:
            job = LlamaJob(folder / MODEL, None, self.stop_ids, self.texts)
            return compute_in_llama_cpp(job, given, wanted, self.kind), ""
        with tempfile.TemporaryDirectory(prefix="training-lens-gguf-") as place:
            base = Path(place) / MODEL
            write_gguf_model(self._load_base(), self.tokenizer, "f32", base, self._name)
            job = LlamaJob(base, folder / ADAPTER, self.stop_ids, self.texts)
            return compute_in_llama_cpp(job, given, wanted, "f32"), ""


def find_stop_tokens(session: Session) -> StopTokens:
    """The tokenizer's own stop token, and the one that ends a turn in training, if that is another."""
    eos = session.encoder.eos_id
    others = sorted(session.stop_ids - {eos})
    return StopTokens(eos, others[0] if others else None)


def _begin_as_trained(given: Probes, session: Session) -> dict[str, bool]:
    """Whether llama.cpp puts the first token before a prompt: if training's prompts begin with it."""
    begins = [ids[0] == session.tokenizer.bos_token_id for ids, _ in given.prompts]
    return {"tokenizer.ggml.add_bos_token": all(begins)} if begins else {}


def _list_texts(session: Session, given: Probes) -> dict[str, list[int]]:
    """Texts of the rows, and the tokens that they are split into where none stands for a special token."""
    added = session.tokenizer.added_tokens_decoder  # beside which a tokenizer may add or drop blanks
    plain = [[i for i in ids if i not in added] for ids in given.rows[:TEXTS]]
    texts = [session.tokenizer.decode(ids) for ids in plain]
    split = {"add_special_tokens": False, "split_special_tokens": True}
    return {text: session.tokenizer(text, **split).input_ids for text in texts if text}
