"""Families of checkpoints: config files, conversion tables, what to leave out.

A family is what a released layout says of itself; `rules` has the mechanism.
"""
