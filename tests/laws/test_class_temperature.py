"""The state that the package carries: ClassRisk and ClassTemperature (D1, D5, D6)."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers import strategies as draw
from helpers.tolerance import assert_close
from hypothesis import given
from hypothesis import strategies as st

from absld import ClassTemperature
from absld.temperature import ClassRisk

C = 3
NAN = float("nan")


def at(adv, nat, **settings):
    """Class temperatures at these values."""
    temperature = ClassTemperature(len(adv), dtype=draw.DTYPE, **settings)
    temperature.adv = torch.tensor(adv, dtype=draw.DTYPE)
    temperature.nat = torch.tensor(nat, dtype=draw.DTYPE)
    return temperature


def batch(seed=0, n=6, classes=C):
    """Adversarial and natural logits, labels."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, n, classes, generator=random, dtype=draw.DTYPE)
    return logits[0], logits[1], torch.randint(classes, (n,), generator=random)


# --- ClassRisk ---


@given(draw.labelled(), st.integers(0, 5))
def test_class_risk_is_the_mean_over_all_batches(case, cut):
    logits, labels, temperature = case
    risk = ClassRisk(len(temperature), dtype=draw.DTYPE)
    for rows in (slice(cut), slice(cut, None)):
        risk.observe(logits[rows], labels[rows])
    sums, counts = oracles.class_risk_sums(logits.tolist(), labels.tolist(), len(temperature))
    for mean, total, count in zip(risk.mean().tolist(), sums, counts, strict=True):
        if count:
            assert_close(mean, total / count, scale=500)
        else:
            assert mean != mean


def test_reset_forgets_all_class_risks():
    risk = ClassRisk(C)
    logits, _, labels = batch()
    risk.observe(logits, labels)
    # The sums stay in the type they were made in, whatever the logits' is.
    assert risk.sums.dtype == torch.float32 and risk.counts.sum() == len(labels)
    assert not risk.sums.requires_grad
    risk.reset()
    assert risk.mean().isnan().all() and not risk.sums.any()


# --- Soft labels ---


@pytest.mark.parametrize("fidelity", ["paper", "released"])
@given(draw.labelled(), draw.seeds)
def test_soft_labels_are_the_formula(fidelity, case, seed):
    logits, labels, adv = case
    nat = adv[torch.randperm(len(adv), generator=torch.Generator().manual_seed(seed))]
    used = [adv.tolist(), nat.tolist()]
    temperature = at(*used, fidelity=fidelity)
    if fidelity == "released":  # v is divided by T_adv[y], and that again by T_nat[y]
        used = [[a * b for a, b in zip(*used, strict=True)]] * 2
    expected = [oracles.soften(logits.tolist(), labels.tolist(), t) for t in used]
    for ours, theirs in zip(temperature.soft_labels(logits, labels), expected, strict=True):
        assert_close(ours, theirs, scale=200)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_soft_labels_share_nothing_and_change_nothing(fidelity):
    """The fault of the released script: one buffer, divided in place."""
    temperature = at([0.6, 1.5, 3.0], [2.0, 0.9, 0.7], fidelity=fidelity)
    state, (logits, _, labels) = temperature.state_dict(), batch()
    logits.requires_grad_()
    before = logits.detach().clone()
    adv, nat = temperature.soft_labels(logits, labels)
    assert torch.equal(logits, before)
    assert len({t.untyped_storage().data_ptr() for t in (logits, adv, nat)}) == 3
    assert not adv.requires_grad and not nat.requires_grad  # no way for a gradient to the teacher
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in temperature.state_dict().items()
    )
    again = temperature.soft_labels(logits, labels)
    assert torch.equal(again[0], adv) and torch.equal(again[1], nat)


def test_both_readings_are_plain_softmax_at_the_start():
    logits, _, labels = batch()
    for fidelity in ("paper", "released"):
        for soft in ClassTemperature(C, fidelity=fidelity).soft_labels(logits, labels):
            assert torch.equal(soft, F.softmax(logits, dim=1))


@pytest.mark.parametrize(("value", "start"), [(0.7, 0.7), (0.1, 0.5), (9.0, 5.0)])
def test_all_temperatures_are_set_within_the_bounds(value, start):
    temperature = at([0.6, 1.5, 3.0], [2.0, 0.9, 0.7])
    assert temperature.start_at(value) == start
    assert temperature.adv.tolist() == temperature.nat.tolist() == [start] * C


# --- Epochs ---


def test_adv_and_nat_are_independent():
    adv_logits, nat_logits, _ = batch()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    whole, other_adv, other_nat = (ClassTemperature(C, dtype=draw.DTYPE) for _ in range(3))
    whole.observe(adv_logits, nat_logits, labels)
    other_adv.observe(adv_logits.flip(0), nat_logits, labels)
    other_nat.observe(adv_logits, nat_logits.flip(0), labels)
    risk = whole.step()
    assert not torch.equal(risk.adv, risk.nat) and not torch.equal(whole.adv, whole.nat)
    other_adv.step()
    other_nat.step()
    assert torch.equal(other_adv.nat, whole.nat) and not torch.equal(other_adv.adv, whole.adv)
    assert torch.equal(other_nat.adv, whole.adv) and not torch.equal(other_nat.nat, whole.nat)


