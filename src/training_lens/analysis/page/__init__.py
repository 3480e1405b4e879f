"""What the page of a run shows, as JSON values: for the dashboard, the terminal and the static report."""
