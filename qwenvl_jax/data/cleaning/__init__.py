"""Cleaning of picture-text pairs, as Appendix A of the paper lists it."""
