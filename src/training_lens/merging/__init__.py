"""An adapter as plain weights, verified."""
