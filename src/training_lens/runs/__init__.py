"""A run on disk: its folder, its checkpoints, its journal, and the listing of runs."""
