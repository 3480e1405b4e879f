"""Using a trained adapter: sessions and generation."""
