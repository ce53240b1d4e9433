"""Runs a stage on a TPU pod; standard library only, Python 3.9 or newer."""
