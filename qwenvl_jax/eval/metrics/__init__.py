"""Metrics in plain Python and NumPy."""
