"""The training loop: batches in, optimizer steps out."""
