"""The benchmarks: each module has a tuple `TASKS`."""
