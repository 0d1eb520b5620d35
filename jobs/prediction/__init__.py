"""Predict before measuring: layer sensitivity, and latency from a measured table."""
