"""The files that a merge writes, for a merged model or for a delta alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from training_lens.errors import MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_plan import REPORT, MergeOptions
from training_lens.merging.merge_tensors import MergedModel, merge_weights, save_delta, save_merged
from training_lens.models.base_files import copy_beside, save_tokenizer, write_generation_config
from training_lens.models.base_record import require_local_folder
from training_lens.models.location import locate_model
from training_lens.models.model_classes import public_class
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import write_text
from training_lens.utils.formatting import format_size


def write_folder(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> bool:
    """Write all files of the output but the report, by the options; the session's model is used up.

    Args:
        dtype: of the written weights; with the option auto, the most common dtype of the base's files, and each weight
            of a whole model keeps its own.

    Returns:
        Whether tied weights became untied.

    Raises:
        AdapterError: see `merge_weights`; MergeError: there is not enough space.
    """
    merged = merge_weights(session.model, options.scale, delta=options.delta)
    _require_space(merged, options.delta, folder, DTYPES[dtype])
    if options.delta:
        save_delta(merged, folder, DTYPES[dtype], options.max_shard_size)
    else:  # with the base's own config, tokenizer and chat template, and the session's stop tokens
        base = session.config.model
        own, trusted = require_local_folder(base), base.trust_remote_code
        save_merged(merged, base, folder, None if options.dtype == "auto" else dtype, options.max_shard_size)
        save_tokenizer(session.tokenizer, folder, own, trusted)
        write_generation_config(own, folder, merged.model, session.stop_ids, session.pad_id)
        copy_beside(own, folder, trusted)
    scaled = "" if options.scale == 1 else f", its update times {options.scale:g}"
    what = f"The adapter {session.adapter}{scaled}, merged into {session.config.model.id}; weights in {dtype}."
    readme = _delta_readme(session, what, merged.is_untied) if options.delta else _merged_readme(what, merged.is_untied)
    write_text(folder / "README.md", readme)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files private to their owner, and a server is often another user
    return merged.is_untied


def _require_space(merged: MergedModel, delta: bool, folder: Path, dtype: torch.dtype) -> None:
    model = merged.model
    written = [model.get_parameter(name) for name in merged.changed] if delta else list(model.parameters())
    needed, free = sum(p.numel() for p in written) * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"the result takes {format_size(needed)}, and {folder.parent} has {format_size(free)} left. Free some "
            "space, or give --output on another disk."
        )


def _merged_readme(description: str, untied: bool) -> str:
    parted = " Embedding and head, one weight in the base, are two here." if untied else ""
    return f"# Merged model\n\n{description}{parted} Checked against the adapter: see {REPORT}.\n"


def _delta_readme(session: Session, description: str, untied: bool) -> str:
    untie = "head = model.get_output_embeddings()\nhead.weight = torch.nn.Parameter(head.weight.clone())\n"
    base, name = locate_model(session.config.model), public_class(session.model)
    return (
        f"# Difference to a base model\n\n{description} Add this to the base's weights; checked, see {REPORT}.\n\n"
        "```python\nimport glob, torch\nfrom safetensors.torch import load_file\n"
        f"from transformers import {name}\n\n"
        f'model = {name}.from_pretrained("{base}", dtype=torch.float32).requires_grad_(False)\n'
        f'{untie if untied else ""}for file in glob.glob("delta*.safetensors"):\n'
        "    for name, difference in load_file(file).items():\n"
        "        model.get_parameter(name).add_(difference.float())\n```\n"
    )
