"""Adapters of a mixture's experts, which a layer keeps in one parameter, through PEFT's `target_parameters`.

A parameter (experts, out, in) holds the matrix W_e of every expert e, and its adapter adds s B_e A_e to each. PEFT
keeps the factors of all of them in two matrices: A (experts x rank, in), where an expert has `rank` neighbouring rows,
and B (out, rank x experts), where it has every `experts`-th column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.models.omissions import OF_EXPERTS, ModuleSurvey, last_part
from training_lens.utils.formatting import did_you_mean

Parameters = dict[str, nn.Parameter]
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
BASE_LAYER = ".base_layer"  # what PEFT puts between two parameters of one module


def find_expert_parameters(model: Any) -> Parameters:
    """Paths and parameters of the language model that hold the matrices of several experts."""
    survey = ModuleSurvey(model)
    owners = [path for path, reason in survey.other_matrices() if reason == OF_EXPERTS]
    named = (
        (f"{owner}.{name}", parameter)
        for owner in owners
        for name, parameter in survey.modules[owner].named_parameters(recurse=False)
    )
    return {path: p for path, p in named if p.ndim == 3 and p.is_floating_point()}


def choose_parameters(model: Any, peft: PeftSection) -> Parameters:
    """The parameters of experts that `peft.target_parameters` matches in this model.

    Raises:
        AdapterError: a name or expression without a match, or a kind of adapter that experts cannot have.
    """
    whole = [f"{name}." for name in peft.modules_to_save]
    found = {p: w for p, w in find_expert_parameters(model).items() if not any(f".{n}" in f".{p}" for n in whole)}
    is_auto = peft.target_parameters == "auto"
    named_alone = is_auto and peft.target_modules != "auto"  # naming modules leaves out all others
    chosen = {} if named_alone else _match_parameters(found, peft.target_parameters)
    if chosen:
        _require_plain_lora(peft)
        for path, parameter in chosen.items():
            _check_rank(path, parameter, _rank_of(path, model, peft))
    elif peft.expert_rank is not None:
        raise AdapterError(
            "peft.expert_rank: no experts in one parameter are adapted. Leave it out, or take experts in with "
            "peft.target_parameters=auto."
        )
    return chosen


def _match_parameters(found: Parameters, wanted: str | list[str]) -> Parameters:
    if wanted in ("none", []):
        return {}
    if wanted == "auto":
        return found
    if isinstance(wanted, str):
        try:
            matching = {path: p for path, p in found.items() if re.fullmatch(wanted, path)}
        except re.error as error:
            raise AdapterError(f"peft.target_parameters: '{wanted}' is not a regular expression ({error}).") from error
        missing = [] if matching else [wanted]
    else:
        matching = {path: p for path, p in found.items() if any(f".{path}".endswith(f".{name}") for name in wanted)}
        missing = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in matching)]
    if missing:
        names = sorted({_short_name(path) for path in found})
        there = f"There are {', '.join(names)}" if names else "This model has none"
        raise AdapterError(
            f"peft.target_parameters: no parameter of experts is called '{missing[0]}'."
            f"{did_you_mean(missing[0], ['auto', 'none', *names])} {there}; linear layers belong to "
            "peft.target_modules."
        )
    return matching


def _require_plain_lora(peft: PeftSection) -> None:
    refused = {
        "peft.lora_dropout": (
            peft.lora_dropout > 0,
            "drops inputs of a layer, and the update of experts is added to their weight",
        ),
        "peft.use_dora": (peft.use_dora, "is not supported by PEFT for experts in one parameter"),
        "peft.init=pissa": (peft.init == "pissa", "needs a linear layer, and experts here are slices of a parameter"),
    }
    if key := next((key for key, (is_set, _) in refused.items() if is_set), None):
        raise AdapterError(
            f"{key}: {refused[key][1]}. Leave it out; or leave the experts frozen with peft.target_parameters=none."
        )


def _check_rank(path: str, parameter: nn.Parameter, rank: int) -> None:
    most = min(parameter.shape[1:])
    if rank > most:
        raise AdapterError(
            f"peft.expert_rank: rank {rank} is more than an expert of '{path}' can have, whose matrix is "
            f"{' x '.join(map(str, parameter.shape[1:]))}; give at most {most}."
        )


def experts_per_token(config: Any) -> int:
    """How many experts of a layer compute each token; 1 where the configuration does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in PER_TOKEN)
    return max([count for count in found if isinstance(count, int)], default=1)


