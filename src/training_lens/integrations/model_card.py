"""The model card of a run: what the adapter is, its training data, how good it is, and how to load it.

Every number is from the run's files. Text of data and findings is escaped, and paths are shortened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from training_lens import embedded
from training_lens.config.schema import TrainingConfig
from training_lens.display.markdown import escape_markdown
from training_lens.evaluation.verdict import format_measure
from training_lens.integrations.hub_files import SECTIONS, PathShortener, is_local_folder
from training_lens.integrations.record import RunRecord
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.formatting import format_count, format_seconds, render_sparkline
from training_lens.utils.integrity import read_sealed
from training_lens.utils.secrets import redact_text

TEMPLATE = "model_card.md.jinja"
DATASET_ID = re.compile("hub:([^@:/]+(?:/[^@:/]+)?)")  # OWNER/NAME in hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]


class Verbatim(str):
    """Text that the template does not escape: code, YAML, Markdown."""


class MeasureRow(NamedTuple):
    """A measure of the base and of the adapter, formatted."""

    name: str
    base: str
    adapter: str
    change: str


def render_model_card(run: RunRecord, names: PathShortener, repo: str, revision: str | None = None) -> str:
    """The README.md of the repository `repo` for a finished run: YAML front matter, then Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701 (Markdown: `_escape_value` escapes Markdown and HTML)
        loader=PackageLoader("training_lens.integrations", "."),
        finalize=_escape_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    card = _Card(run, names, repo, revision)
    return redact_text(environment.get_template(TEMPLATE).render(card=card)).rstrip() + "\n"


def _escape_value(value: Any) -> Any:
    """`value` on one line, escaped for Markdown and HTML."""
    if isinstance(value, Verbatim) or not isinstance(value, str):
        return value
    return escape_markdown(" ".join(value.split())) if value.strip() else ""


