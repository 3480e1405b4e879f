"""The lens: what is captured, by whom, where it is kept, and how it is joined to a loop."""
