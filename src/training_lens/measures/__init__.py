"""Pure functions of tensors: what collectors and analyzers compute."""
