"""An adapter in the forms that other programs load, and how far each was checked."""
