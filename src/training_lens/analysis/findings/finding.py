"""What a finding is, and the part of it that is the same in every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["problem", "warning", "note", "fine"]
Confidence = Literal["sure", "likely", "could not tell"]


@dataclass(frozen=True)
class Finding:
    """One answer about a run: what was looked for, what was measured, and what to do.

    `severity` is `problem` (the run is spoilt), `warning` (it could be better), `note` (good to know, or nobody can
    tell) or `fine` (looked for, and not there). `where` names modules, layers or steps; empty means the whole run.
    `threshold` says what counts as much, and `source` where that comes from. `decide` is what would settle a finding
    that is not sure. `evidence` has plain numbers and lists of them, for pictures and for JSON.
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


@dataclass(frozen=True)
class Rule:
    """What a finding says in every run; `action` is what to do where the symptom is there.

    Example:
        >>> rule = Rule("idle", "no step", "0 steps", "the loop", "start it")
        >>> rule.fine("It runs", "12 steps").action
        ''
    """

    code: str
    signature: str
    threshold: str
    source: str
    action: str

    def report_symptom(
        self,
        severity: Severity,
        title: str,
        measured: str,
        *,
        where: str = "",
        confidence: Confidence = "likely",
        action: str | None = None,
        decide: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> Finding:
        """The symptom is there. `action` replaces the rule's where the run says more exactly what to do."""
        return Finding(
            self.code, severity, title, where, self.signature, measured, self.threshold, self.source, confidence,
            self.action if action is None else action, decide, evidence or {},
        )  # fmt: skip

    def report_fine(
        self, title: str, measured: str, confidence: Confidence = "sure", evidence: Mapping[str, Any] | None = None
    ) -> Finding:
        """It was looked for and is not there."""
        return self.report_symptom("fine", title, measured, confidence=confidence, action="", evidence=evidence)

    def report_inconclusive(
        self, title: str, measured: str, decide: str, evidence: Mapping[str, Any] | None = None, where: str = ""
    ) -> Finding:
        """The data do not decide; `decide` says what would."""
        return self.report_symptom(
            "note", title, measured, where=where, confidence="could not tell", action="", decide=decide,
            evidence=evidence,
        )  # fmt: skip
