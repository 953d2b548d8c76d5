"""Assert that two float64 results are equal up to rounding."""

import torch
from hypothesis import target

EPS = torch.finfo(torch.float64).eps


def assert_close(actual, expected, *, scale=1.0, terms=100, label=None):
    """Assert a difference of at most `terms` roundings of numbers as large as `scale`.

    A label makes Hypothesis search for the inputs with the largest error.
    """
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    error = (actual - expected).abs().max().item()
    bound = terms * EPS * max(scale, 1.0)
    if label:
        target(error / bound, label=label)
    assert error <= bound, f"apart by {error}, allowed is {bound}"
