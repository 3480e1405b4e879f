"""The model card of a run: what the adapter is, on what it was trained, how good it is, how to load it.

Every number is one that the run's files hold; text of data and findings is escaped, paths are shortened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from training_lens import embedded
from training_lens.config.schema import TrainingConfig
from training_lens.evaluation.verdict import format_measure
from training_lens.integrations.hub_files import SECTIONS, PathShortener, is_local_folder
from training_lens.integrations.record import RunRecord
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.formatting import format_count, format_seconds, render_sparkline
from training_lens.utils.integrity import read_sealed
from training_lens.utils.secrets import redact_text

if TYPE_CHECKING:
    from training_lens.analysis.findings import Finding

TEMPLATE = "model_card.md.jinja"
ACTIVE = re.compile(r"([\\`*_\[\]|~$])")  # what Markdown gives a meaning within a line


class Verbatim(str):
    """Text that the template takes as it is: code, YAML, and what is Markdown already."""


class MeasureRow(NamedTuple):
    """A measure of the base and of the adapter: as it is read by people."""

    name: str
    base: str
    adapter: str
    change: str


def render_model_card(run: RunRecord, names: PathShortener, repo: str, revision: str | None = None) -> str:
    """The README.md of the repository `repo` for a finished run: YAML front matter, then Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701 (Markdown: `_escape_markdown` escapes what it and HTML give a meaning)
        loader=PackageLoader("training_lens.integrations", "."),
        finalize=_escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    card = _Card(run, names, repo, revision)
    return redact_text(environment.get_template(TEMPLATE).render(card=card)).rstrip() + "\n"


def _escape_markdown(value: Any) -> Any:
    """`value` as plain text in Markdown and in the HTML that it becomes, on one line."""
    if isinstance(value, Verbatim) or not isinstance(value, str):
        return value
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return ACTIVE.sub(r"\\\1", text)