def choose_expert_rank(config: Any, peft: PeftSection) -> int:
    """The rank of each expert's adapter: `peft.expert_rank`, or r / experts per token, at least 1.

    A token then passes through as much rank as in a dense layer of rank r, and the share of the experts' parameters
    that trains is about that of the other layers ("LoRA Without Regret", Thinking Machines 2025).
    """
    return peft.expert_rank or max(1, peft.r // experts_per_token(config))


def _rank_of(path: str, model: Any, peft: PeftSection) -> int:
    """The rank of the experts in a parameter, with peft.rank_pattern."""
    found = (rank for key, rank in peft.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, choose_expert_rank(model.config, peft))


@dataclass(frozen=True)
class ExpertTargets:
    """What PEFT is given for experts: `names` of their parameters, and a rank pattern that begins with the user's."""

    names: list[str]
    rank_pattern: dict[str, int]


def describe_targets(model: Any, chosen: Mapping[str, nn.Parameter], peft: PeftSection) -> ExpertTargets:
    """The shortest names that match only these parameters, and the pattern that gives them their rank."""
    others = [path for path, _ in model.named_parameters() if path not in chosen]
    is_taken = {name: any(f".{path}".endswith(f".{name}") for path in others) for name in map(_short_name, chosen)}
    names = sorted({path if is_taken[_short_name(path)] else _short_name(path) for path in chosen})
    rank = choose_expert_rank(model.config, peft)
    pattern = {} if rank == peft.r else {re.escape(name): rank for name in names}
    return ExpertTargets(names, {**peft.rank_pattern, **pattern})


def _short_name(path: str) -> str:
    """A parameter's name with its module's, without numbers: experts.down_proj."""
    owner, _, name = path.rpartition(".")
    return f"{last_part(owner)}.{name}"


def target_name(path: str) -> str:
    """What an adapted module is called in a summary: q_proj, experts.down_proj."""
    return _short_name(path) if ".experts." in path and not path.split(".")[-2].isdigit() else last_part(path)


def is_expert_adapter(layer: Any) -> bool:
    """Whether this is PEFT's wrapper of one parameter, which may hold experts."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def adapted_path(path: str, layer: Any) -> str:
    """The path in the base of what PEFT's `layer` at `path` adapts: a module, or a parameter of experts."""
    return f"{path.replace(BASE_LAYER, '')}.{layer.parameter_name}" if is_expert_adapter(layer) else path


def expert_name(parameter: str, expert: int) -> str:
    """The name of one expert of a parameter: model.layers.0.mlp.experts.down_proj[3]."""
    return f"{parameter}[{expert}]"


def order_wrappers(names: Iterable[str]) -> list[str]:
    """Parameters of one module as PEFT wraps them, the innermost first: in the order in which the module has them.

    All mixtures of transformers have the projection back to the model's width last.
    """
    return sorted(names, key=lambda name: ("down" in name, name))


def name_wrappers(paths: Iterable[str], settings: Mapping[str, Any]) -> dict[str, str]:
    """The parameter that each wrapper of experts adapts, by the wrapper's path in an adapter's file.

    Args:
        paths: of all modules that the file has factors of.
        settings: its adapter_config.json.
    """
    levels: dict[str, list[str]] = {}
    for path in paths:
        if not _is_module(path, settings.get("target_modules") or ()):
            levels.setdefault(path.replace(BASE_LAYER, ""), []).append(path)
    found: dict[str, str] = {}
    for module, nested in levels.items():
        named = (name.rpartition(".") for name in settings.get("target_parameters") or ())
        names = {last for owner, _, last in named if f".{module}".endswith(f".{owner}" if owner else "")}
        inner_first = sorted(nested, key=lambda path: -path.count(BASE_LAYER))
        found |= {path: f"{module}.{name}" for path, name in zip(inner_first, order_wrappers(names), strict=False)}
    return found


def _is_module(path: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, path))
    return any(f".{path}".endswith(f".{name}") for name in targets)


