"""Files of rows to clean splits."""
