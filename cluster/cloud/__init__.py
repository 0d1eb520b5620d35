"""Preemption notices and prices of clouds."""
