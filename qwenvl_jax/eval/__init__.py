"""Scores on held-out data, and the report that shows them."""
