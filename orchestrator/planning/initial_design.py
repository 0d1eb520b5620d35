"""The candidates that a search begins with."""

from __future__ import annotations

MAX_INITIAL_POINTS = 8
"""So many choices, of a quarter of all that may be tried, are solved for before the search."""