@pytest.mark.parametrize("move", ["absolute", "relative"])
@given(draw.seeds, st.none() | st.floats(0, 2), st.floats(0, 1), st.floats(0.8, 1.3))
def test_step_is_the_formula(move, seed, override, rate, start):
    """At the rate given for this epoch, else at that given at the start."""
    adv_logits, nat_logits, labels = batch(seed)
    temperature = ClassTemperature(
        C, rate=rate, lower=0.8, upper=1.3, start=start, move=move, dtype=draw.DTYPE
    )
    temperature.observe(adv_logits, nat_logits, labels)
    reported = temperature.step(override)
    for logits, risk, moved in (
        (adv_logits, reported.adv, temperature.adv),
        (nat_logits, reported.nat, temperature.nat),
    ):
        sums, counts = oracles.class_risk_sums(logits.tolist(), labels.tolist(), C)
        risks = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
        assert_close(risk.nan_to_num(-1), [-1 if r is None else r for r in risks], scale=500)
        used = rate if override is None else override
        expected = oracles.update_temperature([start] * C, risks, used, 0.8, 1.3, move)
        assert_close(moved, expected, terms=1e9)


def test_step_without_a_batch_moves_nothing():
    temperature = at([0.6, 1.5, 3.0], [2.0, 0.9, 0.7])
    risk = temperature.step()
    assert risk.adv.isnan().all() and risk.nat.isnan().all()
    assert temperature.adv.tolist() == [0.6, 1.5, 3.0]
    assert temperature.nat.tolist() == [2.0, 0.9, 0.7]


def test_a_step_starts_a_new_epoch():
    first, second = batch(1), batch(2)
    both, alone = ClassTemperature(C), ClassTemperature(C)
    both.observe(*first)
    both.step(0.0)
    for temperature in (both, alone):
        temperature.observe(*second)
        temperature.step()
    assert torch.equal(both.adv, alone.adv) and torch.equal(both.nat, alone.nat)
    assert not torch.equal(both.adv, torch.ones(C))


# --- State ---


