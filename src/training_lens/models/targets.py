"""Which modules of a model an adapter takes, and why it cannot take others. Works on a skeleton without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.utils.formatting import nearest

Modules = dict[str, torch.nn.Module]


def is_linear(module: torch.nn.Module) -> bool:
    """A linear layer: torch's, bitsandbytes' (subclasses of it), or transformers' Conv1D of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def linear_layers(model: Any) -> Modules:
    """Paths and modules of every linear layer but the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if is_linear(m) and m is not head}


def sizes(module: torch.nn.Module) -> tuple[int, int]:
    """Width of what goes in and what comes out; an embedding's vocabulary and width."""
    for names in (("in_features", "out_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, names[0]):
            return getattr(module, names[0]), getattr(module, names[1])
    raise AssertionError(f"{type(module).__name__} passed the checks and has no sizes")


def named(modules: Iterable[str], name: str) -> list[str]:
    """The paths that `name` means: itself, or those that end with it after a dot."""
    return [path for path in modules if path == name or path.endswith(f".{name}")]


def target_names(model: Any, asked: str | list[str]) -> str | list[str]:
    """What PEFT is asked to adapt: names sorted and shortened to their last part, or the regular expression as given.

    Raises:
        AdapterError: nothing to adapt, or a name or expression that no module has; lists what there is and the nearest.
    """
    layers, paths = linear_layers(model), [n for n, _ in model.named_modules()]
    if asked == "auto":
        return _shortest(layers, paths)
    last = sorted({_last(n) for n in layers})
    if isinstance(asked, str):
        pattern = _pattern("peft.target_modules", asked)
        if not any(pattern.fullmatch(path) for path in paths):
            raise AdapterError(_no_match(asked, last, next(iter(layers), "")))
        return asked
    for name in asked:
        if not named(paths, name):
            raise AdapterError(
                f"peft.target_modules: no module is called '{name}'.{_hint(name, last)} "
                f"Linear layers: {', '.join(last)}."
            )
    return sorted(asked)


def _shortest(layers: Modules, paths: list[str]) -> list[str]:
    """The last parts of the layers' paths; whole paths where a last part also means another module."""
    if not layers:
        raise AdapterError("peft.target_modules: the model has no linear layers to adapt.")
    last = {_last(n) for n in layers}
    clear = {path for name in last for path in named(paths, name)} == set(layers)
    return sorted(last if clear else layers)


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


def check_targets(targets: Modules, peft: PeftSection) -> None:
    """Hold the modules that PEFT would adapt against what an adapter can do.

    Raises:
        AdapterError: a module that is no linear layer, a rank that is too high, or a pattern that matches none.
    """
    if not targets:
        raise AdapterError("peft.target_modules: all of them are in peft.modules_to_save too; keep each in one.")
    _check_patterns("rank_pattern", peft.rank_pattern, targets)
    _check_patterns("alpha_pattern", peft.alpha_pattern, targets)
    for path, module in targets.items():
        _check_class(path, module, peft)
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
    close = nearest(name, known)
    return f" Did you mean '{close}'?" if close else ""
