"""Rows to batches: sources, fields, templates, tokenization, preparation, batching."""
