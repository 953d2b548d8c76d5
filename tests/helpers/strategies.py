"""Strategies of Hypothesis. Small matrices are drawn as values, so that failures shrink; images and
networks come from a drawn seed."""

import torch
from hypothesis import strategies as st

DTYPE = torch.float64
classes = st.integers(2, 6)
sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.5, 5.0)


@st.composite
def matrices(draw, rows=sizes, columns=classes, bound=20.0):
    """(N,C) float64."""
    n, c = draw(rows), draw(columns)
    values = st.floats(-bound, bound, allow_subnormal=False)
    flat = draw(st.lists(values, min_size=n * c, max_size=n * c))
    return torch.tensor(flat, dtype=DTYPE).reshape(n, c)


@st.composite
def labelled(draw, bound=20.0):
    """Logits (N,C), labels (N,), temperatures (C,)."""
    logits = draw(matrices(bound=bound))
    n, c = logits.shape
    labels = torch.tensor(draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n)))
    temperature = torch.tensor(draw(st.lists(temperatures, min_size=c, max_size=c)), dtype=DTYPE)
    return logits, labels, temperature


def vectors(low, high, minimum=2, maximum=8):
    """(C,) float64."""
    values = st.floats(low, high, allow_subnormal=False)
    return st.lists(values, min_size=minimum, max_size=maximum).map(
        lambda drawn: torch.tensor(drawn, dtype=DTYPE)
    )


def images(seed, n=4, side=8, dtype=DTYPE):
    """Return (N,3,side,side) in [0,1], with some pixels at the ends."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, 3, side, side, generator=random, dtype=dtype) * 1.2 - 0.1
    return drawn.clamp(0, 1)


def on_a_grid(low, high):
    """Multiples of 1/64, whose sums and differences are exact."""
    return st.integers(64 * low, 64 * high).map(lambda value: value / 64)
