"""Which modules of a model an adapter takes, and why it cannot take others. Works on a skeleton without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.models.omissions import OF_EXPERTS, ModuleSurvey, Omission, group_by_reason, is_linear
from training_lens.utils.formatting import nearest_name

Modules = dict[str, torch.nn.Module]


def sizes(module: torch.nn.Module) -> tuple[int, int]:
    """Width of what goes in and what comes out; an embedding's vocabulary and width."""
    for names in (("in_features", "out_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, names[0]):
            return getattr(module, names[0]), getattr(module, names[1])
    raise AssertionError(f"{type(module).__name__} passed the checks and has no sizes")


def named(modules: Iterable[str], name: str) -> list[str]:
    """The paths that `name` means: itself, or those that end with it after a dot."""
    return [path for path in modules if path == name or path.endswith(f".{name}")]


@dataclass(frozen=True)
class Targets:
    """What an adapter takes of a model.

    Attributes:
        names: what PEFT is asked to adapt: names, shortened to their last part where that is clear, or the regular
            expression as given.
        left_out: what stays as it is though it could be expected to be adapted, a reason at a time.
    """

    names: str | list[str]
    left_out: tuple[Omission, ...]


def choose_targets(model: Any, peft: PeftSection) -> Targets:
    """The modules that `peft.target_modules` means in this model.

    Raises:
        AdapterError: nothing to adapt, or a name or expression that no module has; lists what there is and the nearest.
    """
    survey = ModuleSurvey(model)
    others = dict(survey.other_matrices())
    if peft.target_modules != "auto":
        experts = {path: reason for path, reason in others.items() if reason == OF_EXPERTS}
        return Targets(_matching_names(survey, peft.target_modules), group_by_reason(experts))
    found = {path: survey.why_not_auto(path) or survey.why_unfit(path) for path in survey.linear_layers}
    layers = {path: survey.linear_layers[path] for path, reason in found.items() if not reason}
    narrow = _narrow_layers(model, layers, peft)
    if not layers:
        raise AdapterError("peft.target_modules: the model has no linear layers to adapt.")
    names = _short_names([path for path in layers if path not in narrow], survey.paths)
    return Targets(names, group_by_reason({path: why for path, why in (found | narrow | others).items() if why}))


def _narrow_layers(model: Any, layers: Modules, peft: PeftSection) -> dict[str, str]:
    """Layers that take or give a number or two for each head, and fewer than the rank; not those of a pattern.

    That ranks of all other layers are not too high is checked, and refused, later.
    """
    config = model.config.get_text_config().to_dict()
    heads = max([n for key, n in config.items() if "heads" in key and isinstance(n, int)], default=0)
    few = {path: min(sizes(m)) for path, m in layers.items() if not pattern_of(path, peft.rank_pattern)}
    reason = f"narrower than the rank {peft.r}; peft.rank_pattern gives them one that fits"
    return {path: reason for path, width in few.items() if width <= 2 * heads and width < peft.r}


def _matching_names(survey: ModuleSurvey, asked: str | list[str]) -> str | list[str]:
    """The names or the expression that were asked for, once modules have them."""
    last = sorted({_last(path) for path in survey.linear_layers})
    if isinstance(asked, str):
        pattern = _pattern("peft.target_modules", asked)
        matches = [path for path in survey.paths if pattern.fullmatch(path)]
        if not matches:
            raise AdapterError(_no_match(asked, last, next(iter(survey.linear_layers), "")))
        return matches if survey.loses_expressions else asked
    for name in asked:
        if not named(survey.paths, name):
            experts = any(reason == OF_EXPERTS for _, reason in survey.other_matrices())
            raise AdapterError(
                f"peft.target_modules: no module is called '{name}'.{_hint(name, last)} "
                f"Linear layers: {', '.join(last)}.{' The experts are no linear layers here.' if experts else ''}"
            )
    return sorted(asked)


def _short_names(layers: Sequence[str], paths: Iterable[str]) -> list[str]:
    """The last parts of the layers' paths; the whole path of those whose last part another module has, too."""
    others = {_last(path) for path in set(paths).difference(layers)}
    return sorted({path if _last(path) in others else _last(path) for path in layers})


def _no_match(asked: str, last: list[str], example: str) -> str:
    if asked in last:
        return (
            f"peft.target_modules: one text is a regular expression for whole paths such as '{example}', and "
            f"'{asked}' is none; for the layers of that name give [{asked}]."
        )
    return (
        f"peft.target_modules: the regular expression '{asked}' is no module's whole path, such as '{example}'."
        f"{_hint(asked, ['auto', *last])} Linear layers: {', '.join(last)}."
    )


def check_targets(model: Any, targets: Modules, peft: PeftSection) -> None:
    """Hold the modules that PEFT would adapt against what an adapter can do.

    Raises:
        AdapterError: a module that is no linear layer, or one on which no adapter works; a rank that is too high, or a
            pattern that matches none.
    """
    if not targets:
        raise AdapterError("peft.target_modules: all of them are in peft.modules_to_save too; keep each in one.")
    _check_patterns("rank_pattern", peft.rank_pattern, targets)
    _check_patterns("alpha_pattern", peft.alpha_pattern, targets)
    survey = ModuleSurvey(model)
    for path, module in targets.items():
        _check_class(path, module, peft)
        _check_fitness(path, survey)
        _check_rank(path, module, peft)


def _check_class(path: str, module: torch.nn.Module, peft: PeftSection) -> None:
    if is_linear(module):
        return
    if not isinstance(module, torch.nn.Embedding):
        raise AdapterError(
            f"peft.target_modules: '{path}' is a {type(module).__name__}; only linear layers can be adapted. "
            f"To train it whole: peft.modules_to_save=[{_last(path)}]."
        )
    if peft.use_dora or peft.init == "pissa":
        key = "use_dora" if peft.use_dora else "init=pissa"
        raise AdapterError(
            f"peft.target_modules: '{path}' is an Embedding, and peft.{key} works on linear layers alone. Leave it "
            f"out, or train it whole: peft.modules_to_save=[{_last(path)}]."
        )


def _check_fitness(path: str, survey: ModuleSurvey) -> None:
    reason = survey.why_unfit(path) if path in survey.linear_layers else ""
    if reason:
        raise AdapterError(
            f"peft.target_modules: '{path}' cannot be adapted: {reason}. Leave it out; auto takes every layer that can."
        )


def _check_rank(path: str, module: torch.nn.Module, peft: PeftSection) -> None:
    pattern = pattern_of(path, peft.rank_pattern)
    rank = peft.rank_pattern[pattern] if pattern else peft.r
    (width_in, width_out), key = sizes(module), f"peft.rank_pattern['{pattern}']" if pattern else "peft.r"
    most = min(width_in, width_out)
    if rank > most:
        way = "" if pattern else f", or peft.rank_pattern={{{_last(path)}: {most}}}"
        raise AdapterError(
            f"{key}: rank {rank} is more than '{path}' can have, which maps {width_in} to {width_out}; "
            f"give at most {most}{way}."
        )


def pattern_of(path: str, patterns: Mapping[str, float]) -> str | None:
    """The first key of a rank or alpha pattern that means `path`: as in PEFT, a regular expression for its end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def _check_patterns(what: str, patterns: Mapping[str, float], targets: Modules) -> None:
    for key in patterns:
        _pattern(f"peft.{what}", key)
        if not any(pattern_of(path, {key: 1}) for path in targets):
            last = sorted({_last(path) for path in targets})
            raise AdapterError(
                f"peft.{what}: '{key}' matches no adapted module.{_hint(key, [*last, *targets])} "
                f"Adapted: {', '.join(last)}."
            )


def whole_modules(model: Any, names: list[str]) -> list[str]:
    """`modules_to_save` as PEFT takes it, which compares bare endings: whole paths where an ending also means others.

    Raises:
        AdapterError: a name that no module has.
    """
    paths = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    wanted: list[str] = []
    for name in names:
        found = named(paths, name)
        if not found:
            last = sorted({_last(path) for path in paths if not _last(path).isdigit()})
            raise AdapterError(
                f"peft.modules_to_save: no module is called '{name}'.{_hint(name, last)} There are {', '.join(last)}."
            )
        wanted += [name] if found == [path for path in paths if path.endswith(name)] else found
    return wanted


def tied_modules(model: Any) -> tuple[str, str] | None:
    """The paths of input embedding and output head where they are one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return None
    path = {id(m): n for n, m in model.named_modules()}
    return path[id(embedding)], path[id(head)]


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(f"{key}: '{text}' is no regular expression ({error}).") from error


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _hint(name: str, known: Iterable[str]) -> str:
    close = nearest_name(name, known)
    return f" Did you mean '{close}'?" if close else ""
