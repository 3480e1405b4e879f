"""Figures of a recording: pure functions that return Plotly figures, with a bounded number of points."""
