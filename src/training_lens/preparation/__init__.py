"""Prepare files of rows as clean, deduplicated splits."""
