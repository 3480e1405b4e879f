"""The schema of a run's configuration, and how it is composed."""
