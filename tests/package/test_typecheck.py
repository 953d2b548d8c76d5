"""That the package's signatures are checked while the tests run: else shapes are but comments."""

import inspect

import jaxtyping
import pytest
import torch
from helpers import implementations
from torch import nn

import absld
import absld.attack
from absld.config.settings import TrainConfig
from absld.methods import build_method

N, C = 4, 3
LOGITS, LABELS = torch.zeros(N, C), torch.zeros(N, dtype=torch.long)
WIDE, IMAGES = torch.zeros(N, C + 1), torch.zeros(N, 3, 8, 8)

WRONG = {
    "soft labels of other classes": lambda: absld.soft_label_kl(LOGITS, WIDE),
    "one row for all": lambda: absld.soft_label_kl(LOGITS, LOGITS[0]),
    "temperatures of other classes": lambda: absld.soften(LOGITS, LABELS, torch.ones(C + 1)),
    "labels as numbers": lambda: absld.class_risk_sums(LOGITS, LABELS.float(), C),
    "natural logits of another batch": lambda: absld.absld_loss(LOGITS, WIDE, LOGITS, LOGITS),
    "noise that would spread over the batch": lambda: absld.pgd(
        nn.Identity(), torch.sum, IMAGES, IMAGES[:1], epsilon=0.1, step_size=0.1, steps=1
    ),
    "a ball around one image": lambda: absld.project_linf(IMAGES, IMAGES[0], 0.1),
    "accuracies in rows": lambda: absld.fairness(torch.ones(2, C)),
    "a text as a number": lambda: absld.project_linf(IMAGES, IMAGES, "0.1"),
    "no method": lambda: build_method("absld", C),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_every_public_function_is_checked():
    """A wrapped function shows what it wraps. The single file has no signatures to check."""
    functions = [getattr(absld, name) for name in absld.__all__]
    functions = [function for function in functions if inspect.isfunction(function)]
    assert len(functions) >= 10
    assert all(hasattr(function, "__wrapped__") for function in functions)
    assert not hasattr(implementations.absld_min.soften, "__wrapped__")


def test_a_protocol_is_checked_too():
    """What `build_method` returns is a Method; something else in its place would be refused."""
    built = build_method(TrainConfig(method="trades"), C)
    assert isinstance(built, absld.methods.base.Method)
    assert not isinstance(object(), absld.methods.base.Method)
