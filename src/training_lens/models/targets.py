"""Which modules of a model an adapter targets, and why it cannot target others. Works on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.models.experts import describe_frozen
from training_lens.models.omissions import OF_EXPERTS, ModuleSurvey, Omission, group_by_reason, is_linear
from training_lens.utils.formatting import did_you_mean

Modules = dict[str, torch.nn.Module]


def layer_widths(module: torch.nn.Module) -> tuple[int, int]:
    """Input and output width of a layer; for an embedding its vocabulary and width."""
    for names in (("in_features", "out_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, names[0]):
            return getattr(module, names[0]), getattr(module, names[1])
    raise AssertionError(f"{type(module).__name__} passed the checks and has no sizes")


def find_paths(modules: Iterable[str], name: str) -> list[str]:
    """The paths that `name` matches: itself, or those that end with it after a dot."""
    return [path for path in modules if path == name or path.endswith(f".{name}")]


def choose_targets(
    model: Any, peft: PeftSection, experts: Collection[str] = ()
) -> tuple[str | list[str], tuple[Omission, ...]]:
    """The modules that `peft.target_modules` matches in this model.

    Args:
        experts: the paths of the parameters of experts that are adapted.

    Raises:
        AdapterError: nothing to adapt, or a name or expression without a match; lists the modules and the nearest name.
    """
    survey = ModuleSurvey(model)
    others = {path: reason for path, reason in survey.other_matrices() if not _is_adapted(survey, path, experts)}
    if frozen := [path for path, reason in others.items() if reason == OF_EXPERTS]:
        others |= dict.fromkeys(frozen, describe_frozen(model, frozen))
    if peft.target_modules != "auto":
        return _matching_names(survey, peft.target_modules), group_by_reason({path: others[path] for path in frozen})
    found = {path: survey.why_not_auto(path) or survey.why_unfit(path) for path in survey.linear_layers}
    layers = {path: survey.linear_layers[path] for path, reason in found.items() if not reason}
    narrow = _narrow_layers(model, layers, peft)
    if not layers:
        raise AdapterError("peft.target_modules: the model has no linear layers to adapt.")
    wanted = [path for path in layers if path not in narrow]
    ambiguous = {_last_name(path) for path in set(survey.modules).difference(wanted)}
    names = sorted({path if _last_name(path) in ambiguous else _last_name(path) for path in wanted})
    return names, group_by_reason({path: why for path, why in (found | narrow | others).items() if why})


def _is_adapted(survey: ModuleSurvey, path: str, experts: Collection[str]) -> bool:
    """Whether all matrices of experts that the module at `path` holds are adapted."""
    held = [name for name, p in survey.modules[path].named_parameters(recurse=False) if p.ndim == 3]
    return bool(held) and all(f"{path}.{name}" in experts for name in held)


def _narrow_layers(model: Any, layers: Modules, peft: PeftSection) -> dict[str, str]:
    """Layers with one or two inputs or outputs per head, fewer than the rank, and without a rank pattern.

    The ranks of all other layers are checked later.
    """
    config = model.config.get_text_config().to_dict()
    heads = max([n for key, n in config.items() if "heads" in key and isinstance(n, int)], default=0)
    few = {path: min(layer_widths(m)) for path, m in layers.items() if not pattern_of(path, peft.rank_pattern)}
    reason = f"narrower than the rank {peft.r}; peft.rank_pattern gives them one that fits"
    return {path: reason for path, width in few.items() if width <= 2 * heads and width < peft.r}


def _matching_names(survey: ModuleSurvey, wanted: str | list[str]) -> str | list[str]:
    """The configured names or expression, after checking that modules match."""
    last = sorted({_last_name(path) for path in survey.linear_layers})
    if isinstance(wanted, str):
        pattern = _compile_pattern("peft.target_modules", wanted)
        matches = [path for path in survey.modules if pattern.fullmatch(path)]
        if not matches:
            raise AdapterError(_explain_no_match(wanted, last, next(iter(survey.linear_layers), "")))
        return matches if survey.loses_expressions else wanted
    for name in wanted:
        if not find_paths(survey.modules, name):
            experts = any(reason == OF_EXPERTS for _, reason in survey.other_matrices())
            raise AdapterError(
                f"peft.target_modules: no module is called '{name}'.{did_you_mean(name, last)} "
                f"Linear layers: {', '.join(last)}.{' The experts are no linear layers here.' if experts else ''}"
            )
    return sorted(wanted)


def _explain_no_match(expression: str, last: list[str], example: str) -> str:
    if expression in last:
        return (
            f"peft.target_modules: one text is a regular expression for whole paths such as '{example}', and "
            f"'{expression}' is none; for the layers of that name give [{expression}]."
        )
    return (
        f"peft.target_modules: the regular expression '{expression}' is no module's whole path, such as '{example}'."
        f"{did_you_mean(expression, ['auto', *last])} Linear layers: {', '.join(last)}."
    )


def check_targets(model: Any, targets: Modules, peft: PeftSection, experts: Collection[str] = ()) -> None:
    """Check the modules that PEFT would adapt, besides parameters of `experts` at these paths.

    Raises:
        AdapterError: a module is not a linear layer, or no adapter works on it; a rank is too high; a pattern matches
            nothing.
    """
    if not targets and not experts:
        raise AdapterError("peft.target_modules: all of them are in peft.modules_to_save too; keep each in one.")
    _check_patterns("rank_pattern", peft.rank_pattern, [*targets, *experts])
    _check_patterns("alpha_pattern", peft.alpha_pattern, [*targets, *experts])
    survey = ModuleSurvey(model)
    for path, module in targets.items():
        _check_class(path, module, peft)
        if reason := path in survey.linear_layers and survey.why_unfit(path):
            raise AdapterError(
                f"peft.target_modules: '{path}' cannot be adapted: {reason}. Leave it out; auto takes every layer that "
                "can."
            )
        _check_rank(path, module, peft)


def _check_class(path: str, module: torch.nn.Module, peft: PeftSection) -> None:
    if is_linear(module):
        return
    if not isinstance(module, torch.nn.Embedding):
        raise AdapterError(
            f"peft.target_modules: '{path}' is a {type(module).__name__}; only linear layers can be adapted. "
            f"To train it whole: peft.modules_to_save=[{_last_name(path)}]."
        )
    if peft.use_dora or peft.init == "pissa":
        key = "use_dora" if peft.use_dora else "init=pissa"
        raise AdapterError(
            f"peft.target_modules: '{path}' is an Embedding, and peft.{key} works on linear layers alone. Leave it "
            f"out, or train it whole: peft.modules_to_save=[{_last_name(path)}]."
        )


def _check_rank(path: str, module: torch.nn.Module, peft: PeftSection) -> None:
    pattern = pattern_of(path, peft.rank_pattern)
    rank = peft.rank_pattern[pattern] if pattern else peft.r
    (width_in, width_out), key = layer_widths(module), f"peft.rank_pattern['{pattern}']" if pattern else "peft.r"
    most = min(width_in, width_out)
    if rank > most:
        way = "" if pattern else f", or peft.rank_pattern={{{_last_name(path)}: {most}}}"
        raise AdapterError(
            f"{key}: rank {rank} is more than '{path}' can have, which maps {width_in} to {width_out}; "
            f"give at most {most}{way}."
        )


def pattern_of(path: str, patterns: Mapping[str, float]) -> str | None:
    """The first key of a rank or alpha pattern that matches `path`: as in PEFT, a regular expression for its end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def _check_patterns(what: str, patterns: Mapping[str, float], targets: Collection[str]) -> None:
    for key in patterns:
        _compile_pattern(f"peft.{what}", key)
        if not any(pattern_of(path, {key: 1}) for path in targets):
            last = sorted({_last_name(path) for path in targets})
            raise AdapterError(
                f"peft.{what}: '{key}' matches no adapted module.{did_you_mean(key, [*last, *targets])} "
                f"Adapted: {', '.join(last)}."
            )


def whole_modules(model: Any, names: list[str]) -> tuple[list[str], bool]:
    """`modules_to_save` for PEFT, and whether they hold tied weights; then both of their modules are named.

    PEFT compares bare endings, so whole paths are given where an ending would match other modules.

    Raises:
        AdapterError: no module has this name.
    """
    paths = {path: id(m) for path, m in model.named_modules(remove_duplicate=False) if path}
    wanted: list[str] = []
    for name in names:
        found = find_paths(paths, name)
        if not found:
            last = sorted({_last_name(path) for path in paths if not _last_name(path).isdigit()})
            raise AdapterError(
                f"peft.modules_to_save: no module is called '{name}'.{did_you_mean(name, last)} "
                f"There are {', '.join(last)}."
            )
        wanted += [name] if found == [path for path in paths if path.endswith(name)] else found
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return wanted, False
    tied = [next(path for path, module in paths.items() if module == id(end)) for end in (embedding, head)]
    if not any(find_paths(tied, name) for name in wanted):
        return wanted, False
    return [*(name for name in wanted if not any(path.endswith(name) for path in tied)), *tied], True


def _compile_pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(f"{key}: '{text}' is not a regular expression ({error}).") from error


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]
