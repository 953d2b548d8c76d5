"""The laws of class risks and temperatures (D5, D6)."""

import oracles
import strategies as draw
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tolerance import EPS, assert_close

from absld_min import class_risk_sums, update_temperature

LOWER, UPPER = 0.5, 5.0
WIDE = {"lower": -1e9, "upper": 1e9}  # no clipping
risks = draw.vectors(0, 100)


def update(temperature, risk, rate=0.1, lower=LOWER, upper=UPPER):
    return update_temperature(temperature, risk, rate=rate, lower=lower, upper=upper)


def spread(risk):
    """Do the risks differ by more than rounding, so that a division by their gap is sound?"""
    return (risk.max() - risk.min()) > 1e-6 * risk.abs().max()


@given(draw.labelled())
def test_class_risk_is_the_formula(case):
    logits, labels, temperature = case
    sums, counts = class_risk_sums(logits, labels, len(temperature))
    expected = oracles.class_risk_sums(logits.tolist(), labels.tolist(), len(temperature))
    assert_close(sums, expected[0], scale=100, label="class risk")
    assert counts.tolist() == expected[1]


@given(draw.labelled(), draw.seeds, st.integers(0, 5))
def test_class_risks_add_up_over_any_split_and_order(case, seed, cut):
    logits, labels, temperature = case
    whole = class_risk_sums(logits, labels, len(temperature))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [
        class_risk_sums(logits[index], labels[index], len(temperature))
        for index in (order[:cut], order[cut:])
    ]
    assert_close(parts[0][0] + parts[1][0], whole[0], scale=500)
    assert torch.equal(parts[0][1] + parts[1][1], whole[1])


def test_class_risk_keeps_no_graph():
    logits = torch.zeros(2, 3, requires_grad=True)
    assert not class_risk_sums(logits, torch.tensor([0, 2]), 3)[0].requires_grad


absent_or_risk = st.none() | st.floats(0, 100, allow_subnormal=False)


@given(st.lists(absent_or_risk, min_size=1, max_size=8), st.floats(0, 2), draw.seeds)
@example([0.1, 0.1, 0.1], 0.1, 0)  # the mean of three equal risks is off by one rounding
@example([None, None], 0.1, 0)
@example([float("inf"), 1.0], 0.1, 0)
def test_update_is_the_formula(risk, rate, seed):
    random = torch.Generator().manual_seed(seed)
    old = torch.rand(len(risk), generator=random, dtype=draw.DTYPE) * 4.5 + 0.5
    tensor = torch.tensor([float("nan") if r is None else r for r in risk], dtype=draw.DTYPE)
    present = tensor[~tensor.isnan()]
    assume(len(present) == 0 or present.isinf().any() or spread(present) or len(set(risk)) == 1)
    expected = oracles.update_temperature(old.tolist(), risk, rate, LOWER, UPPER)
    assert_close(update(old, tensor, rate), expected, scale=1e6 * EPS + 1, terms=1e8)


@given(risks, st.floats(0, 2), draw.seeds)
def test_step_before_clipping(risk, rate, seed):
    assume(spread(risk))
    random = torch.Generator().manual_seed(seed)
    old = torch.rand(len(risk), generator=random, dtype=draw.DTYPE) * 4.5 + 0.5
    move = update(old, risk, rate, **WIDE) - old
    assert_close(move.abs().max(), rate, scale=5)
    assert_close(move.sum(), 0.0, scale=5e6)  # the gaps sum to rounding, divided by the largest
    order = risk.argsort()
    assert (move[order].diff() <= 100 * EPS * 5).all()  # more risk, no warmer


@given(risks, st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_origin_of_the_risks_do_not_matter(risk, factor, shift):
    assume(spread(risk) and spread(risk * factor + shift))
    old = torch.ones_like(risk)
    assert_close(update(old, risk * factor + shift), update(old, risk), terms=1e9)


@given(risks, draw.seeds)
def test_no_class_is_special(risk, seed):
    order = torch.randperm(len(risk), generator=torch.Generator().manual_seed(seed))
    old = torch.linspace(0.5, 5, len(risk), dtype=draw.DTYPE)
    assume(spread(risk))
    assert_close(update(old[order], risk[order]), update(old, risk)[order], terms=1e9)


@given(draw.vectors(0.5, 5), st.floats(0, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_equal_risks_move_nothing(old, risk, dtype):
    old = old.to(dtype)
    assert torch.equal(update(old, torch.full_like(old, risk)), old)


@given(draw.vectors(0.5, 5), draw.seeds)
def test_rate_zero_moves_nothing(old, seed):
    random = torch.Generator().manual_seed(seed)
    assert torch.equal(update(old, torch.rand(len(old), generator=random).double(), 0.0), old)


@given(draw.vectors(0.5, 5), st.sampled_from([float("inf"), -float("inf")]))
def test_infinite_risk_moves_nothing(old, infinite):
    risk = torch.arange(len(old), dtype=draw.DTYPE)
    risk[0] = infinite
    assert torch.equal(update(old, risk), old)


def test_an_absent_class_stays_and_does_not_count():
    old = torch.tensor([1.0, 2.0, 3.0, 1.0])
    risk = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    expected = torch.tensor([1.1, 2.0, 2.9, 1.0])
    torch.testing.assert_close(update(old, risk), expected)
    assert torch.equal(update(old, torch.full((4,), float("nan"))), old)


def test_result_is_a_new_tensor():
    old = torch.ones(3)
    for risk in (torch.arange(3.0), torch.ones(3)):
        new = update(old, risk)
        assert new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
    assert torch.equal(old, torch.ones(3))


def test_time_from_one_to_the_ends():
    temperature, risk = torch.ones(2, dtype=draw.DTYPE), torch.tensor([2.0, 1.0]).double()
    for step in range(1, 41):
        temperature = update(temperature, risk)
        if step == 5:
            assert_close(temperature[0], 0.5)
    assert_close(temperature, [0.5, 5.0])
    assert_close(update(temperature, risk), [0.5, 5.0])


class TemperatureMachine(RuleBasedStateMachine):
    """Any history of risks: bounds hold, and the two vectors never touch each other."""

    @initialize(num_classes=st.integers(2, 5))
    def start(self, num_classes):
        self.adv = torch.ones(num_classes, dtype=draw.DTYPE)
        self.nat = torch.ones(num_classes, dtype=draw.DTYPE)
        self.model = [1.0] * num_classes

    @rule(data=st.data(), rate=st.floats(0, 3))
    def end_of_epoch(self, data, rate):
        n = len(self.adv)
        drawn = data.draw(st.lists(absent_or_risk, min_size=n, max_size=n))
        risk = torch.tensor([float("nan") if r is None else r for r in drawn], dtype=draw.DTYPE)
        present = risk[~risk.isnan()]
        assume(len(present) == 0 or spread(present))
        nat = self.nat.clone()
        self.adv = update(self.adv, risk, rate)
        self.model = oracles.update_temperature(self.model, drawn, rate, LOWER, UPPER)
        assert torch.equal(self.nat, nat)

    @invariant()
    def bounded_and_as_computed_by_hand(self):
        if hasattr(self, "adv"):
            assert ((self.adv >= LOWER) & (self.adv <= UPPER)).all()
            assert_close(self.adv, self.model, terms=1e9)


TestTemperatureMachine = TemperatureMachine.TestCase
