"""Which modules an adapter leaves out, and why: some cannot be adapted, and `auto` does not choose others.

Every matrix of a model is adapted, is the embedding or the output head, or is listed here with a reason.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from training_lens.models.model_classes import decoder_of
from training_lens.utils.resource_errors import raise_out_of_memory

ROUTER = re.compile(r"(?:^|\.)(?:gate|router|\w*expert\w*_gate)(?:\.|$)")
SHAPE_ONLY = {"data", "device", "dtype", "element_size", "ndim", "shape", "size"}

NOT_LANGUAGE = "not in the language model, but in a vision or audio tower or its projector"
OF_ROUTER = "routers and gates of experts stay as they were trained"
OF_CROSS_ATTENTION = "cross-attention to images, which text alone never reaches"
OF_EXPERTS = "experts stay frozen"
OF_PARAMETERS = "not a linear layer"


@dataclass(frozen=True)
class Omission:
    """The paths of modules that are not adapted, and the reason."""

    reason: str
    modules: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The last parts of the paths, sorted, without numbers of layers and experts."""
        return sorted({last_part(path) for path in self.modules})

    def __str__(self) -> str:
        return f"{', '.join(self.names)} ({len(self.modules)}): {self.reason}"


def last_part(path: str) -> str:
    """The name of a module or parameter within its parent, with the parent's if it is only a number."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


class ModuleSurvey:
    """The modules of a base, with or without weights, and the reasons why they are not adapted."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.modules = dict(model.named_modules())
        self._ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        decoder = decoder_of(model)
        self._decoder = next(path for path, m in self.modules.items() if m is decoder)
        self._refusals: dict[str, str] = {}

    @cached_property
    def loses_expressions(self) -> bool:
        """Whether PEFT replaces a regular expression by the last names of its matches, whatever their layer."""
        from peft import LoraConfig

        lora_config = LoraConfig(target_modules="a_pro[b]e", r=1)
        _adapt_probe(self._model.config, "a_probe", lora_config)
        return not isinstance(lora_config.target_modules, str)

    @cached_property
    def linear_layers(self) -> dict[str, nn.Module]:
        """Paths and modules of every linear layer except the output head."""
        return {path: m for path, m in self.modules.items() if is_linear(m) and id(m) not in self._ends}

    def why_unfit(self, path: str) -> str:
        """Why no adapter works on the linear layer at `path`, even if configured by name; otherwise ''."""
        owner, _, name = path.rpartition(".")
        module, parent = self.modules[path], self.modules[owner]
        if not gives_one_tensor(module):
            return f"a {type(module).__name__} computes more than a linear layer"
        if name in weights_read_by(parent):
            return f"a {type(parent).__name__} reads the weight itself, past any adapter"
        if is_rescaled(self._model.config, path):
            return "RWKV divides this weight, and no adapter on it, when it goes from training to answering"
        if name not in self._refusals:
            self._refusals[name] = refusal_of_peft(self._model.config, name)
        return self._refusals[name]

    def why_not_auto(self, path: str) -> str:
        """Why `auto` does not choose the linear layer at `path`, though it could be adapted; otherwise ''."""
        if reason := self._why_not_language(path):
            return reason
        parts = path.split(".")
        parents = [self.modules[".".join(parts[:length])] for length in range(1, len(parts))]
        return OF_CROSS_ATTENTION if any("CrossAttention" in type(m).__name__ for m in parents) else ""

    def other_matrices(self) -> Iterator[tuple[str, str]]:
        """Paths of other modules with a matrix (no linear layer, embedding or head), and why they are not adapted."""
        for path, module in self.modules.items():
            has_matrix = any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(recurse=False))
            if not has_matrix or is_linear(module) or isinstance(module, nn.Embedding):
                continue
            is_of_experts = "expert" in f"{path}{type(module).__name__}".lower()
            yield path, self._why_not_language(path) or (OF_EXPERTS if is_of_experts else OF_PARAMETERS)

    def _why_not_language(self, path: str) -> str:
        if self._decoder and not path.startswith(f"{self._decoder}."):
            return NOT_LANGUAGE
        return OF_ROUTER if ROUTER.search(path) else ""


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer: torch's, bitsandbytes' subclasses of it, or GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_rescaled(config: Any, path: str) -> bool:
    """Whether a model rescales the weights at `path` for inference, as RWKV does to stay within float16."""
    every = getattr(config, "rescale_every", 0)
    found = re.search(r"\.(\d+)\.(?:attention\.output|feed_forward\.value)$", path)
    return bool(every and found and int(found[1]) >= every)


def gives_one_tensor(layer: Any) -> bool:
    """Whether a linear layer returns one tensor of its outputs: some are routers, and return the choices too."""
    if type(layer).forward is nn.Linear.forward or not type(layer).__module__.startswith("transformers.models"):
        return True
    try:
        result = layer(layer.weight.new_zeros(1, layer.in_features))
    except (TypeError, ValueError, RuntimeError) as error:
        raise_out_of_memory(error)
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, layer.out_features)


def _adapt_probe(config: Any, name: str, lora_config: Any) -> Any:
    """PEFT's model around one linear layer of this name, of the model type that `config` has.

    It is on the meta device, so it draws no random numbers.
    """
    from peft.tuners.lora import LoraModel

    probe: Any = nn.Module()
    with torch.device("meta"):
        probe.add_module(name, nn.Linear(1, 1))
        probe.config = config
        return LoraModel(probe, lora_config, "default")


def refusal_of_peft(config: Any, name: str) -> str:
    """Why PEFT does not adapt linear layers of this name in models of this type, found by trying; otherwise ''.

    PEFT forbids some names, and takes others for the experts of a mixture, whose modules had these names in
    transformers 4. It would adapt those, and leave the layer out.
    """
    from peft import LoraConfig

    try:
        if _adapt_probe(config, name, LoraConfig(target_modules=[name], r=1)).targeted_module_names == [name]:
            return ""
    except ValueError as error:
        if "incompatible" in str(error):
            return f"PEFT forbids this name in models of type {config.model_type}"
    return f"in models of type {config.model_type}, PEFT takes this name to mean the experts"


def weights_read_by(parent: nn.Module) -> frozenset[str]:
    """The names of children whose weight a state-space layer (one with a convolution) reads in its own code.

    Its fused CUDA kernels take `self.out_proj.weight` where the plain code calls `self.out_proj(x)`, so an adapter
    there has no effect, or only on some machines. Other layers read weights only for their dtype.
    """
    has_convolution = any(isinstance(child, nn.Conv1d) for child in parent.children())
    kind: Any = type(parent)
    return _weights_read(kind) if has_convolution else frozenset()


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, SyntaxError):  # no source: a class made at run time
        return frozenset()
    methods = [m for m in ast.walk(tree) if isinstance(m, ast.FunctionDef) and "init" not in m.name]
    nodes = [node for method in methods for node in ast.walk(method)]
    looked_at = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in SHAPE_ONLY}
    weights = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == "weight" and id(n) not in looked_at]
    return frozenset(node.value.attr for node in weights if isinstance(node.value, ast.Attribute))


def group_by_reason(found: dict[str, str]) -> tuple[Omission, ...]:
    """Omissions from paths and their reasons, one for each reason."""
    reasons = sorted(set(found.values()))
    return tuple(Omission(reason, tuple(p for p, r in found.items() if r == reason)) for reason in reasons)
