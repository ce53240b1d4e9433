"""From sources to batches: records, examples, rows, iterators."""
