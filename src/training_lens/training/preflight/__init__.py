"""Checks before the first step, on the tokenized rows and the loaded base. See `check_plan`."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach({"training_lens.training.preflight.check_plan": ("check_plan", "log_findings")})
