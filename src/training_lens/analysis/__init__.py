"""Reading a finished, running or broken-off run: analysis, findings, reports, pictures."""
