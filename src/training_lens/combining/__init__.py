"""Several adapters of one base combined into one adapter, which is verified and scored before it is called done."""
