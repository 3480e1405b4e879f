"""An adapter in the forms that other programs load, verified."""
