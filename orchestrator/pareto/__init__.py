"""Pareto fronts, and the improvement that a candidate is expected to bring."""
