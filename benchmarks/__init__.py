"""Measurements reported in benchmarks/LOG.md. None of them is a test."""
