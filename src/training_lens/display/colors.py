"""The colors of all charts: safe for color-blind readers, readable on light and dark pages."""

from __future__ import annotations

# Okabe and Ito (2008) without black (invisible on dark pages) and yellow (on white ones)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ALARM = "#D55E00"
INK, GRID = "#7d8590", "rgba(128, 128, 128, 0.25)"  # mid-grey, readable on both page colors
