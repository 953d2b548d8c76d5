"""Whole runs: a training from data to test figures, and comparisons of several."""
