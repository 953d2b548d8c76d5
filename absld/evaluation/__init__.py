"""Class-wise robustness: attacks, worst case, intervals, sanity checks, results."""
