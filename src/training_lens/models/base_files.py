"""The base's config files in a merged model's folder: copied byte for byte, except keys that must change.

A newer transformers rewrites them in its own form (`rope_parameters`, `dtype`), which older versions and other programs
read as another model, or not at all. So nothing that transformers rewrote is saved here.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json, write_json

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
# Preprocessing of text, images and audio, and the model's license.
COPIED = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def copy_files(base: Path, folder: Path, patterns: Collection[str]) -> None:
    """Copy the base's files that match the patterns; links in the hub's cache are followed."""
    for file in sorted({file for pattern in patterns for file in base.glob(pattern) if file.is_file()}):
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def copy_beside(base: Path, folder: Path, trust_remote_code: bool) -> None:
    """Copy the base's files besides weights, config and tokenizer; its code only if it was trusted to run."""
    copy_files(base, folder, (*COPIED, *(("*.py",) if trust_remote_code else ())))


def write_unless_same(base: Path, folder: Path, name: str, content: Any) -> None:
    """Write `content` as the JSON file `name`, or copy the base's file if it has the same content."""
    own = base / name
    if own.is_file() and read_json(own) == content:
        shutil.copyfile(own, folder / name)
    else:
        write_json(folder / name, content, verbatim=True)


def write_config(
    base: Path, folder: Path, model: Any, *, dtype: Precision | None, untied: bool, trust_remote_code: bool
) -> None:
    """Write config.json: the base's own, except what differs in the written weights.

    Args:
        model: the model that is written, not quantized.
        dtype: of the written weights; None: as in the base's files.
        untied: embedding and output head were one weight, and are two now.
        trust_remote_code: the folder holds the base's code, and the file names it.
    """
    from transformers import AutoConfig

    config = read_json(base / CONFIG)
    own = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    text = _text_section(config, own)
    if dtype:
        _set_dtype(config, dtype)
    if untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    size = model.config.get_text_config().vocab_size
    if size != own.get_text_config().vocab_size:
        text["vocab_size"] = size
    if getattr(model.config, "quantization_config", None) is None:
        config.pop("quantization_config", None)
    if not trust_remote_code:
        config.pop("auto_map", None)
    write_unless_same(base, folder, CONFIG, config)


def has_newer_form(base: Path) -> bool:
    """Whether the base's config.json describes its rotary embedding only in the form of transformers 5.

    Older versions silently load such a base, and a model merged from it, with another rotary embedding.
    """
    config = read_json(base / CONFIG)
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any("rope_parameters" in s and not {"rope_theta", "rope_scaling"} & s.keys() for s in sections)


def _text_section(config: dict[str, Any], own: Any) -> dict[str, Any]:
    """The part of a config.json that the language model is built from: all of it, or a section of a multimodal one."""
    text = own.get_text_config()
    sections = (section for name, section in config.items() if getattr(own, name, None) is text)
    return next((section for section in sections if isinstance(section, dict)), config)


def _set_dtype(config: dict[str, Any], dtype: Precision) -> None:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        section |= {key: name for key in DTYPE_KEYS if key in section}
    if not any(key in config for key in DTYPE_KEYS):
        config["torch_dtype"] = name  # which every version of transformers reads


def write_generation_config(base: Path, folder: Path, model: Any, stop_ids: Collection[int], pad_id: int) -> None:
    """Write generation_config.json: the base's own, with `stop_ids`, and with a padding token if it has none."""
    own = base / GENERATION
    settings = read_json(own) if own.is_file() else _legacy_settings(model)
    ends = settings.get("eos_token_id")
    if set(ends if isinstance(ends, list) else [ends]) != set(stop_ids):
        settings["eos_token_id"] = sorted(stop_ids)
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = pad_id
    write_unless_same(base, folder, GENERATION, settings)


def _legacy_settings(model: Any) -> dict[str, Any]:
    """The generation settings that transformers derives from a config.json alone."""
    settings: dict[str, Any] = model.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    return settings
