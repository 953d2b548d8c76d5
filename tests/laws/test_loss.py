"""The laws of soft labels and loss (D1, D4)."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers import strategies as draw
from helpers.implementations import both
from helpers.tolerance import EPS, assert_close
from hypothesis import given
from hypothesis import strategies as st

import absld
from absld import attack


def entropy(p):
    return torch.special.entr(p).sum(1)


def one_temperature(impl, logits, value):
    labels = torch.zeros(len(logits), dtype=torch.long)
    return impl.soften(logits, labels, torch.full((logits.shape[1],), value, dtype=logits.dtype))


@both
@given(draw.labelled())
def test_soften_is_the_formula(impl, case):
    logits, labels, temperature = case
    expected = oracles.soften(logits.tolist(), labels.tolist(), temperature.tolist())
    assert_close(impl.soften(*case), expected, scale=40, label="soft labels")


@both
@given(draw.matrices(), draw.temperatures, draw.temperatures)
def test_warmer_labels_are_smoother(impl, logits, first, second):
    cold, warm = sorted([first, second])
    p, q = one_temperature(impl, logits, cold), one_temperature(impl, logits, warm)
    slack = 100 * EPS * 40
    assert (entropy(p) <= entropy(q) + slack).all()
    assert (p.amax(1) >= q.amax(1) - slack).all()
    # Majorisation: the largest k labels together weigh no less when cold, for every k.
    sums = [labels.sort(descending=True).values.cumsum(1) for labels in (p, q)]
    assert (sums[0] >= sums[1] - slack).all()


@both
@given(draw.labelled())
def test_the_most_likely_class_stays(impl, case):
    logits, *_ = case
    best = logits.max(1, keepdim=True).values
    chosen = impl.soften(*case).argmax(1, keepdim=True)
    assert_close(logits.gather(1, chosen), best, scale=40)  # ties within rounding may swap


@both
@given(draw.labelled(), st.floats(-100, 100))
def test_a_shift_of_the_logits_changes_nothing(impl, case, shift):
    logits, labels, temperature = case
    assert_close(impl.soften(logits + shift, labels, temperature), impl.soften(*case), scale=500)


@both
@given(draw.labelled())
def test_temperature_one_is_plain_softmax(impl, case):
    logits, labels, temperature = case
    labels_at_one = impl.soften(logits, labels, torch.ones_like(temperature))
    assert torch.equal(labels_at_one, F.softmax(logits, dim=1))


@both
@given(draw.labelled())
def test_two_soft_labels_share_nothing(impl, case):
    logits, labels, temperature = case
    before = logits.clone()
    adv, nat = impl.soften(*case), impl.soften(logits, labels, temperature / 2)
    assert torch.equal(logits, before)
    assert len({t.untyped_storage().data_ptr() for t in (logits, adv, nat)}) == 3


@both
@given(draw.matrices(rows=st.just(1), bound=5), st.floats(1.0, 5.0))
def test_the_entropy_grows_with_temperature_by_its_formula(impl, logits, value):
    t = torch.tensor([value], dtype=draw.DTYPE, requires_grad=True)
    p = F.softmax(logits / t, dim=1)
    (slope,) = torch.autograd.grad(-(p * F.log_softmax(logits / t, dim=1)).sum(), t)
    p = one_temperature(impl, logits, value)
    variance = (p * logits**2).sum() - (p * logits).sum() ** 2
    assert_close(slope, variance / value**3, scale=100)


@both
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_refused(impl, label):
    with pytest.raises(RuntimeError, match="out of bounds"):
        impl.soften(torch.zeros(1, 3), torch.tensor([label]), torch.ones(3))


@both
@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(2, 1, dtype=torch.long)])
def test_labels_of_another_type_or_shape_are_refused(impl, labels):
    # unwrap: by the computation itself, without the tests' check of the package's signatures.
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        inspect.unwrap(impl.soften)(torch.zeros(2, 3), labels, torch.ones(3))


# --- Shapes that would be broadcast: the package refuses them, with both shapes ---

LOGITS, SOFT, N_LABELS = torch.zeros(4, 3), torch.full((4, 3), 1 / 3), torch.zeros(4).long()
shapes = pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 1), (2, 3), (1, 4, 3)], ids=str)


@shapes
@pytest.mark.parametrize("position", range(4))
def test_a_loss_of_other_shapes_is_refused(position, shape):
    given = [LOGITS, LOGITS, SOFT, SOFT]
    given[position] = torch.ones(shape)
    with pytest.raises(ValueError, match=r"must be \(.*\), not \(") as caught:
        inspect.unwrap(absld.absld_loss)(*given)
    assert ",".join(map(str, shape)) in str(caught.value).replace(" ", "")


@shapes
def test_a_divergence_of_other_shapes_is_refused(shape):
    soft, message = torch.ones(shape), re.escape(f"soft_labels must be (4,3), not {shape}")
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(absld.soft_label_kl)(LOGITS, soft)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attack.kl_to)(soft, LOGITS)


@pytest.mark.parametrize("weights", [torch.ones(4, 1), torch.ones(1), torch.ones(())])
def test_factors_of_other_shapes_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights must be \(4\), not"):
        inspect.unwrap(absld.soft_label_kl)(LOGITS, SOFT, weights)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature", "message"),
    [
        (LOGITS, N_LABELS[:1], torch.ones(3), r"labels must be \(4\), not \(1,\)"),
        (LOGITS, N_LABELS[:, None], torch.ones(3), r"labels must be \(4\), not \(4, 1\)"),
        (LOGITS, N_LABELS, torch.ones(5), r"temperature must be \(3\), not \(5,\)"),
        (LOGITS, N_LABELS, torch.ones(()), r"temperature must be \(3\), not \(\)"),
        (LOGITS[0], N_LABELS, torch.ones(3), r"teacher_logits must be \(N,C\), not \(3,\)"),
    ],
)
def test_soft_labels_of_other_shapes_are_refused(logits, labels, temperature, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(absld.soften)(logits, labels, temperature)


@both
@given(draw.labelled(), draw.labelled())
def test_loss_is_the_formula(impl, case, other):
    logits, soft = case[0], impl.soften(*case)
    value = impl.soft_label_kl(logits, soft)
    expected = oracles.soft_label_kl(logits.tolist(), soft.tolist())
    assert_close(value, expected, scale=100, label="loss")
    parts = value, impl.soft_label_kl(logits / 2, soft)
    whole = impl.absld_loss(logits, logits / 2, soft, soft, adv_weight=0.7, kl_scale=0.1)
    assert_close(whole, 0.1 * (0.7 * parts[0] + 0.3 * parts[1]), scale=100)


@both
def test_defaults_are_those_of_the_method(impl):
    logits, soft = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.2, 0.3, 0.5]])
    expected = 5 / 6 * impl.soft_label_kl(logits, soft) + 1 / 6 * impl.soft_label_kl(-logits, soft)
    torch.testing.assert_close(impl.absld_loss(logits, -logits, soft, soft), expected)


@both
@given(draw.matrices(), draw.seeds)
def test_loss_is_no_less_than_zero_and_zero_for_equals(impl, logits, seed):
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).double()
    soft = F.softmax(logits, dim=1)
    assert_close(impl.soft_label_kl(logits, soft), 0.0, scale=40)
    assert impl.soft_label_kl(logits + noise, soft) >= -100 * EPS * 40
    distance = (F.softmax(logits + noise, dim=1) - soft).abs().sum(1).pow(2).mean() / 2
    assert impl.soft_label_kl(logits + noise, soft) >= distance - 100 * EPS * 40  # Pinsker


@both
@given(draw.labelled(), st.floats(0, 1), st.floats(0.1, 10))
def test_the_gradient_of_the_loss_is_the_formula(impl, case, weight, scale):
    adv, nat = case[0].clone().requires_grad_(), (case[0] / 3).clone().requires_grad_()
    soft = impl.soften(*case)
    impl.absld_loss(adv, nat, soft, soft, adv_weight=weight, kl_scale=scale).backward()
    for logits, share in ((adv, weight), (nat, 1 - weight)):
        expected = scale * share * (F.softmax(logits.detach(), dim=1) - soft) / len(soft)
        assert_close(logits.grad, expected, scale=10)


@both
@given(draw.labelled(), st.integers(1, 4))
def test_loss_of_parts_adds_up(impl, case, cut):
    logits, soft = case[0], impl.soften(*case)
    if cut < len(logits):
        parts = [
            len(rows) * impl.soft_label_kl(rows, labels)
            for rows, labels in ((logits[:cut], soft[:cut]), (logits[cut:], soft[cut:]))
        ]
        assert_close(sum(parts), len(logits) * impl.soft_label_kl(logits, soft), scale=500)


@both
@given(draw.labelled(), draw.seeds)
def test_the_order_of_images_and_classes_does_not_change_the_loss(impl, case, seed):
    logits, soft = case[0], impl.soften(*case)
    random = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=random) for n in logits.shape)
    moved = impl.soft_label_kl(logits[rows][:, columns], soft[rows][:, columns])
    assert_close(moved, impl.soft_label_kl(logits, soft), scale=100)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_finite_for_huge_logits(impl, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    soft = impl.soften(-logits.detach(), torch.tensor([0]), torch.full((3,), 0.5, dtype=dtype))
    loss = impl.soft_label_kl(logits, soft)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
