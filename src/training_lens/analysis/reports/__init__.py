"""Reports of a run (summary, technical, diagnostic) and of two runs side by side, as HTML, Markdown and JSON."""
