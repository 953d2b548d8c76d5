"""The laws of class risks and temperatures (D5, D6)."""

import inspect
import math
from functools import partial

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from helpers.implementations import both
from helpers.tolerance import EPS, assert_close
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import absld
import absld_min

LOWER, UPPER = 0.5, 5.0
WIDE = {"lower": -1e9, "upper": 1e9}  # no clipping
risks = draw.vectors(0, 100)


class Relative:
    """The package, moving the logarithms of temperatures."""

    update_temperature = partial(absld.update_temperature, move="relative")


moves = pytest.mark.parametrize(
    "impl", [absld_min, absld, Relative], ids=["single file", "package", "relative"]
)


def update(impl, temperature, risk, rate=0.1, lower=LOWER, upper=UPPER):
    return impl.update_temperature(temperature, risk, rate=rate, lower=lower, upper=upper)


def spread(risk):
    """Return whether the risks differ by more than rounding: a division by their gap is sound."""
    return (risk.max() - risk.min()) > 1e-6 * risk.abs().max()


@both
@given(draw.labelled())
def test_class_risk_is_the_formula(impl, case):
    logits, labels, temperature = case
    sums, counts = impl.class_risk_sums(logits, labels, len(temperature))
    expected = oracles.class_risk_sums(logits.tolist(), labels.tolist(), len(temperature))
    assert_close(sums, expected[0], scale=100, label="class risk")
    assert counts.tolist() == expected[1]


@both
@given(draw.labelled(), draw.seeds, st.integers(0, 5))
def test_class_risks_add_up_over_any_split_and_order(impl, case, seed, cut):
    logits, labels, temperature = case
    whole = impl.class_risk_sums(logits, labels, len(temperature))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [
        impl.class_risk_sums(logits[index], labels[index], len(temperature))
        for index in (order[:cut], order[cut:])
    ]
    assert_close(parts[0][0] + parts[1][0], whole[0], scale=500)
    assert torch.equal(parts[0][1] + parts[1][1], whole[1])


@both
def test_class_risk_keeps_no_graph(impl):
    logits = torch.zeros(2, 3, requires_grad=True)
    assert not impl.class_risk_sums(logits, torch.tensor([0, 2]), 3)[0].requires_grad


absent_or_risk = st.none() | st.floats(0, 100, allow_subnormal=False)


@moves
@given(st.lists(absent_or_risk, min_size=1, max_size=8), st.floats(0, 2), draw.seeds)
@example([0.1, 0.1, 0.1], 0.1, 0)  # the mean of three equal risks is off by one rounding
@example([None, None], 0.1, 0)
@example([float("inf"), 1.0], 0.1, 0)
def test_update_is_the_formula(impl, risk, rate, seed):
    random = torch.Generator().manual_seed(seed)
    old = torch.rand(len(risk), generator=random, dtype=draw.DTYPE) * 4.5 + 0.5
    tensor = torch.tensor([float("nan") if r is None else r for r in risk], dtype=draw.DTYPE)
    present = tensor[~tensor.isnan()]
    assume(len(present) == 0 or present.isinf().any() or spread(present) or len(set(risk)) == 1)
    move = "relative" if impl is Relative else "absolute"
    expected = oracles.update_temperature(old.tolist(), risk, rate, LOWER, UPPER, move)
    assert_close(update(impl, old, tensor, rate), expected, scale=1e6 * EPS + 1, terms=1e8)


@both
@given(risks, st.floats(0, 2), draw.seeds)
def test_an_unclipped_step_is_the_rate_for_the_farthest_class_and_sums_to_zero(
    impl, risk, rate, seed
):
    assume(spread(risk))
    random = torch.Generator().manual_seed(seed)
    old = torch.rand(len(risk), generator=random, dtype=draw.DTYPE) * 4.5 + 0.5
    move = update(impl, old, risk, rate, **WIDE) - old
    assert_close(move.abs().max(), rate, scale=5)
    assert_close(move.sum(), 0.0, scale=5e6)  # the gaps sum to rounding, divided by the largest
    order = risk.argsort()
    assert (move[order].diff() <= 100 * EPS * 5).all()  # more risk, no warmer


