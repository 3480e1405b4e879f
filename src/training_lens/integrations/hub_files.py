"""The files that a push to the hub sends, and which of them a repository lacks.

None contains a path of this machine, a secret, or a row of the data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training_lens import embedded
from training_lens.integrations.record import RunRecord
from training_lens.models.adapter_files import require_finite
from training_lens.runs.checkpoint_format import MANIFEST
from training_lens.runs.run_folder import describe_scale
from training_lens.utils.files import hash_file, list_files, read_json
from training_lens.utils.integrity import read_sealed, require_intact, with_checksum
from training_lens.utils.logging import get_logger
from training_lens.utils.names import check_file_name, expand_home
from training_lens.utils.secrets import redact_text

logger = get_logger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
METADATA = "training_lens"
SECTIONS = ("model", "data", "peft", "training", "evaluation", "lens")  # of the config: they determine the adapter
ABSOLUTE = re.compile(r"(?<![\w.:/<])~?(?:/[^\s/:'\"<>,;()]+){2,}")
CHECKPOINTS = "training_lens_checkpoints"


@dataclass(frozen=True)
class PushedFile:
    """A file for the repository: `source` is a local file, or the content itself."""

    path: str
    source: Path | bytes

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """In hexadecimal; reads a local file once."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else hash_file(self.source)

    @cached_property
    def blob_id(self) -> str:
        """Git's name for the content: the sha1 of a header and the content."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file in the repository. `sha256` is None unless it is in large-file storage; then compare the blob id."""

    size: int
    blob_id: str
    sha256: str | None = None

    def has_content_of(self, file: PushedFile) -> bool:
        """Whether both have the same content."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob_id == file.blob_id


@dataclass(frozen=True)
class PushPlan:
    """What a push does: `send` are new or changed files, `there` unchanged ones, `delete` folders to delete.

    `unknown` says why the repository could not be read; then `send` has all files.
    """

    send: tuple[PushedFile, ...]
    there: tuple[PushedFile, ...] = ()
    delete: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the repository has it all."""
        return not self.send and not self.delete

    @property
    def size(self) -> int:
        """Bytes to send."""
        return sum(file.size for file in self.send)


def plan_push(wanted: Sequence[PushedFile], remote: Mapping[str, RemoteFile]) -> PushPlan:
    """The plan that brings `wanted` into a repository.

    Other files are kept, except checkpoints that the run has deleted, if it has others.
    """
    there = tuple(file for file in wanted if file.path in remote and remote[file.path].has_content_of(file))
    same = {file.path for file in there}
    send = tuple(file for file in wanted if file.path not in same)
    kept = _checkpoint_folders([file.path for file in wanted])
    return PushPlan(send, there, tuple(sorted(_checkpoint_folders(remote) - kept)) if kept else ())


def _checkpoint_folders(paths: Collection[str]) -> set[str]:
    return {"/".join(parts[:2]) + "/" for path in paths if (parts := path.split("/"))[0] == CHECKPOINTS and parts[2:]}


