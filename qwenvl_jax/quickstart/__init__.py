"""The quickstart: recipe, evaluation and report of a small model on a CPU."""
