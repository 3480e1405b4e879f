"""The type of a finding, and the part of it that is the same for every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

from training_lens.display.html import Severity

Confidence = Literal["sure", "likely", "inconclusive"]


@dataclass(frozen=True)
class Finding:
    """One answer about a run: the signature of the symptom, what was measured, and what to do.

    `severity` is `problem` (the run is broken), `warning` (it could be better), `note` (good to know, or inconclusive)
    or `fine` (no symptom). `where` names modules, layers or steps; empty means the whole run. `source` is where the
    `threshold` comes from. `decide` says what would settle a finding that is not sure. `evidence` holds plain numbers
    and lists for figures and JSON.
    """

    code: str
    severity: Severity
    title: str
    where: str
    signature: str
    measured: str
    threshold: str
    source: str
    confidence: Confidence
    action: str = ""
    decide: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


class FindingDetails(TypedDict, total=False):
    """The fields of a `Finding` that depend on the run and have a default."""

    where: str
    confidence: Confidence
    action: str
    decide: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """The part of a finding that is the same for every run; `action` is what to do about the symptom."""

    code: str
    signature: str
    threshold: str
    source: str
    action: str

    def report_symptom(
        self, severity: Severity, title: str, measured: str, **details: Unpack[FindingDetails]
    ) -> Finding:
        """The symptom was found. `details` may replace the rule's `action` with a more precise one."""
        return Finding(
            *(self.code, severity, title, details.get("where", ""), self.signature, measured, self.threshold),
            source=self.source,
            confidence=details.get("confidence", "likely"),
            action=details.get("action", self.action),
            decide=details.get("decide", ""),
            evidence=details.get("evidence", {}),
        )

    def report_fine(
        self, title: str, measured: str, confidence: Confidence = "sure", evidence: Mapping[str, Any] | None = None
    ) -> Finding:
        """The symptom was looked for and not found."""
        return self.report_symptom("fine", title, measured, confidence=confidence, action="", evidence=evidence or {})

    def report_inconclusive(
        self, title: str, measured: str, decide: str, evidence: Mapping[str, Any] | None = None
    ) -> Finding:
        """The data is not enough to decide; `decide` says what would be."""
        details = FindingDetails(confidence="inconclusive", action="", decide=decide, evidence=evidence or {})
        return self.report_symptom("note", title, measured, **details)
