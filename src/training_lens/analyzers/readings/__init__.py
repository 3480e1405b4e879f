"""What captures say: the built-in analyzers, one for each subject."""
