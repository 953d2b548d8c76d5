"""`absld.evaluate` on real networks: its subsets, what it leaves unchanged, what it refuses.

That it computes the worst case is tested in tests/equivalence/test_evaluation_oracle.py.
"""

import inspect

import pytest
import torch
from helpers import strategies as draw
from torch import nn

import absld
from absld.errors import CheckpointError, NonFiniteError
from absld.evaluation import evaluate as evaluations
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.evaluate import evaluate

C = 3


def network(seed=0, dtype=torch.float64):
    model = absld.build_model("convnet", C, "worst case", seed).to(dtype)
    with torch.no_grad():
        model.linear.weight *= 40  # margins that differ, and classes that all occur
    return model.eval()


def images(seed=0, n=24, classes=C):
    labels = torch.arange(n) % classes
    return absld.ImageSet(draw.images(seed, n), labels, tuple("abc"[:classes]))


def some_right(seed=0, n=24):
    """A network and images of which it has about three quarters right."""
    model, data = network(seed), images(seed, n)
    with torch.no_grad():
        said = model(data.images).argmax(1)
    labels = torch.where(torch.arange(n) % 4 == 0, (said + 1) % C, said)
    return model, absld.ImageSet(data.images, labels, data.classes)


def test_a_subset_has_the_predictions_of_the_whole_set():
    model, data = some_right(1, 60)
    whole = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5")
    some = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5", examples=20)
    assert len(some.labels) == 20
    assert torch.equal(some.predictions, whole.predictions[:, some.index])
    again = evaluate(network(9), data, epsilon=0.05, attacks="fgsm", examples=20)
    assert torch.equal(again.index, some.index)  # the same images for another network


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_the_random_state_are_unchanged(fails):
    model, data = some_right()
    model.train()
    model[1].eval()
    model.linear.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()

    def on_batch(progress, evaluation):
        if fails and progress.attack == "pgd2":
            raise KeyboardInterrupt

    def run():
        evaluate(model, data, epsilon=0.001, attacks="fgsm,pgd2,cw2", on_batch=on_batch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda z: z[:, :2], CheckpointError, r"\(2, 2\)"),
        (lambda z: (z, z), CheckpointError, "tuple"),
        (lambda z: z * torch.nan, NonFiniteError, "of clean images"),
        (lambda z: z / 0, NonFiniteError, "NaN or infinity"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(change, kind, said):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return change(self.net(x))

    with pytest.raises(kind, match=said):
        evaluate(Changed(), images(), epsilon=0.1, attacks="fgsm")


def test_classes_without_images_have_no_accuracy():
    model, data = some_right()
    only = data.subset((data.labels != 1).nonzero().squeeze(1))
    found = evaluate(model, only, epsilon=0.05, attacks="fgsm")
    assert found.clean_accuracy.isnan().tolist() == [False, True, False]
    assert (
        found.class_intervals(found.robust)[1].value != found.class_intervals(found.robust)[1].value
    )
    assert set(found.metrics(found.robust)) == set(absld.metrics.METRICS)
    assert found.confusion()[1].sum() == 0


def test_the_rows_have_the_names_of_the_attacks():
    model, data = some_right()
    found = evaluate(model, data, epsilon=0.05, attacks=parse_attacks("fgsm,cw2", C))
    assert found.attacks == ("clean", "fgsm", "cw2") and found.predictions.shape == (3, len(data))
    assert evaluations.evaluate is absld.evaluate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -0.1),
        ("epsilon", 2.0),
        ("epsilon", float("nan")),
        ("restarts", 0),
        ("examples", 0),
        ("examples", -3),
        ("batch_size", 0),
        ("attacks", ["fgsm"]),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    model, data = some_right()
    call = inspect.unwrap(evaluate)  # its own words, not those of the types that tests enforce
    with pytest.raises(absld.UsageError):
        call(model, data, **{"epsilon": 0.1, name: value})
