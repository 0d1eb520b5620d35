"""Measure a model: what meters share, and the fresh process that times it."""