class PathShortener:
    """Shortens paths: data files of the run to distinct names, all other local paths to their last part."""

    def __init__(self, run: RunRecord) -> None:
        data = run.folder.read_metadata("data.json")
        files = {file for split in ("train", "validation") for file in (data.get(split) or {}).get("files", {})}
        self._short = short_names(sorted(files))
        base = embedded.resolve_name(run.config.model.id)
        local = is_local_folder(base) and run.config.model.id == base
        self.base = expand_home(base).resolve().name if local else run.config.model.id
        places = [embedded.resolve_name(run.config.model.id), str(run.folder.root), str(run.base_output_dir.absolute())]
        named = [place for place in places if is_local_folder(place) and Path(place).name not in ("", "..")]
        self._places = {place: Path(place).name for place in named} | self._short

    def shorten_paths(self, value: Any) -> Any:
        """A JSON value with every path in it shortened, keys too."""
        if isinstance(value, Mapping):
            return {self.shorten_paths(key): self.shorten_paths(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.shorten_paths(item) for item in value]
        return self.shorten_text(value) if isinstance(value, str) else value

    def shorten_text(self, text: str) -> str:
        """Prose with paths shortened."""
        return ABSOLUTE.sub(lambda found: Path(found.group()).name, self.shorten_html(text))

    def shorten_html(self, text: str) -> str:
        """HTML with only the known paths shortened: tags and scripts have slashes, too."""
        for place in sorted(self._places, key=len, reverse=True):
            text = text.replace(place, self._places[place])
        return text


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, with as many folders before it as are needed to be unique.

    Example:
        >>> short_names(["/a/x/rows.json", "/a/y/rows.json", "/b/z.json"])
        {'/a/x/rows.json': 'x/rows.json', '/a/y/rows.json': 'y/rows.json', '/b/z.json': 'z.json'}
    """
    parts, kept = {path: Path(path).parts for path in paths}, dict.fromkeys(paths, 1)
    while True:
        names = {path: "/".join(parts[path][-kept[path] :]) for path in paths}
        taken = Counter(names.values())
        twice = [path for path in paths if taken[names[path]] > 1 and kept[path] < len(parts[path])]
        if not twice:
            return names
        kept |= {path: kept[path] + 1 for path in twice}


def is_local_folder(name: str) -> bool:
    """Whether a model's id is a local folder, not a hub's id."""
    return expand_home(name).is_dir()


def build_adapter_files(run: RunRecord, names: PathShortener) -> list[PushedFile]:
    """The adapter and the tokenizer, for the root of the repository, where PEFT and transformers expect them."""
    folder, adapter = run.folder, run.folder.served_adapter
    require_intact(adapter)
    require_intact(folder.tokenizer)
    require_finite(adapter)
    if folder.adapter_scale != 1:
        logger.info("%s; so it is sent", describe_scale(folder))
    config = PushedFile(ADAPTER_CONFIG, _adapter_config(adapter / ADAPTER_CONFIG, names))
    weights = [PushedFile(file.name, file) for file in sorted(adapter.glob("*.safetensors"))]
    tokenizer = [PushedFile(str(f.relative_to(folder.tokenizer)), f) for f in sorted(list_files(folder.tokenizer))]
    return [config, *weights, *tokenizer]


def build_metadata_files(run: RunRecord, names: PathShortener) -> list[PushedFile]:
    """The run's record in training_lens/, with the lens's page if there is one."""
    settings = run.settings
    values = {
        "config.json": {section: settings[section] for section in SECTIONS},
        "summary.json": {**run.summary, "run_dir": run.run_id},
        "data.json": run.folder.read_metadata("data.json"),
        "environment.json": run.folder.read_metadata("environment.json"),
    }
    if run.folder.combination_record.is_file():
        record = read_sealed(run.folder.combination_record)
        runs = [{**one, "run": Path(one["run"]).name} for one in record["runs"]]
        values["combination.json"] = {**record, "run": run.run_id, "runs": runs}
    files = [
        PushedFile(f"{METADATA}/{name}", _encode_json(names.shorten_paths(value))) for name, value in values.items()
    ]
    page = run.folder.reports / "lens.html"
    if page.is_file():
        text = redact_text(names.shorten_html(page.read_text(encoding="utf-8")))
        files.append(PushedFile(f"{METADATA}/lens.html", text.encode()))
    return files


def build_checkpoint_files(folder: Path, names: PathShortener) -> list[PushedFile]:
    """The files of a checkpoint, to resume from on another machine; its manifest has the hashes of the sent files."""
    manifest = read_sealed(folder / MANIFEST)
    files = []
    for name in manifest["files"]:
        source: Path | bytes = folder / check_file_name(name)
        if Path(name).name == ADAPTER_CONFIG:
            source = _adapter_config(folder / name, names)
        files.append(PushedFile(f"{CHECKPOINTS}/{folder.name}/{name}", source))
        manifest["files"][name] = files[-1].sha256 if isinstance(source, bytes) else manifest["files"][name]
    return [*files, PushedFile(f"{CHECKPOINTS}/{folder.name}/{MANIFEST}", _encode_json(with_checksum(manifest)))]


def read_file_stats(run: RunRecord, checkpoints: Sequence[Path], adapter: bool) -> dict[str, str]:
    """Size and modification time of the files to send, which tell whether they may have changed."""
    folder = run.folder
    places: list[Path] = []
    if adapter:
        places = [*folder.served_adapter.glob("*"), *list_files(folder.tokenizer), *folder.metadata.glob("*.json")]
        places += [folder.reports / "compare.json", folder.reports / "lens.html"]
    places += [checkpoint / MANIFEST for checkpoint in checkpoints]
    stats = {str(p.relative_to(folder.root)): p.stat() for p in sorted(places) if p.is_file()}
    return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats.items()}


def _adapter_config(path: Path, names: PathShortener) -> bytes:
    """PEFT's configuration, with a base in a local folder named by its last part."""
    config = read_json(path)
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and is_local_folder(base):
        config["base_model_name_or_path"] = names.base
    return _encode_json(config)


def _encode_json(value: Any) -> bytes:
    return (redact_text(json.dumps(value, indent=2, ensure_ascii=False)) + "\n").encode()
