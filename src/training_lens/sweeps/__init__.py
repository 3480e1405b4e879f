"""Hyperparameter sweeps: many runs to find the best settings."""