@given(draw.seeds)
def test_state_goes_on_in_the_middle_of_an_epoch(seed):
    whole = ClassTemperature(C)
    for part in range(2):
        whole.observe(*batch(seed + part))
        whole.step()
    whole.observe(*batch(seed + 2))
    taken_up = ClassTemperature(C)
    taken_up.load_state_dict(whole.state_dict())
    for temperature in (whole, taken_up):
        temperature.observe(*batch(seed + 3))
        temperature.step()
        temperature.observe(*batch(seed + 4))
    ours, theirs = taken_up.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loaded_state_is_a_copy():
    first, second = ClassTemperature(C), ClassTemperature(C)
    first.observe(*batch())
    first.step()
    first.observe(*batch(1))
    state = first.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    second.load_state_dict(state)
    for tensor in state.values():
        tensor.fill_(7)
    held = second.state_dict()
    assert all(torch.equal(held[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "state",
    [ClassTemperature(4).state_dict(), {}, {"adv": torch.ones(C), "nat": torch.ones(C)}],
    ids=["another number of classes", "empty", "without risks"],
)
def test_a_state_of_something_else_is_refused(state):
    temperature = at([0.6, 1.5, 3.0], [2.0, 0.9, 0.7])
    with pytest.raises(RuntimeError, match="loading state_dict for ClassTemperature"):
        temperature.load_state_dict(state)


# --- What is refused ---

LABELS = torch.tensor([0, 1, 2, 0])
GOOD = torch.zeros(4, C)
BAD = [
    (GOOD, torch.tensor([0, 1, -1, 0]), r"labels must be in 0\.\.2, not -1\.\.1"),
    (GOOD, torch.tensor([0, 1, 3, 0]), r"labels must be in 0\.\.2, not 0\.\.3"),
    (GOOD, LABELS.float(), r"int64 of shape \(4,\), not torch.float32 of shape \(4,\)"),
    (GOOD, LABELS.int(), r"int64 of shape \(4,\), not torch.int32 of shape \(4,\)"),
    (GOOD, LABELS.unsqueeze(1), r"of shape \(4,\), not torch.int64 of shape \(4, 1\)"),
    (GOOD, LABELS[:3], r"of shape \(4,\), not torch.int64 of shape \(3,\)"),
    (torch.zeros(4, C + 1), LABELS, r"logits must be \(N,3\), not \(4, 4\)"),
    (torch.zeros(4), LABELS, r"logits must be \(N,3\), not \(4,\)"),
]
NAMES = ["-1", "C", "float", "int32", "(N,1)", "fewer", "wide logits", "flat logits"]


@pytest.mark.parametrize(("logits", "labels", "message"), BAD, ids=NAMES)
def test_a_wrong_batch_is_refused_with_value_and_range(logits, labels, message):
    temperature = ClassTemperature(C)
    with pytest.raises(ValueError, match=message):
        temperature.soft_labels(logits, labels)
    with pytest.raises(ValueError, match=message):
        temperature.observe(logits, logits, labels)
    assert not temperature.adv_risk.counts.any() and not temperature.nat_risk.counts.any()


def test_wrong_natural_logits_are_refused_before_anything_is_counted():
    temperature = ClassTemperature(C)
    with pytest.raises(ValueError, match=r"logits must be \(N,3\), not \(4, 4\)"):
        temperature.observe(GOOD, torch.zeros(4, 4), LABELS)
    assert not temperature.adv_risk.counts.any() and not temperature.nat_risk.counts.any()


def test_an_empty_batch_is_accepted():
    temperature = ClassTemperature(C)
    none = torch.zeros(0, dtype=torch.long)
    assert [len(soft) for soft in temperature.soft_labels(GOOD[:0], none)] == [0, 0]
    temperature.observe(GOOD[:0], GOOD[:0], none)
    temperature.step()
    assert torch.equal(temperature.adv, torch.ones(C))


def test_no_value_is_read_from_the_device():
    """The meta device has no values: whoever asks for one, as the range check does, fails. The
    state follows the batch there."""
    temperature = ClassTemperature(C)
    logits, labels = GOOD.to("meta"), LABELS.to("meta")
    for soft in temperature.soft_labels(logits, labels):
        assert soft.shape == (4, C) and soft.device.type == "meta"
    temperature.observe(logits, logits, labels)
    assert temperature.adv_risk.sums.device.type == "meta"
    assert temperature.nat_risk.counts.device.type == "meta"


@pytest.mark.parametrize("num_classes", [-1, 0, 1])
def test_fewer_than_two_classes_are_refused(num_classes):
    with pytest.raises(ValueError, match=f"2 or more, not {num_classes}"):
        ClassTemperature(num_classes)


@pytest.mark.parametrize(
    ("lower", "start", "upper"),
    [
        (0.0, 1.0, 5.0), (-1.0, 1.0, 5.0), (1.1, 1.0, 5.0), (0.5, 1.0, 0.9), (0.5, 0.4, 5.0),
        (0.5, NAN, 5.0), (0.5, float("inf"), float("inf")),
    ],
)  # fmt: skip
def test_bounds_without_the_start_are_refused(lower, start, upper):
    with pytest.raises(ValueError, match=rf"start at {start:g}, .* not in \[{lower}, {upper}\]"):
        ClassTemperature(C, lower=lower, start=start, upper=upper)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_negative_or_non_finite_rate_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate must be 0 or more, not {rate}"):
        ClassTemperature(C, rate=rate)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_step_at_a_negative_or_non_finite_rate_is_refused(rate):
    temperature = ClassTemperature(C)
    temperature.observe(*batch())
    with pytest.raises(ValueError, match=f"rate must be 0 or more, not {rate}"):
        temperature.step(rate)
    assert torch.equal(temperature.adv, torch.ones(C)) and temperature.adv_risk.counts.any()


def test_an_observed_nan_moves_nothing():
    """As an infinite risk: nothing moves. Automatic mixed precision skips such steps."""
    temperature = ClassTemperature(C)
    temperature.observe(*batch())
    logits = torch.zeros(1, C)
    logits[0, 0] = float("nan")
    temperature.observe(logits, logits, torch.tensor([0]))
    assert temperature.step().adv[0] == float("inf")
    assert torch.equal(temperature.adv, torch.ones(C))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = torch.tensor([[0.5, 0.0, 0.0]]).repeat(3000, 1), torch.zeros(3000).long()
    half, full = ClassRisk(C), ClassRisk(C)
    half.observe(logits.to(dtype), labels)
    full.observe(logits, labels)
    torch.testing.assert_close(half.mean()[0], full.mean()[0])


@pytest.mark.parametrize(
    ("name", "choices"), [("fidelity", ("paper", "released")), ("move", ("absolute", "relative"))]
)
def test_another_choice_is_refused(name, choices):
    """The tests' type checks would refuse it, too, but users have none."""
    unchecked = inspect.unwrap(ClassTemperature.__init__)
    with pytest.raises(ValueError, match=re.escape(f"{name} must be one of {choices}, not 'x'")):
        unchecked(ClassTemperature(C), C, **{name: "x"})


def test_bounds_may_be_equal():
    temperature = ClassTemperature(C, lower=1.0, upper=1.0)
    temperature.observe(*batch())
    temperature.step()
    assert torch.equal(temperature.adv, torch.ones(C))


def test_defaults_are_those_of_the_release():
    temperature = ClassTemperature(2)
    assert (temperature.rate, temperature.lower, temperature.upper) == (0.1, 0.5, 5.0)
    assert temperature.fidelity == "paper" and temperature.num_classes == 2
    assert temperature.move == "absolute" and temperature.adv.tolist() == [1.0, 1.0]
