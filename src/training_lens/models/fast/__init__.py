"""The fast path: kernels in place of modules, for training and for decoding."""
