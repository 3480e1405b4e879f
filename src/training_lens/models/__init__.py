"""Base models, adapters, and the kernels between them and the loss."""
