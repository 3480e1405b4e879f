"""The base's config and tokenizer files in a written folder: copied byte for byte, except for what must change.

A newer transformers rewrites them in its own form (`rope_parameters`, `dtype`, the template in a file of its own,
`"tokenizer_class": "TokenizersBackend"`), which older versions and other programs read as another model, or not at all.
So nothing that transformers rewrote is saved here. What changed in a tokenizer is found by letting transformers write
both the base's and this one, and comparing them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json, write_json, write_text

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
COPIED = (  # besides weights, config and tokenizer: preprocessing of text, images and audio, and the model's license
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, SPECIAL, ADDED, TEMPLATE, f"{TEMPLATES}/*.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
# Keys about how a tokenizer was loaded, not what it does; and settings of a single call.
OF_LOADING = {"tokenizer_class", "backend", "is_local", "local_files_only", "name_or_path", "auto_map", "chat_template"}
OF_A_CALL = {"padding", "truncation"}


def copy_files(base: Path, folder: Path, patterns: Collection[str]) -> None:
    """Copy the base's files that match the patterns; links in the hub's cache are followed."""
    for file in sorted({file for pattern in patterns for file in base.glob(pattern) if file.is_file()}):
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


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
    """Write config.json: the base's own, except what differs in the weights of `model`, which is not quantized.

    Args:
        dtype: of the written weights; None: as in the base's files.
        untied: embedding and output head were one weight, and are two now.
        trust_remote_code: the folder holds the base's code, and the file names it.
    """
    from transformers import AutoConfig

    config = read_json(base / CONFIG)
    own = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    # What the language model is built from: the whole file, or a section of a multimodal one's.
    sections = (section for name, section in config.items() if getattr(own, name, None) is own.get_text_config())
    text = next((section for section in sections if isinstance(section, dict)), config)
    if dtype:
        name = str(DTYPES[dtype]).removeprefix("torch.")
        for section in _config_sections(config):
            section |= {key: name for key in DTYPE_KEYS if key in section}
        if not any(key in config for key in DTYPE_KEYS):
            config["torch_dtype"] = name  # which every version of transformers reads
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
    sections = _config_sections(read_json(base / CONFIG))
    return any("rope_parameters" in s and not {"rope_theta", "rope_scaling"} & s.keys() for s in sections)


def _config_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def write_generation_config(base: Path, folder: Path, model: Any, stop_ids: Collection[int], pad_id: int) -> None:
    """Write generation_config.json: the base's own, with `stop_ids`, and with a padding token if it has none."""
    own = base / GENERATION
    # Without the file, transformers derives the settings from config.json.
    settings = read_json(own) if own.is_file() else model.generation_config.to_diff_dict()
    if not own.is_file():
        settings.pop("transformers_version", None)
    ends = settings.get("eos_token_id")
    if set(ends if isinstance(ends, list) else [ends]) != set(stop_ids):
        settings["eos_token_id"] = sorted(stop_ids)
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = pad_id
    write_unless_same(base, folder, GENERATION, settings)


def save_tokenizer(tokenizer: Any, folder: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Write the base's tokenizer files into `folder`, with what changed in `tokenizer`, which is derived from it.

    The base's code is copied and named only if it was trusted to run.
    """
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    code = ["tokeniz*.py"] if trust_remote_code else []
    copy_files(base, folder, [*TOKENIZER_FILES, *own.vocab_files_names.values(), *code])
    _copy_changes(tokenizer, own, folder)
    if tokenizer.chat_template != own.chat_template:
        _write_template(tokenizer.chat_template, folder)
    if not trust_remote_code and (folder / TOKENIZER_CONFIG).is_file():
        settings = read_json(folder / TOKENIZER_CONFIG)
        if settings.pop("auto_map", None):
            write_json(folder / TOKENIZER_CONFIG, settings, verbatim=True)


def _copy_changes(tokenizer: Any, own: Any, folder: Path) -> None:
    """Apply to the copied files what differs between the two tokenizers as transformers writes them."""
    with tempfile.TemporaryDirectory(prefix="training-lens-tokenizer-") as place:
        before, after = Path(place) / "before", Path(place) / "after"
        own.save_pretrained(str(before))
        tokenizer.save_pretrained(str(after))
        rules = _find_changes(before, after, TOKENIZER, OF_A_CALL)
        settings = _find_changes(before, after, TOKENIZER_CONFIG, OF_LOADING)
        if rules and not (folder / TOKENIZER).is_file():
            shutil.copyfile(after / TOKENIZER, folder / TOKENIZER)
        else:
            _apply_changes(folder, TOKENIZER, rules)
    special = _read_settings(folder / SPECIAL)
    _apply_changes(folder, TOKENIZER_CONFIG, settings)
    _apply_changes(folder, SPECIAL, {key: value for key, value in settings.items() if key in special})
    if "added_tokens" in rules:  # the older files and keys have them too, where the base has these
        if "added_tokens_decoder" in _read_settings(folder / TOKENIZER_CONFIG):
            tokens = {str(index): token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
            _apply_changes(folder, TOKENIZER_CONFIG, {"added_tokens_decoder": tokens})
        if (folder / ADDED).is_file():
            _apply_changes(folder, ADDED, tokenizer.get_added_vocab())


def _read_settings(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def _find_changes(before: Path, after: Path, name: str, ignored: set[str]) -> dict[str, Any]:
    """The keys of a JSON file whose values differ, with the new values; None for a removed key."""
    old, new = _read_settings(before / name), _read_settings(after / name)
    return {key: new.get(key) for key in (old.keys() | new.keys()) - ignored if old.get(key) != new.get(key)}


def _apply_changes(folder: Path, name: str, changes: dict[str, Any]) -> None:
    if changes:
        content = _read_settings(folder / name)
        merged = {key: value for key, value in {**content, **changes}.items() if value is not None}
        write_json(folder / name, merged, verbatim=True)


def _write_template(template: str | dict[str, str] | None, folder: Path) -> None:
    """Write the template, or several by name, where the base has its own: in its config, or in files."""
    settings = _read_settings(folder / TOKENIZER_CONFIG)
    in_config = "chat_template" in settings and not (folder / TEMPLATE).is_file()
    for name in (TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    if settings.pop("chat_template", None) is not None or in_config:
        listed: Any = template
        if isinstance(template, dict):
            listed = [{"name": name, "template": text} for name, text in template.items()]
        kept = {"chat_template": listed} if in_config and template else {}
        write_json(folder / TOKENIZER_CONFIG, settings | kept, verbatim=True)
    templates = {"default": template} if isinstance(template, str) else template or {}
    for name, text in templates.items() if not in_config else ():
        file = folder / (TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        write_text(file, text, verbatim=True)
