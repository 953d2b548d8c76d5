"""The laws of Wilson and bootstrap intervals, and of stratified subsets."""

import math

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from hypothesis import given
from hypothesis import strategies as st

import absld
from absld.data.dataset import stratified
from absld.evaluation.intervals import bootstrap, resample, wilson
from absld.metrics import METRICS

counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# --- Wilson ---


@given(counts)
def test_the_ends_of_wilsons_interval_are_the_roots_of_its_equation(count):
    right, images = count
    share, low, high = wilson(right, images)
    assert 0 <= low <= share <= high <= 1
    assert (low, high) == pytest.approx(oracles.wilson(*count, 1.959963984540054), abs=1e-9)
    assert (low == 0) <= (right == 0) and (high == 1) <= (right == images)
    if right < images:  # one more is better, at both ends
        more = wilson(right + 1, images)
        assert low < more.low and high < more.high
    mirrored = wilson(images - right, images)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low))
    # Ten times the images: an interval inside this one.
    _, inner_low, inner_high = wilson(10 * right, 10 * images)
    assert low <= inner_low <= inner_high <= high


def test_wilson_of_no_image_and_of_all_images_right_ends_at_0_and_1():
    """Exactly, in spite of rounding."""
    for images in range(1, 60):
        none, every = wilson(0, images), wilson(images, images)
        assert (none.value, none.low) == (0.0, 0.0) and (every.value, every.high) == (1.0, 1.0)
        assert none.high < 1 and every.low > 0


@pytest.mark.parametrize("images", [10, 60, 400])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_wilsons_interval_covers_the_truth(images, share):
    """By summing over all outcomes; the least coverage of Wilson's interval is known to be about
    0.83, near the ends, its mean 0.95."""
    held = 0.0
    for right in range(images + 1):
        chance = math.comb(images, right) * share**right * (1 - share) ** (images - right)
        _, low, high = wilson(right, images)
        held += chance * (low <= share <= high)
    assert held > (0.91 if images * min(share, 1 - share) > 3 else 0.83)


def test_wilson_of_no_images_is_nan():
    assert all(math.isnan(value) for value in wilson(0, 0))


# --- Bootstrap ---


def drawn(shares, images, seed=0):
    """right (m,n) and labels (n,) of classes with such shares (m,C)."""
    labels = torch.arange(len(shares[0])).repeat_interleave(images)
    random = torch.Generator().manual_seed(seed)
    right = torch.rand(len(shares), len(labels), generator=random) < torch.tensor(shares)[:, labels]
    return right, labels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_replicates_have_the_mean_and_the_spread_of_binomials():
    right, labels = drawn([[0.3, 0.8, 1.0]], 200)
    values = resample(right, labels, generator(), 4000)
    assert values.shape == (4000, 1, 3)
    share = right.view(3, 200).double().mean(1)
    error = (share * (1 - share) / 200).sqrt()
    # Four standard errors of a mean and of a deviation over 4,000 replicates.
    assert ((values[:, 0].mean(0) - share).abs() <= 4 * error / 4000**0.5).all()
    assert ((values[:, 0].std(0) - error).abs() <= 4 * error / 8000**0.5).all()
    assert (values[:, 0, 2] == 1).all()


def test_replicates_of_two_images_have_their_probabilities():
    """One of two is right: none, one or both draws are it. Classes are drawn apart. Five standard
    errors of 20,000 replicates."""
    right, labels = torch.tensor([[True, True, False, False]]), torch.tensor([0, 1, 0, 1])
    values = resample(right, labels, generator(), 20000)[:, 0]
    for a in (0.0, 0.5, 1.0):
        for b in (0.0, 0.5, 1.0):
            share = ((values[:, 0] == a) & (values[:, 1] == b)).double().mean().item()
            expected = (0.5 if a == 0.5 else 0.25) * (0.5 if b == 0.5 else 0.25)
            assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / 20000)


def test_replicates_are_paired_and_repeatable():
    right, labels = drawn([[0.3, 0.8], [0.5, 0.6]], 30)
    twice = resample(torch.cat([right, right]), labels, generator(), 50)
    assert torch.equal(twice[:, :2], twice[:, 2:])
    assert torch.equal(resample(right, labels, generator(), 50), twice[:, :2])
    assert not torch.equal(resample(right, labels, generator(1), 50), twice[:, :2])
    # What is right in both stays right in both, however often an image is drawn.
    both = resample(torch.stack([right[0], right[0] | right[1]]), labels, generator(), 50)
    assert (both[:, 0] <= both[:, 1]).all()