@moves
@given(risks, st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_origin_of_the_risks_do_not_matter(impl, risk, factor, shift):
    assume(spread(risk) and spread(risk * factor + shift))
    old = torch.ones_like(risk)
    assert_close(update(impl, old, risk * factor + shift), update(impl, old, risk), terms=1e9)


@moves
@given(risks, draw.seeds)
def test_an_update_commutes_with_permutations_of_the_classes(impl, risk, seed):
    order = torch.randperm(len(risk), generator=torch.Generator().manual_seed(seed))
    old = torch.linspace(0.5, 5, len(risk), dtype=draw.DTYPE)
    assume(spread(risk))
    assert_close(update(impl, old[order], risk[order]), update(impl, old, risk)[order], terms=1e9)


@moves
@given(draw.vectors(0.5, 5), st.floats(0, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_equal_risks_move_nothing(impl, old, risk, dtype):
    old = old.to(dtype)
    assert torch.equal(update(impl, old, torch.full_like(old, risk)), old)


@moves
@given(draw.vectors(0.5, 5), draw.seeds)
def test_rate_zero_moves_nothing(impl, old, seed):
    random = torch.Generator().manual_seed(seed)
    assert torch.equal(update(impl, old, torch.rand(len(old), generator=random).double(), 0.0), old)


@moves
@given(draw.vectors(0.5, 5), st.sampled_from([float("inf"), -float("inf")]))
def test_infinite_risk_moves_nothing(impl, old, infinite):
    risk = torch.arange(len(old), dtype=draw.DTYPE)
    risk[0] = infinite
    assert torch.equal(update(impl, old, risk), old)


@both
def test_an_absent_class_stays_and_does_not_count(impl):
    old = torch.tensor([1.0, 2.0, 3.0, 1.0])
    risk = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    expected = torch.tensor([1.1, 2.0, 2.9, 1.0])
    torch.testing.assert_close(update(impl, old, risk), expected)
    assert torch.equal(update(impl, old, torch.full((4,), float("nan"))), old)


@moves
def test_each_row_is_updated_on_its_own(impl):
    """Rows whose risks are equal, infinite, absent, and spread."""
    old = torch.tensor([0.6, 1.5, 3.0, 4.0], dtype=draw.DTYPE)
    nan, inf = float("nan"), float("inf")
    risk = torch.tensor([[2, 2, 2, 2], [inf, 1, 2, 3], [nan] * 4, [nan, 1, 2, 4], [0, 1, 2, 4]])
    risk = risk.to(draw.DTYPE)
    together = update(impl, old.repeat(5, 1), risk)
    assert torch.equal(together, torch.stack([update(impl, old, row) for row in risk]))
    moved = [not torch.equal(row, old) for row in together]
    assert moved == [False, False, False, True, True]


@moves
def test_result_is_a_new_tensor(impl):
    old = torch.ones(3)
    for risk in (torch.arange(3.0), torch.ones(3)):
        new = update(impl, old, risk)
        assert new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
    assert torch.equal(old, torch.ones(3))


@both
def test_steps_from_one_to_the_bounds(impl):
    temperature, risk = torch.ones(2, dtype=draw.DTYPE), torch.tensor([2.0, 1.0]).double()
    for step in range(1, 41):
        temperature = update(impl, temperature, risk)
        if step == 5:
            assert_close(temperature[0], 0.5)
    assert_close(temperature, [0.5, 5.0])
    assert_close(update(impl, temperature, risk), [0.5, 5.0])


@given(risks, st.floats(0, 2), draw.seeds)
def test_a_relative_update_moves_logarithms_as_an_absolute_one_moves_temperatures(risk, rate, seed):
    """So the farthest class is divided or multiplied by exp(rate): halving is as far as doubling."""
    assume(spread(risk))
    random = torch.Generator().manual_seed(seed)
    old = torch.rand(len(risk), generator=random, dtype=draw.DTYPE) * 4.5 + 0.5
    of_logs = update(absld, old.log(), risk, rate, lower=math.log(LOWER), upper=math.log(UPPER))
    moved = update(Relative, old, risk, rate)
    assert_close(moved, of_logs.exp(), scale=50)
    factor = (update(Relative, old, risk, rate, lower=1e-9, upper=1e9) / old).log()
    assert_close(factor.abs().max(), rate, scale=50)


# --- What the package refuses ---


@pytest.mark.parametrize(
    ("logits", "labels", "num_classes", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(1).long(), 3, r"labels must be \(4\), not \(1,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 1).long(), 3, r"labels must be \(4\), not \(4, 1\)"),
        (torch.zeros(4, 3), torch.full((4,), 2), 2, r"logits must be \(N,2\), not \(4, 3\)"),
        (torch.zeros(3), torch.zeros(1).long(), 3, r"logits must be \(N,3\), not \(3,\)"),
    ],
)
def test_class_risks_of_other_shapes_are_refused(logits, labels, num_classes, message):
    """Images of a class beyond num_classes would not be counted."""
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(absld.class_risk_sums)(logits, labels, num_classes)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_class_risks_of_labels_outside_the_classes_are_refused(label):
    """torch's cross-entropy leaves out -100."""
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        absld.class_risk_sums(torch.zeros(3, 3), torch.tensor([0, label, 1]), 3)


@pytest.mark.parametrize(
    ("risk", "settings", "message"),
    [
        (torch.ones(1), {}, r"class_risk must be \(3\), not \(1,\)"),
        (torch.ones(2, 3), {}, r"class_risk must be \(3\), not \(2, 3\)"),
        (torch.ones(3), {"rate": -0.1}, "rate must be 0 or more, not -0.1"),
        (torch.ones(3), {"rate": float("nan")}, "rate must be 0 or more, not nan"),
        (torch.ones(3), {"move": "log"}, r"one of \('absolute', 'relative'\), not 'log'"),
        (torch.ones(3), {"lower": 5.0, "upper": 0.5}, r"no temperature is in \[5.0, 0.5\]"),
    ],
)
def test_an_update_out_of_shape_or_range_is_refused(risk, settings, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(absld.update_temperature)(
            torch.ones(3), risk, **{"rate": 0.1, "lower": LOWER, "upper": UPPER} | settings
        )


# --- Both implementations, the class of the package and the oracle, side by side ---

# On a coarse grid the risks of two classes are equal or well apart, more often than not.
some_logits = st.integers(-24, 24).map(lambda value: value / 4)


class TemperatureMachine(RuleBasedStateMachine):
    """Any history of batches and epochs, from any start: all four agree, bounds hold, adv and nat
    stay apart. The single file has no relative move."""

    @initialize(
        num_classes=st.integers(2, 4),
        start=st.floats(LOWER, UPPER),
        move=st.sampled_from(["absolute", "relative"]),
    )
    def start(self, num_classes, start, move):
        self.num_classes, self.move = num_classes, move
        self.class_temperature = absld.ClassTemperature(
            num_classes, start=start, move=move, dtype=draw.DTYPE
        )
        self.computed = {
            impl: torch.full((2, num_classes), start, dtype=draw.DTYPE)
            for impl in ((absld_min, absld) if move == "absolute" else (Relative,))
        }
        self.by_hand = [[start] * num_classes for _ in range(2)]
        self.new_epoch()

    def new_epoch(self):
        zeros = torch.zeros(3, self.num_classes, dtype=draw.DTYPE)
        self.sums = {impl: zeros.clone() for impl in self.computed}  # adv, nat, counts
        self.sums_by_hand = [[0.0] * self.num_classes for _ in range(3)]

    @rule(data=st.data(), n=st.integers(1, 3))
    def a_batch(self, data, n):
        c = self.num_classes
        rows = st.lists(st.lists(some_logits, min_size=c, max_size=c), min_size=n, max_size=n)
        drawn = [data.draw(rows) for _ in range(2)]
        known = data.draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
        labels = torch.tensor(known)
        logits = [torch.tensor(values, dtype=draw.DTYPE) for values in drawn]
        self.class_temperature.observe(*logits, labels)
        for impl, sums in self.sums.items():
            impl = absld if impl is Relative else impl
            adv, counts = impl.class_risk_sums(logits[0], labels, c)
            nat, _ = impl.class_risk_sums(logits[1], labels, c)
            sums += torch.stack([adv, nat, counts.to(adv.dtype)])
        parts = [oracles.class_risk_sums(values, known, c) for values in drawn]
        for total, part in zip(
            self.sums_by_hand, (parts[0][0], parts[1][0], parts[0][1]), strict=True
        ):
            total[:] = [a + b for a, b in zip(total, part, strict=True)]

    @rule(rate=st.floats(0, 3))
    def end_of_epoch(self, rate):
        adv, nat, counts = self.sums_by_hand
        risks = [
            [total / n if n else None for total, n in zip(sums, counts, strict=True)]
            for sums in (adv, nat)
        ]
        present = [
            torch.tensor([r for r in risk if r is not None], dtype=draw.DTYPE) for risk in risks
        ]
        if not all(len(risk) < 2 or spread(risk) for risk in present):
            return  # equal up to rounding: which way they part is chance; more batches first
        self.by_hand = [
            oracles.update_temperature(old, risk, rate, LOWER, UPPER, self.move)
            for old, risk in zip(self.by_hand, risks, strict=True)
        ]
        for impl, sums in self.sums.items():
            self.computed[impl] = torch.stack(
                [
                    update(impl, old, total / sums[2], rate)
                    for old, total in zip(self.computed[impl], sums, strict=False)
                ]
            )
        reported = self.class_temperature.step(rate)
        sums = next(iter(self.sums.values()))
        for tensor, total in zip(reported, sums, strict=False):
            assert torch.equal(tensor.nan_to_num(-1), (total / sums[2]).nan_to_num(-1))
        self.new_epoch()

    @rule()
    def an_interruption(self):
        state = self.class_temperature.state_dict()
        self.class_temperature = absld.ClassTemperature(
            self.num_classes, move=self.move, dtype=draw.DTYPE
        )
        self.class_temperature.load_state_dict(state)

    @invariant()
    def bounded_and_alike(self):
        if not hasattr(self, "class_temperature"):
            return
        held = torch.stack([self.class_temperature.adv, self.class_temperature.nat])
        assert all(torch.equal(computed, held) for computed in self.computed.values())
        assert ((held >= LOWER) & (held <= UPPER)).all()
        assert_close(held, self.by_hand, terms=1e9)


TestTemperatureMachine = TemperatureMachine.TestCase
TestTemperatureMachine.settings = settings(stateful_step_count=25)
