"""Wilson and bootstrap intervals, the metrics that they are of, rho, and stratified subsets."""

import math

import oracles
import pytest
import strategies as draw
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

import absld
from absld.data.dataset import stratified
from absld.evaluation.intervals import bootstrap, resampled, wilson
from absld.metrics import METRICS, rho

counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# --- Wilson ---


@given(counts)
def test_wilson_solves_its_equation(count):
    """The ends are the shares p from which what was seen is 1.96 standard errors away."""
    right, images = count
    share, low, high = wilson(right, images)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / images, abs=1e-12)
    mirrored = wilson(images - right, images)
    assert mirrored.low == pytest.approx(1 - high) and mirrored.high == pytest.approx(1 - low)


@pytest.mark.parametrize("images", [10, 60, 400])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_wilson_holds_the_truth_about_as_often_as_promised(images, share):
    """By summing over all outcomes; the least coverage of Wilson's interval is known to be about
    0.83, near the ends, its mean 0.95."""
    held = 0.0
    for right in range(images + 1):
        chance = math.comb(images, right) * share**right * (1 - share) ** (images - right)
        _, low, high = wilson(right, images)
        held += chance * (low <= share <= high)
    assert held > (0.91 if images * min(share, 1 - share) > 3 else 0.83)


def test_wilson_of_nothing_is_no_number():
    assert all(math.isnan(value) for value in wilson(0, 0))


def test_wilson_by_the_spec():
    """Half-widths stated there: 1,000 images at 25 %, 100 images."""
    for images, half in ((1000, 0.027), (100, 0.085)):
        _, low, high = wilson(images // 4, images)
        assert (high - low) / 2 == pytest.approx(half, abs=2e-3)


# --- Metrics ---


@given(draw.vectors(0.01, 1))
def test_metrics_are_their_formulas(accuracy):
    values = accuracy.tolist()
    mean, worst, nsd = oracles.fairness(values)
    expected = {
        "average": mean,
        "worst": worst,
        "worst_tenth": oracles.worst_tenth(values),
        "gap": max(values) - worst,
        "normalized_std": nsd,
    }
    for name, metric in METRICS.items():
        assert_close(metric(accuracy), expected[name], terms=10 * len(values))
    assert METRICS["gap"](accuracy) >= 0
    many = torch.stack([accuracy, accuracy.flip(0)]).expand(3, 2, -1)
    for metric in METRICS.values():
        assert metric(many).shape == (3, 2)
        assert torch.equal(metric(many)[0], metric(many)[2])
        assert torch.allclose(metric(many)[0, 0], metric(accuracy), rtol=1e-14)


def test_rho():
    base, none = torch.tensor([0.2, 0.8]), torch.tensor([0.0, 1.0])
    assert rho(base, base).item() == 0
    assert rho(torch.tensor([0.85, 0.25]), base).item() == pytest.approx(0.25 + 0.1)
    assert rho(none, none).item() == 0
    assert rho(torch.tensor([0.1, 0.9]), none).item() == math.inf


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
    values = resampled(right, labels, generator(), 4000)
    assert values.shape == (4000, 1, 3)
    share = right.view(3, 200).double().mean(1)
    error = (share * (1 - share) / 200).sqrt()
    # Four standard errors of a mean and of a deviation over 4,000 replicates.
    assert ((values[:, 0].mean(0) - share).abs() <= 4 * error / 4000**0.5).all()
    assert ((values[:, 0].std(0) - error).abs() <= 4 * error / 8000**0.5).all()
    assert (values[:, 0, 2] == 1).all()


def test_replicates_are_paired_and_repeatable():
    right, labels = drawn([[0.3, 0.8], [0.5, 0.6]], 30)
    twice = resampled(torch.cat([right, right]), labels, generator(), 50)
    assert torch.equal(twice[:, :2], twice[:, 2:])
    assert torch.equal(resampled(right, labels, generator(), 50), twice[:, :2])
    assert not torch.equal(resampled(right, labels, generator(1), 50), twice[:, :2])
    # What is right in both stays right in both, however often an image is drawn.
    both = resampled(torch.stack([right[0], right[0] | right[1]]), labels, generator(), 50)
    assert (both[:, 0] <= both[:, 1]).all()


def test_only_classes_with_images_are_resampled():
    right, labels = drawn([[0.5, 0.5, 0.5]], 10)
    values = resampled(right[:, labels != 1], labels[labels != 1], generator(), 20)
    assert values.shape == (20, 1, 2)


def test_the_percentiles_are_reflected_and_cut():
    replicates = torch.linspace(0, 1, 1001, dtype=torch.double)
    assert tuple(bootstrap(0.6, replicates)) == pytest.approx((0.6, 0.225, 1.175))
    assert tuple(bootstrap(0.6, replicates, 0.3, 1.0)) == pytest.approx((0.6, 0.3, 1.0))


@given(st.floats(0, 1), draw.vectors(0, 1))
def test_an_interval_holds_its_own_value(value, replicates):
    """Where all is nearly equal, every replicate of a gap or an NSD is above the figure."""
    shown, low, high = bootstrap(value, replicates, 0.0, 1.0)
    assert shown == value and 0 <= low <= value <= high <= 1


def test_the_interval_of_an_average_holds_the_truth():
    held = 0
    for seed in range(200):
        right, labels = drawn([[0.3, 0.6, 0.8]], 60, seed)
        share = right.view(3, 60).double().mean()
        values = METRICS["average"](resampled(right, labels, generator(seed), 400))[:, 0]
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
    data = absld.ImageSet(draw.images(0, 6), torch.arange(6) % 2, ("a", "b"))
    some = data.subset(torch.tensor([4, 1]))
    assert torch.equal(some.images, data.images[[4, 1]]) and some.labels.tolist() == [0, 1]
    assert some.classes == data.classes
