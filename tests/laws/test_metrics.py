"""The laws of class-wise accuracy and fairness."""

import inspect
import math

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from helpers.implementations import both, evaluate, home
from helpers.tolerance import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
import absld_min
from absld.metrics import METRICS, class_hits, class_sums, present, rho, worst_tenth

accuracies = draw.vectors(0.01, 1)


@given(accuracies)
def test_worst_tenth_is_the_formula(accuracy):
    expected = oracles.worst_tenth(accuracy.tolist())
    assert_close(worst_tenth(accuracy), expected, label="worst tenth")
    absent = torch.cat([accuracy, torch.full((30,), float("nan"), dtype=accuracy.dtype)])
    assert worst_tenth(absent) == worst_tenth(accuracy)


@pytest.mark.parametrize(("classes", "worst"), [(2, 1), (10, 1), (19, 1), (20, 2), (100, 10)])
def test_worst_tenth_is_of_whole_classes_and_at_least_one(classes, worst):
    accuracy = torch.arange(classes, dtype=draw.DTYPE).flip(0) / classes
    assert worst_tenth(accuracy) == pytest.approx((worst - 1) / 2 / classes)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4))), st.integers(0, 9))
def test_class_hits_are_counted_and_add_up(pairs, cut):
    predicted, labels = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    hits = class_hits(predicted, labels, 5)
    assert hits.tolist() == [pairs.count((k, k)) for k in range(5)]
    parts = [class_hits(predicted[i], labels[i], 5) for i in (slice(cut), slice(cut, None))]
    assert torch.equal(parts[0] + parts[1], hits)


@pytest.mark.parametrize("wrong", [torch.zeros(1), torch.zeros(4, 1), torch.zeros(())])
def test_values_of_other_shapes_than_the_labels_are_refused(wrong):
    """They would be broadcast: each value would count for every image."""
    labels = torch.tensor([0, 1, 2, 0])
    for function in (class_hits, class_sums):
        with pytest.raises(ValueError, match=r"must be \(4\), not \("):
            inspect.unwrap(function)(wrong, labels, 3)
    with pytest.raises(ValueError, match=r"labels must be \(N\), not \(4, 1\)"):
        inspect.unwrap(class_sums)(torch.zeros(4), labels[:, None], 3)


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        (torch.ones(2, 3), r"class_accuracy must be \(C\), not \(2, 3\)"),
        (torch.tensor(0.5), r"class_accuracy must be \(C\), not \(\)"),
        (torch.full((3,), float("nan")), "no class has images"),
        (torch.ones(0), "no class has images"),
    ],
)
def test_fairness_of_anything_but_class_accuracies_is_refused(accuracy, message):
    """Of rows in one tensor, all would count as one."""
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(present)(accuracy)


def test_the_result_of_fairness_has_named_fields():
    result = absld.fairness(torch.tensor([0.5, 1.0]))
    assert (result.average, result.worst) == (0.75, 0.5)
    assert result.normalized_std == pytest.approx(0.25 / 0.75)


@both
def test_nsd_is_zero_where_all_fail(impl):
    assert tuple(impl.fairness(torch.zeros(3))) == (0.0, 0.0, 0.0)


@both
@given(accuracies, st.sampled_from([0, 1]))
def test_fairness_is_the_formula(impl, accuracy, ddof):
    result = impl.fairness(accuracy, ddof)
    assert_close(result, oracles.fairness(accuracy.tolist(), ddof), scale=100, label="fairness")
    assert result[1] <= result[0] + 1e-15


@both
@pytest.mark.parametrize(("ddof", "nsd"), [(0, 0.2733), (1, 0.2881)])
def test_fairness_of_a_worked_example(impl, ddof, nsd):
    accuracy = [0.524, 0.678, 0.311, 0.318, 0.339, 0.369, 0.376, 0.468, 0.592, 0.576]
    average, worst, normalized_std = impl.fairness(torch.tensor(accuracy), ddof)
    assert round(average, 4) == 0.4551
    assert round(worst, 3) == 0.311
    assert round(normalized_std, 4) == nsd


@both
@given(accuracies, st.floats(0.01, 100))
def test_nsd_has_no_scale(impl, accuracy, factor):
    assert_close(impl.fairness(accuracy * factor)[2], impl.fairness(accuracy)[2], scale=100)


@both
@given(st.floats(0, 1), st.integers(2, 9))
def test_nsd_of_equals_is_zero(impl, value, count):
    nsd = impl.fairness(torch.full((count,), value))[2]
    assert_close(nsd, 0.0)


@both
@given(accuracies)
def test_nsd_of_unequals_is_positive(impl, accuracy):
    if accuracy.max() - accuracy.min() > 1e-6:
        assert impl.fairness(accuracy)[2] > 0


@both
def test_a_class_without_images_is_left_out(impl):
    assert impl.fairness(torch.tensor([0.5, float("nan"), 1.0]))[:2] == (0.75, 0.5)


class Readable(nn.Module):
    """Takes the class, of three, from the first pixel, in steps of 0.1: accuracies are known."""

    def forward(self, x):
        steps = torch.arange(3, device=x.device) / 10
        return -((x[:, 0, 0, 0].unsqueeze(1) - steps) ** 2)


@both
def test_evaluate_counts_by_class(impl):
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    read_as = torch.tensor([0, 1, 1, 1, 1, 0])
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = (read_as * 25.5).round().to(torch.uint8)
    clean, robust = evaluate(impl, Readable(), images, labels, epsilon=0.5)
    assert clean.tolist() == [0.5, 1.0, 0.0]
    assert robust.tolist() == [0.0, 0.0, 0.0]


