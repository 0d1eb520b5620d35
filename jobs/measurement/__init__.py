"""Measure a model: the code that meters share, and the fresh process that times it."""
