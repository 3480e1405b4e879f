"""An adapter merged into plain weights, and verified."""