def split_a(a: Float[Tensor, "rows in"], experts: int) -> Float[Tensor, "experts rank in"]:
    """The factor A of each expert. A view."""
    return a.reshape(experts, -1, a.shape[-1])


def split_b(b: Float[Tensor, "out columns"], experts: int) -> Float[Tensor, "experts out rank"]:
    """The factor B of each expert. A view."""
    return b.reshape(len(b), -1, experts).permute(2, 0, 1)


def describe_frozen(model: Any, paths: Sequence[str]) -> str:
    """Why the modules at `paths`, which hold experts, are not adapted, with their share of the model's parameters."""
    owned = [p for path in paths for p in model.get_submodule(path).parameters(recurse=False)]
    share = sum(p.numel() for p in owned) / sum(p.numel() for p in model.parameters())
    can_adapt = any(p.ndim == 3 for p in owned)
    way = "peft.target_parameters can take them" if can_adapt else "PEFT adapts only parameters with three dimensions"
    return f"experts stay frozen, {share:.0%} of the model's parameters: {way}"


@dataclass(frozen=True)
class Routing:
    """Which experts of a layer computed which tokens in one forward pass."""

    chosen: Tensor  # (tokens, experts per token), numbers of experts
    weights: Tensor | None  # alike, the router's
    experts: int  # of the layer, with those that compute nothing (LongCat's identity experts)


def read_routing(module: nn.Module, args: Sequence[Any]) -> Routing | None:
    """The routing from the arguments of a module of experts, in transformers' order; None if they do not show it."""
    if len(args) < 2 or not isinstance(args[1], Tensor) or args[1].is_floating_point() or args[1].ndim != 2:
        return None
    weights = args[2] if len(args) > 2 and isinstance(args[2], Tensor) and args[2].shape == args[1].shape else None
    experts = max(len(p) for p in module.parameters() if p.ndim == 3)
    return Routing(args[1].detach(), None if weights is None else weights.detach(), experts)


def expert_modules(model: Any) -> dict[str, nn.Module]:
    """Paths in the base, and the modules that hold experts in one parameter, without PEFT's wrappers."""
    found = {}
    for path, module in model.named_modules():
        is_experts = "expert" in f"{path}{type(module).__name__}".lower() and not is_expert_adapter(module)
        if is_experts and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            found[path.replace(BASE_LAYER, "").removeprefix("base_model.model.")] = module
    return found


@contextmanager
def watch_routing(model: Any, watch: Callable[[str, Routing, Any], None]) -> Iterator[None]:
    """In the block, `watch` gets the path, the routing and the output of each module of experts at each pass."""
    handles = []

    def build_hook(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if routing := read_routing(module, [*args, *kwargs.values()]):
                watch(path, routing, output)

        return hook

    try:
        for path, module in expert_modules(model).items():
            handles.append(module.register_forward_hook(build_hook(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_routed(routing: Routing, counted: Tensor | None = None) -> Float[Tensor, " experts"]:
    """How many tokens each expert got, of the choices that `counted` (tokens, experts per token) has. No sync point."""
    chosen = routing.chosen
    each = torch.ones_like(chosen, dtype=torch.float32) if counted is None else counted.float()
    counts = torch.zeros(routing.experts + 1, device=chosen.device)  # the last one: choices of no expert
    return counts.index_add_(0, chosen.clamp(0, routing.experts).flatten(), each.flatten())[: routing.experts]
