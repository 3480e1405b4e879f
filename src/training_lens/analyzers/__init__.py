"""Measures: pure functions of tensors, and what they say of captures."""