class _Card:
    """The values of the template."""

    def __init__(self, run: RunRecord, names: PathShortener, repo: str, revision: str | None) -> None:
        self._run, self._names = run, names
        self.title = repo.split("/")[-1]
        self.summary, self.peft, self.training = run.summary, run.config.peft, run.config.training
        self.date = run.config.data.date
        self.base = names.base
        self.base_is_embedded = run.config.model.id == embedded.MODEL
        self.base_is_local = self.base_is_embedded or is_local_folder(run.config.model.id)
        self.has_new_tokens = bool(run.config.data.new_tokens) or run.config.model.resize_embeddings
        self.scale = run.folder.adapter_scale
        self.is_chat = run.config.data.template == "chat"  # the tokenizer, which is pushed, has the chat template
        self.seconds = format_seconds(self.summary["seconds"])
        trained, total = (self.summary[f"{which}_parameters"] for which in ("trainable", "total"))
        self.size = f"{format_count(trained)} trained parameters on {format_count(total - trained)}"
        self._metric_lines = read_metrics(run.folder.metrics_file) if run.folder.metrics_file.is_file() else []
        losses = [line["loss"] for line in self._metric_lines if line.get("kind") == "step"]
        self.curve = Verbatim(render_sparkline(losses))  # the training loss of all steps
        self.repo_code = _from_pretrained_arguments(repo, revision)

    @property
    def front_matter(self) -> Verbatim:
        """The YAML that the hub reads."""
        import yaml

        values: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
        values["tags"] = ["lora", "training-lens", *(["dora"] if self.peft.use_dora else [])]
        if not self.base_is_local:  # a folder's name could be that of a repository of somebody else
            values |= {"base_model": self.base, "base_model_relation": "adapter"}
        hubs = {found[1] for source in self._run.config.data.train if (found := DATASET_ID.match(str(source)))}
        if hubs:
            values["datasets"] = sorted(hubs)
        if results := self._evaluation_results():
            values["model-index"] = [{"name": self.title, "results": results}]
        return Verbatim(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())

    def _evaluation_results(self) -> list[dict[str, Any]]:
        """The validation loss in the form of the hub's leaderboards; empty if nothing was validated."""
        loss, files = self.summary["validation_loss"], [file for file in self.files if file["split"] == "validation"]
        if loss is None:
            return []
        what = ", ".join(file["name"] for file in files) or "held-out rows"
        metric = {"type": "loss", "value": loss, "name": "validation loss, nats per supervised token"}
        task = {"type": "text-generation", "name": "Text Generation"}
        return [{"task": task, "dataset": {"name": what, "type": "custom"}, "metrics": [metric]}]

    @property
    def variant(self) -> str:
        """The kind of adapter, such as 'rsLoRA with DoRA'."""
        name = {"lora": "LoRA", "rslora": "rsLoRA"}.get(self.peft.variant, self.peft.variant)
        return "DoRA" if self.peft.use_dora and name == "LoRA" else name + (" with DoRA" if self.peft.use_dora else "")

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """The data files: split, name, examples, sha256."""
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
        """The number of training and validation examples, and their domains."""
        data = self._run.folder.read_metadata("data.json")
        return {name: data[name] for name in ("train_examples", "validation_examples", "domains")}

    @cached_property
    def losses(self) -> list[MeasureRow]:
        """Validation losses of the base and the pushed adapter: over all rows, by domain, by file."""
        lines = [line for line in self._metric_lines if line.get("kind") in ("base", "validation")]
        base = next((line for line in lines if line["kind"] == "base"), None)
        pushed = ("validation", self.summary["adapter_step"])
        validations = [line for line in lines if (line["kind"], line["step"]) == pushed]
        rows = []
        for name, before, after in _iterate_losses(base or {}, validations[-1]) if validations else ():
            change = "-" if before is None else format_measure("loss", after - before, "+")
            old = "-" if before is None else format_measure("loss", before)
            rows.append(MeasureRow(self._names.shorten_paths(name), old, format_measure("loss", after), change))
        return rows

    @cached_property
    def comparison(self) -> dict[str, Any] | None:
        """The result of `training-lens compare`: rows, files, measures of base and adapter; None if it was not run."""
        path = self._run.folder.reports / "compare.json"
        if not path.is_file():
            return None
        report = read_sealed(path)
        if "adapter" not in report:  # its losses were not finite: there is only a verdict
            return None
        measures = []
        for measure in [m for m in report["adapter"] if m in report["base"] and m in report["delta"]]:
            base, adapter = (format_measure(measure, report[side][measure]) for side in ("base", "adapter"))
            row = MeasureRow(measure, base, adapter, format_measure(measure, report["delta"][measure], "+"))
            ends = report["intervals"].get(measure)
            measures.append((row, " to ".join(format_measure(measure, end, "+") for end in ends) if ends else "-"))
        return {
            "rows": report["rows"],
            "verdict": report.get("verdict", {}).get("sentence", ""),
            "files": ", ".join(self._names.shorten_paths(file) for file in report["files"]),
            "confidence": f"{report['confidence']:.0%}",
            "measures": measures,
        }

    @cached_property
    def combination(self) -> dict[str, Any] | None:
        """How several adapters were combined into this one, and their losses; None for an adapter that was trained."""
        record = self._run.folder.combination_record
        if not record.is_file():
            return None
        values = read_sealed(record)
        weights = {run["name"]: run["weight"] for run in values["runs"]}
        tasks = [
            {"name": Path(task["name"]).name, "weight": weights[task["name"]], "rows": task["rows"]}
            | {who: f"{task['losses'][key]:.4f}" for who, key in (("base", "base"), ("own", task["name"]))}
            | {"here": f"{task['losses']['combination']:.4f}"}
            for task in values["tasks"]
        ]
        return {"how": values["how"], "tasks": tasks, "warnings": values["warnings"]}

    @property
    def settings(self) -> Verbatim:
        """The settings that differ from the defaults, as YAML."""
        import yaml

        settings, defaults = self._run.settings, TrainingConfig().model_dump(mode="json")
        changed = {name: {k: v for k, v in settings[name].items() if v != defaults[name][k]} for name in SECTIONS}
        given = {name: self._names.shorten_paths(keys) for name, keys in changed.items() if keys}
        return Verbatim(yaml.safe_dump(given, sort_keys=False, allow_unicode=True).rstrip())

    @property
    def versions(self) -> str:
        environment = self._run.folder.read_metadata("environment.json")
        packages = {"training-lens": environment["training_lens"], **environment["packages"]}
        return ", ".join(f"{name} {version}" for name, version in packages.items())

    @property
    def base_code(self) -> Verbatim:
        """The Python arguments that load the base."""
        if self.base_is_embedded:
            return Verbatim(f"embedded.resolve_name({json.dumps(embedded.MODEL)})")
        return _from_pretrained_arguments(self.base, None if self.base_is_local else self._run.config.model.revision)

    @cached_property
    def lens(self) -> dict[str, Any] | None:
        """The results of the lens; None if it was off, or for a combination, which had no steps."""
        if self.combination:
            return None
        from training_lens.analysis.run_facts import read_certificate, read_changes

        if self._run.analysis is None:
            return None
        analysis = self._run.analysis.analyze()
        weights = analysis.results.get("weights", {})
        return {
            "certificate": self._names.shorten_text(read_certificate(analysis.recording).as_sentence()),
            "changed": self._names.shorten_text(read_changes(analysis.recording).as_sentence()),
            "layers": _format_shares(weights.get("share_by_layer", {})),
            "kinds": _format_shares(weights.get("share_by_kind", {})),
            "findings": [
                {"severity": finding.severity}
                | {key: self._names.shorten_text(getattr(finding, key)) for key in ("title", "where", "measured")}
                for finding in analysis.findings
            ],
        }


def _iterate_losses(base: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float]]:
    """Name, the base's loss if known, and the adapter's: over all rows, each domain, each file."""
    yield "all rows", base.get("loss"), ours["loss"]
    for kind, prefix in (("by_domain", "domain "), ("by_file", "")):
        before = base.get(kind, {})
        yield from ((f"{prefix}{key}", before.get(key), loss) for key, loss in ours[kind].items())


def _format_shares(shares: Mapping[str, float | None]) -> list[tuple[str, str]]:
    return [(str(name), f"{share:.1%}") for name, share in shares.items() if share is not None]


def _from_pretrained_arguments(name: str, revision: str | None) -> Verbatim:
    """A repository and its branch as arguments of `from_pretrained`."""
    return Verbatim(json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else ""))