def test_only_classes_with_images_are_resampled():
    right, labels = drawn([[0.5, 0.5, 0.5]], 10)
    values = resample(right[:, labels != 1], labels[labels != 1], generator(), 20)
    assert values.shape == (20, 1, 2)


def test_the_percentiles_are_reflected_and_cut():
    replicates = torch.linspace(0, 1, 1001, dtype=torch.double)
    assert tuple(bootstrap(0.6, replicates)) == pytest.approx((0.6, 0.225, 1.175))
    assert tuple(bootstrap(0.6, replicates, 0.3, 1.0)) == pytest.approx((0.6, 0.3, 1.0))


@given(draw.vectors(-3, 3, minimum=50, maximum=90), st.floats(-2, 2))
def test_an_interval_moves_and_mirrors_with_its_figure(replicates, move):
    value = replicates.mean().item()
    low, high = bootstrap(value, replicates)[1:]
    assert low <= value <= high
    moved = bootstrap(value + move, replicates + move)
    assert tuple(moved) == pytest.approx((value + move, low + move, high + move))
    mirrored = bootstrap(-value, -replicates)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low))


@given(draw.vectors(0, 1, minimum=2, maximum=50), st.floats(0, 1))
def test_an_interval_holds_its_figure_and_keeps_in_range(replicates, value):
    _, low, high = bootstrap(value, replicates, 0.0, 1.0)
    assert 0 <= low <= value <= high <= 1
    same = bootstrap(value, torch.full_like(replicates, value))
    assert tuple(same) == (value, value, value)


def test_infinite_replicates_count_as_far_ones():
    """As of rho, over a worst class of 0."""
    replicates = torch.linspace(0, 1, 1001, dtype=draw.DTYPE)
    plain = bootstrap(0.5, replicates)
    replicates[-10:] = math.inf
    assert bootstrap(0.5, replicates) == plain
    replicates[-50:] = math.inf
    assert bootstrap(0.5, replicates) == plain._replace(low=-math.inf)


def test_the_bootstrap_interval_of_an_average_covers_the_truth():
    held = 0
    for seed in range(200):
        right, labels = drawn([[0.3, 0.6, 0.8]], 60, seed)
        share = right.view(3, 60).double().mean()
        values = METRICS["average"](resample(right, labels, generator(seed), 400))[:, 0]
        low, high = bootstrap(share.item(), values)[1:]
        held += low <= 1.7 / 3 <= high
    assert held >= 200 * 0.95 - 4 * (200 * 0.95 * 0.05) ** 0.5  # four standard errors


# --- Stratified subsets ---


@given(st.lists(st.integers(0, 30), min_size=2, max_size=6), st.integers(1, 60), draw.seeds)
def test_a_subset_is_in_proportion_and_leaves_no_class_out(sizes, size, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if not len(labels):
        return
    labels = labels[torch.randperm(len(labels), generator=generator(seed))]
    chosen = stratified(labels, len(sizes), size, "test", seed)
    assert len(chosen) == min(size, len(labels))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    found = labels[chosen].bincount(minlength=len(sizes))
    present = sum(n > 0 for n in sizes)
    if size >= present:
        assert all(k > 0 for k, n in zip(found.tolist(), sizes, strict=True) if n)
    for k, n in zip(found.tolist(), sizes, strict=True):
        exact = n * len(chosen) / len(labels)
        assert abs(k - exact) <= 1 + present  # one of each class comes first
    assert torch.equal(stratified(labels, len(sizes), size, "test", seed), chosen)
    assert torch.equal(stratified(labels, len(sizes), None), torch.arange(len(labels)))


def test_a_subset_of_a_set():
    data = absld.InMemoryImages(draw.images(0, 6), torch.arange(6) % 2, ("a", "b"))
    some = data.subset(torch.tensor([4, 1]))
    assert torch.equal(some.images, data.images[[4, 1]]) and some.labels.tolist() == [0, 1]
    assert some.classes == data.classes