@both
def test_epsilon_zero_is_clean_accuracy(impl):
    images = (draw.images(0, n=40) * 255).to(torch.uint8)
    model = impl.build_model("convnet", 4, "test")
    clean, robust = evaluate(impl, model, images, torch.arange(40) % 4, epsilon=0.0)
    assert torch.equal(clean, robust)


@both
def test_parts_give_the_accuracies_of_the_whole(impl):
    """In batches of 500, of which the last is short; clean accuracy has no randomness."""
    images = (draw.images(1, n=1100, side=4) * 255).to(torch.uint8)
    labels = torch.arange(1100) % 4
    model = impl.build_model("convnet", 4, "test").eval()
    clean, _ = evaluate(impl, model, images, labels, epsilon=0.0)
    with torch.no_grad():
        correct = model(images / 255).argmax(1) == labels
    expected = [correct[labels == k].double().mean() for k in range(4)]
    torch.testing.assert_close(clean.double(), torch.stack(expected), rtol=0, atol=1e-7)


@both
def test_pgd20_is_set_as_in_trades(impl, monkeypatch):
    used = []

    def record(forward, objective, x_nat, noise, **settings):
        used.append((noise.abs().max().item(), settings))
        return x_nat

    monkeypatch.setattr(home(impl.evaluate if impl is absld_min else impl.validate), "pgd", record)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    evaluate(
        impl, impl.build_model("convnet", 2, "test"), images, torch.arange(4) % 2, epsilon=8 / 255
    )
    ((largest, settings),) = used
    assert settings.pop("norm", "linf") == "linf"  # the file knows no other
    assert 0.9 * 8 / 255 < largest <= 8 / 255
    assert settings == {"epsilon": 8 / 255, "step_size": pytest.approx(0.003), "steps": 20}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epsilon": -0.1}, absld.UsageError, r"epsilon must be in \[0, 1\], not -0.1"),
        ({"epsilon": 8}, absld.UsageError, r"epsilon must be in \[0, 1\], not 8"),
        ({"epsilon": math.nan}, absld.UsageError, r"epsilon must be in \[0, 1\], not nan"),
        ({"steps": -1}, absld.UsageError, "steps must be 0 or more, not -1"),
        ({"batch_size": 0}, absld.UsageError, "batch_size must be 1 or more, not 0"),
        ({"classes": 2}, absld.CheckpointError, r"gives \(2, 3\) .* not logits \(2, 2\)"),
        ({"how": lambda logits: (logits, 1)}, absld.CheckpointError, "gives tuple"),
    ],
)
def test_validation_with_settings_or_logits_that_cannot_be_is_refused(settings, error, message):
    class Net(Readable):
        def forward(self, x):
            return how(super().forward(x))

    settings = {"epsilon": 0.1, "classes": 3, "how": lambda logits: logits} | settings
    how, classes = settings.pop("how"), map(str, range(settings.pop("classes")))
    data = absld.InMemoryImages(draw.images(0), torch.arange(4) % 2, tuple(classes))
    with pytest.raises(error, match=message):
        inspect.unwrap(absld.validate)(Net(), data, **settings)


# --- Metrics of many networks at once, rho ---


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=21, max_size=21), min_size=1, max_size=4))
def test_metrics_of_many_networks_are_those_of_each(rows):
    """21 classes: the worst tenth are two."""
    accuracy = torch.tensor(rows, dtype=draw.DTYPE)
    expected = [oracles.metrics(row) for row in rows]
    for name, metric in METRICS.items():
        assert_close(metric(accuracy), [each[name] for each in expected], scale=100, label=name)
        assert metric(accuracy[None, :, None]).shape == (1, len(rows), 1)


@given(draw.vectors(0, 1, maximum=30))
def test_metrics_have_an_order_and_agree_with_fairness(accuracy):
    found = {name: metric(accuracy).item() for name, metric in METRICS.items()}
    assert set(found) == set(oracles.metrics([0.5]))
    slack = 1e-15 * len(accuracy)
    assert found["worst"] <= found["worst_tenth"] + slack
    assert found["worst_tenth"] <= found["average"] + slack
    assert 0 <= found["gap"] <= 1 and found["average"] + slack >= found["gap"] / len(accuracy)
    assert found["normalized_std"] >= 0
    assert tuple(absld.fairness(accuracy)) == tuple(
        pytest.approx(found[name]) for name in ("average", "worst", "normalized_std")
    )
    assert worst_tenth(accuracy) == found["worst_tenth"]


relative = st.floats(0.05, 1)


@given(relative, relative, relative, relative)
def test_rho_is_the_sum_of_relative_gains(one, other, base_one, base_other):
    ours, base = (
        torch.tensor(pair, dtype=draw.DTYPE) for pair in ((one, other), (base_one, base_other))
    )
    # How many times as good, less one.
    expected = min(one, other) / min(base_one, base_other) - 1
    expected += (one + other) / (base_one + base_other) - 1
    assert rho(ours, base).item() == pytest.approx(expected, abs=1e-12)
    assert rho(ours, ours).item() == 0.0
    both = rho(torch.stack([ours, base]), torch.stack([base, base]))
    assert both.tolist() == [rho(ours, base).item(), 0.0]


def test_rho_where_a_class_of_the_baseline_is_at_zero():
    none = torch.tensor([0.0, 1.0])
    assert rho(none, none).item() == 0
    assert rho(torch.tensor([0.1, 0.9]), none).item() == math.inf
