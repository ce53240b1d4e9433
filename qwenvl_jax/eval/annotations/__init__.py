"""Readers of benchmarks' official files that no training data comes in.

The others are those of `data.readers`. An annotation that cannot be used ends
the reading with a `DataError`: a score over part of a benchmark is none.
"""
