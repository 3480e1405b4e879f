"""How good a model is on rows: losses, scores, comparisons."""