class _Card:
    """What the template fills in."""

    def __init__(self, run: RunRecord, names: PathShortener, repo: str, revision: str | None) -> None:
        self.repo, self.revision, self._run, self._names = repo, revision, run, names
        self.title = repo.split("/")[-1]
        self.summary, self.peft, self.training = run.summary, run.config.peft, run.config.training
        self.date = run.config.data.date
        self.base = names.base
        self.base_is_embedded = run.config.model.id == embedded.MODEL
        self.base_is_local = self.base_is_embedded or is_local_folder(run.config.model.id)

    @property
    def front_matter(self) -> Verbatim:
        """What the hub reads: YAML."""
        import yaml

        values: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
        values["tags"] = ["lora", "training-lens", *(["dora"] if self.peft.use_dora else [])]
        if not self.base_is_local:  # a folder's name would be taken for another's repository
            values |= {"base_model": self.base, "base_model_relation": "adapter"}
        if hubs := sorted({_dataset_id(str(s)) for s in self._run.config.data.train if str(s).startswith("hub:")}):
            values["datasets"] = hubs
        if results := self._evaluation_results():
            values["model-index"] = [{"name": self.title, "results": results}]
        return Verbatim(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())

    def _evaluation_results(self) -> list[dict[str, Any]]:
        """The validation loss as the hub's leaderboards read it; none where nothing was validated."""
        loss, files = self.summary["validation_loss"], [file for file in self.files if file["split"] == "validation"]
        if loss is None:
            return []
        what = ", ".join(file["name"] for file in files) or "held-out rows"
        metric = {"type": "loss", "value": loss, "name": "validation loss, nats per supervised token"}
        task = {"type": "text-generation", "name": "Text Generation"}
        return [{"task": task, "dataset": {"name": what, "type": "custom"}, "metrics": [metric]}]

    @property
    def variant(self) -> str:
        """What kind of adapter: 'rsLoRA with DoRA'."""
        name = {"lora": "LoRA", "rslora": "rsLoRA"}.get(self.peft.variant, self.peft.variant)
        return "DoRA" if self.peft.use_dora and name == "LoRA" else name + (" with DoRA" if self.peft.use_dora else "")

    @property
    def size(self) -> str:
        return (
            f"{format_count(self.summary['trainable_parameters'])} trained parameters on "
            f"{format_count(self.summary['total_parameters'] - self.summary['trainable_parameters'])}"
        )

    @property
    def seconds(self) -> str:
        return format_seconds(self.summary["seconds"])

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """The files of the rows: split, name, examples, sha256."""
        data = self._run.folder.read_metadata("data.json")
        return [
            {
                "split": split,
                "name": self._names.shorten_paths(file),
                "examples": data[split]["examples_by_file"].get(file, 0),
                "sha256": Verbatim(sha256 or "not a file"),
            }
            for split in ("train", "validation")
            for file, sha256 in (data.get(split) or {}).get("files", {}).items()
        ]

    @property
    def examples(self) -> dict[str, Any]:
        """Examples that were trained and validated on, and their domains."""
        data = self._run.folder.read_metadata("data.json")
        return {name: data[name] for name in ("train_examples", "validation_examples", "domains")}

    @cached_property
    def losses(self) -> list[MeasureRow]:
        """Validation losses of the base and of the pushed adapter: over all rows, by domain, by file."""
        lines = [line for line in self._metric_lines if line.get("kind") in ("base", "validation")]
        base = next((line for line in lines if line["kind"] == "base"), None)
        ours = [line for line in lines if line["kind"] == "validation" and line["step"] == self.summary["adapter_step"]]
        if not ours:
            return []
        return [self._loss_row(*part) for part in _iterate_losses(base or {}, ours[-1])]

    def _loss_row(self, name: str, base: float | None, value: float) -> MeasureRow:
        name = self._names.shorten_paths(name)
        if base is None:
            return MeasureRow(name, "-", format_measure("loss", value), "-")
        return MeasureRow(
            name, format_measure("loss", base), format_measure("loss", value), format_measure("loss", value - base, "+")
        )

    @cached_property
    def comparison(self) -> dict[str, Any] | None:
        """What `training-lens compare` found, where it was run: rows, files, measures of base and adapter."""
        path = self._run.folder.reports / "compare.json"
        if not path.is_file():
            return None
        report = read_sealed(path)
        if "adapter" not in report:  # its losses were no numbers: there is a verdict alone
            return None
        shown = [m for m in report["adapter"] if m in report["base"] and m in report["delta"]]
        return {
            "rows": report["rows"],
            "verdict": report.get("verdict", {}).get("sentence", ""),
            "files": ", ".join(self._names.shorten_paths(file) for file in report["files"]),
            "confidence": f"{report['confidence']:.0%}",
            "measures": [(_measure_row(m, report), _format_interval(m, report)) for m in shown],
        }

    @property
    def settings(self) -> Verbatim:
        """The config as YAML, what differs from the defaults."""
        import yaml

        ours, usual = self._run.settings, TrainingConfig().model_dump(mode="json")
        others = {name: {k: v for k, v in ours[name].items() if v != usual[name][k]} for name in SECTIONS}
        given = {name: self._names.shorten_paths(keys) for name, keys in others.items() if keys}
        return Verbatim(yaml.safe_dump(given, sort_keys=False, allow_unicode=True).rstrip())

    @property
    def versions(self) -> str:
        environment = self._run.folder.read_metadata("environment.json")
        packages = {"training-lens": environment["training_lens"], **environment["packages"]}
        return ", ".join(f"{name} {version}" for name, version in packages.items())

    @property
    def base_code(self) -> Verbatim:
        """What loads the base, as arguments of Python."""
        if self.base_is_embedded:
            return Verbatim(f"embedded.resolve_name({json.dumps(embedded.MODEL)})")
        return _from_pretrained_arguments(self.base, None if self.base_is_local else self._run.config.model.revision)

    @property
    def repo_code(self) -> Verbatim:
        return _from_pretrained_arguments(self.repo, self.revision)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are made by the tokenizer's chat template, which is pushed with it."""
        return self._run.config.data.template == "chat"

    @cached_property
    def curve(self) -> Verbatim:
        """The training loss from the first step to the last, as blocks."""
        return Verbatim(render_sparkline([line["loss"] for line in self._metric_lines if line.get("kind") == "step"]))

    @cached_property
    def lens(self) -> dict[str, Any] | None:
        """What the lens saw; None where it was off."""
        from training_lens.analysis.reports.facts import read_certificate, read_changes

        if self._run.analysis is None:
            return None
        analysis = self._run.analysis.analyze()
        weights = analysis.results.get("weights", {})
        return {
            "certificate": self._names.shorten_text(read_certificate(analysis.recording).as_sentence()),
            "changed": self._names.shorten_text(read_changes(analysis.recording).as_sentence()),
            "layers": _format_shares(weights.get("share_by_layer", {})),
            "kinds": _format_shares(weights.get("share_by_kind", {})),
            "findings": [self._describe_finding(finding) for finding in analysis.findings],
        }

    def _describe_finding(self, finding: Finding) -> dict[str, str]:
        texts = {"title": finding.title, "where": finding.where, "measured": finding.measured}
        return {"severity": finding.severity, **{key: self._names.shorten_text(text) for key, text in texts.items()}}

    @cached_property
    def _metric_lines(self) -> list[dict[str, Any]]:
        path = self._run.folder.metrics_file
        return read_metrics(path) if path.is_file() else []


def _iterate_losses(base: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float]]:
    """Name, the base's loss where it is known, and ours: of all rows, of each domain, of each file."""
    yield "all rows", base.get("loss"), ours["loss"]
    for kind, said in (("by_domain", "domain "), ("by_file", "")):
        before = base.get(kind, {})
        yield from ((f"{said}{key}", before.get(key), loss) for key, loss in ours[kind].items())


def _measure_row(measure: str, report: Mapping[str, Any]) -> MeasureRow:
    base, adapter, delta = (format_measure(measure, report[side][measure]) for side in ("base", "adapter", "delta"))
    return MeasureRow(measure, base, adapter, delta if delta.startswith("-") else f"+{delta}")


def _format_interval(measure: str, report: Mapping[str, Any]) -> str:
    ends = report["intervals"].get(measure)
    return " to ".join(format_measure(measure, end, "+") for end in ends) if ends else "-"


def _format_shares(shares: Mapping[str, float | None]) -> list[tuple[str, str]]:
    return [(str(name), f"{share:.1%}") for name, share in shares.items() if share is not None]


def _from_pretrained_arguments(name: str, revision: str | None) -> Verbatim:
    """A repository and its branch as arguments of `from_pretrained`."""
    return Verbatim(json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else ""))


def _dataset_id(source: str) -> str:
    """The hub's id in hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]."""
    return "/".join(re.split("[@:]", source.removeprefix("hub:"))[0].split("/")[:2])
