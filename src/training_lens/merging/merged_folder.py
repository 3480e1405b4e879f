"""The folder of a merged model, and that of a difference alone: all their files but the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from training_lens.errors import MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_tensors import Folded, fold, save_delta, save_merged
from training_lens.models.base_files import copy_beside, write_generation_config
from training_lens.models.classes import public_class
from training_lens.models.location import locate
from training_lens.models.stored import require_local_folder
from training_lens.models.tokenizer_files import save_tokenizer
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import write_text
from training_lens.utils.formatting import format_size

REPORT = "merge.json"


def write_folder(
    session: Session,
    folder: Path,
    dtype: Precision,
    *,
    keeps_types: bool,
    scale: float,
    delta: bool,
    max_shard_size: str,
) -> bool:
    """Write into `folder` what the options, those of `merge.MergeOptions`, ask for; the session's model is used up.

    Args:
        dtype: of the written weights.
        keeps_types: each weight of a whole model keeps the base's number type; `dtype` is the commonest of these.

    Returns:
        Whether tied weights came apart.

    Raises:
        AdapterError: see `fold`; MergeError: there is not enough space.
    """
    folded = fold(session.model, scale, delta=delta)
    _require_space(folded, delta, folder, DTYPES[dtype])
    if delta:
        save_delta(folded, folder, DTYPES[dtype], max_shard_size)
    else:
        _save_whole(folded, session, folder, None if keeps_types else dtype, max_shard_size)
    readme = _readme_of_delta if delta else _readme
    write_text(folder / "README.md", readme(session, _said(session, dtype, scale), folded.untied))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors keeps its files to their owner, and a server is often another user
    return folded.untied


def _save_whole(folded: Folded, session: Session, folder: Path, dtype: Precision | None, max_shard_size: str) -> None:
    """The model with the base's own files beside it: config, tokenizer, chat template; it stops where the session does.

    Args:
        dtype: of the written weights; None: as in the base's files.
    """
    base = session.config.model
    own = require_local_folder(base)
    save_merged(folded, base, folder, dtype, max_shard_size)
    save_tokenizer(session.tokenizer, folder, own, base.trust_remote_code)
    write_generation_config(own, folder, folded.model, session.stop_ids, session.pad_id)
    copy_beside(own, folder, base.trust_remote_code)


def _require_space(folded: Folded, delta: bool, folder: Path, dtype: torch.dtype) -> None:
    model = folded.model
    written = [model.get_parameter(name) for name in folded.changed] if delta else list(model.parameters())
    needed, free = sum(p.numel() for p in written) * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"the result takes {format_size(needed)}, and {folder.parent} has {format_size(free)} left. Free some "
            "space, or give --output on another disk."
        )


def _said(session: Session, dtype: Precision, scale: float) -> str:
    scaled = "" if scale == 1 else f", its update times {scale:g}"
    return f"The adapter {session.adapter}{scaled}, merged into {session.config.model.id}; weights in {dtype}."


def _readme(_session: Session, said: str, untied: bool) -> str:
    parted = " Embedding and head, one weight in the base, are two here." if untied else ""
    return f"# Merged model\n\n{said}{parted} Checked against the adapter: see {REPORT}.\n"


def _readme_of_delta(session: Session, said: str, untied: bool) -> str:
    untie = "head = model.get_output_embeddings()\nhead.weight = torch.nn.Parameter(head.weight.clone())\n"
    base, name = locate(session.config.model), public_class(session.model)
    return (
        f"# Difference to a base model\n\n{said} Add this to the base's weights; checked, see {REPORT}.\n\n"
        "```python\nimport glob, torch\nfrom safetensors.torch import load_file\n"
        f"from transformers import {name}\n\n"
        f'model = {name}.from_pretrained("{base}", dtype=torch.float32).requires_grad_(False)\n'
        f'{untie if untied else ""}for file in glob.glob("delta*.safetensors"):\n'
        "    for name, difference in load_file(file).items():\n"
        "        model.get_parameter(name).add_(difference.float())\n```\n"
    )
