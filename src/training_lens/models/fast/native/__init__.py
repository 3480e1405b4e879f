"""Passes over tensors on a CPU, in C: what torch does in several calls, each in one, without the sums between."""
