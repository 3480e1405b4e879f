"""The rows of a combination: those of all its runs, where one config can name them, or else the first run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from training_lens.combining.parents import Parent
from training_lens.config.data_sections import DataSection
from training_lens.config.run_config import read_run_config
from training_lens.data.fields import are_plain_texts

# Keys of the data section that say which rows a run takes, not how they are read or become text.
CHOOSING = {"train", "weights", "validation", "max_examples", "exclude", "canaries", "canary_repeats", "date"}
LARGEST = {"longest", "seq_len_for_99_percent"}  # counts of a split's report that are no sums
Report = dict[str, Any]


@dataclass(frozen=True)
class CombinedData:
    """Its data section, its metadata/data.json, and the ids of its held-out rows where it has data.val_ratio."""

    section: dict[str, Any]
    report: Report
    held_out: list[str] | None
    is_of_all: bool


def combine_data(parents: Sequence[Parent]) -> CombinedData:
    """The rows of all runs, if these read them alike; with the domains of all in any case."""
    sections = [read_run_config(parent.run).data for parent in parents]
    reports: list[Report] = [parent.run.read_metadata("data.json") for parent in parents]
    held_out = [
        parent.run.read_metadata("held_out.json") if section.val_ratio else None
        for parent, section in zip(parents, sections, strict=True)
    ]
    domains = sorted({domain for report in reports for domain in report["domains"]})
    values = sections[0].explicit_values()
    if not _can_join(sections, reports):
        return CombinedData(values, {**reports[0], "domains": domains}, held_out[0], False)
    values = {key: value for key, value in values.items() if key not in CHOOSING - {"date"}}
    values["train"] = list(dict.fromkeys(source for section in sections for source in section.train))
    if held_out[0] is not None:
        return CombinedData(values, _join_reports(reports), [row for ids in held_out for row in ids or ()], True)
    values["validation"] = list(dict.fromkeys(s for section in sections for s in section.validation_sources))
    return CombinedData(values, _join_reports(reports), None, True)


def _can_join(sections: Sequence[DataSection], reports: Sequence[Report]) -> bool:
    """Whether one section can name the rows of all: read alike, and held out or left out by ids that are not mixed."""
    read = [{key: value for key, value in s.model_dump().items() if key not in CHOOSING} for s in sections]
    kinds = {are_plain_texts(r["train"]["mappings"].values(), s.fields) for r, s in zip(reports, sections, strict=True)}
    paths = [source for section in sections for source in (*section.train, *section.validation_sources)]
    if any(one != read[0] for one in read) or len(kinds) > 1 or not all(isinstance(path, str) for path in paths):
        return False
    if not sections[0].val_ratio and not all(section.validation_sources for section in sections):
        return False
    by_ids = sections[0].val_ratio or any("excluded" in report for report in reports)
    files = [set(report["train"]["files"]) for report in reports]
    return not by_ids or not any(one & other for one, other in combinations(files, 2))


def _join_reports(reports: Sequence[Report]) -> Report:
    joined = {**reports[0], "domains": sorted({d for report in reports for d in report["domains"]})}
    joined.pop("canaries", None)
    for name in ("train_examples", "validation_examples"):
        joined[name] = sum(report[name] for report in reports)
    if excluded := [row for report in reports for row in report.get("excluded", ())]:
        joined["excluded"] = excluded
    for split in ("train", "validation"):
        if all(split in report for report in reports):
            joined[split] = _join_splits([report[split] for report in reports])
    return joined


def _join_splits(splits: Sequence[Mapping[str, Any]]) -> Report:
    joined: Report = {}
    for name, value in splits[0].items():
        values = [split[name] for split in splits if name in split]
        if isinstance(value, dict):
            joined[name] = {key: one for each in values for key, one in each.items()}
        elif isinstance(value, int):
            joined[name] = max(values) if name in LARGEST else sum(values)
        else:
            joined[name] = value
    return joined
