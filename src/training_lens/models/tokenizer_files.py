"""Save a tokenizer: the base's own files byte for byte, with only the user's changes applied.

transformers 5 writes other files than it read (`"tokenizer_class": "TokenizersBackend"`, the template in a file of its
own), which transformers 4 and other programs cannot read. The changes are found by letting transformers write both the
base's tokenizer and this one, and comparing them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from training_lens.models.base_files import copy_files
from training_lens.utils.files import read_json, write_json, write_text

TOKENIZER, CONFIG, SPECIAL, ADDED = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
FILES = (
    *(TOKENIZER, CONFIG, SPECIAL, ADDED, TEMPLATE, f"{TEMPLATES}/*.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
# Keys about how a tokenizer was loaded, not what it does; and settings of a single call.
OF_LOADING = {"tokenizer_class", "backend", "is_local", "local_files_only", "name_or_path", "auto_map", "chat_template"}
OF_A_CALL = {"padding", "truncation"}


def save_tokenizer(tokenizer: Any, folder: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Write the base's tokenizer files into `folder`, with the changed template and tokens of `tokenizer`.

    Args:
        tokenizer: the base's own, or one derived from it.
        base: the folder of the base's files.
        trust_remote_code: the base's code was trusted to run; otherwise it is neither copied nor named.
    """
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    copy_files(
        base, folder, (*FILES, *own.vocab_files_names.values(), *(("tokeniz*.py",) if trust_remote_code else ()))
    )
    _copy_changes(tokenizer, own, folder, base)
    if tokenizer.chat_template != own.chat_template:
        _write_template(tokenizer.chat_template, folder)
    if not trust_remote_code and (folder / CONFIG).is_file():
        settings = read_json(folder / CONFIG)
        if settings.pop("auto_map", None):
            write_json(folder / CONFIG, settings, verbatim=True)


def _copy_changes(tokenizer: Any, own: Any, folder: Path, base: Path) -> None:
    """Apply to the copied files what differs between the two tokenizers as transformers writes them."""
    with tempfile.TemporaryDirectory(prefix="training-lens-tokenizer-") as place:
        before, after = Path(place) / "before", Path(place) / "after"
        own.save_pretrained(str(before))
        tokenizer.save_pretrained(str(after))
        rules = _find_changes(before, after, TOKENIZER, OF_A_CALL)
        settings = _find_changes(before, after, CONFIG, OF_LOADING)
        if rules and not (folder / TOKENIZER).is_file():
            shutil.copyfile(after / TOKENIZER, folder / TOKENIZER)
        else:
            _apply_changes(folder, TOKENIZER, rules)
    _apply_changes(folder, CONFIG, settings)
    _apply_changes(
        folder, SPECIAL, {key: value for key, value in settings.items() if key in _read_settings(folder / SPECIAL)}
    )
    if "added_tokens" in rules:
        _add_tokens(tokenizer, folder)


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


def _add_tokens(tokenizer: Any, folder: Path) -> None:
    """Add the tokens to the older files and keys too, where the base has them."""
    settings = _read_settings(folder / CONFIG)
    if "added_tokens_decoder" in settings:
        tokens = {str(index): token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
        _apply_changes(folder, CONFIG, {"added_tokens_decoder": tokens})
    if (folder / ADDED).is_file():
        _apply_changes(folder, ADDED, tokenizer.get_added_vocab())


def _write_template(template: str | dict[str, str] | None, folder: Path) -> None:
    """Write the template, or several by name, where the base has its own: in its config, or in files."""
    settings = _read_settings(folder / CONFIG)
    in_config = "chat_template" in settings and not (folder / TEMPLATE).is_file()
    for name in (TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    if settings.pop("chat_template", None) is not None or in_config:
        listed: Any = template
        if isinstance(template, dict):
            listed = [{"name": name, "template": text} for name, text in template.items()]
        kept = {"chat_template": listed} if in_config and template else {}
        write_json(folder / CONFIG, settings | kept, verbatim=True)
    if not in_config:
        _write_template_files({"default": template} if isinstance(template, str) else template or {}, folder)


def _write_template_files(templates: dict[str, str], folder: Path) -> None:
    for name, text in templates.items():
        if name == "default":
            write_text(folder / TEMPLATE, text, verbatim=True)
        else:
            (folder / TEMPLATES).mkdir(exist_ok=True)
            write_text(folder / TEMPLATES / f"{name}.jinja", text, verbatim=True)
