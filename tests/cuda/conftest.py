"""The device of these tests: a real one where there is one, else a pretend one."""

import functools

import pytest
from helpers.cuda_device import HAS_CUDA, RealCuda
from helpers.pretend_cuda import PretendCuda

import absld.trainer

PRETEND = pytest.param(
    PretendCuda, id="pretend", marks=pytest.mark.skipif(HAS_CUDA, reason="a real device is here")
)
REAL = pytest.param(
    RealCuda,
    id="real",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")],
)


@pytest.fixture(params=[PRETEND, REAL])
def cuda(request):
    """A CUDA device that refuses nothing in the test; see `Record` for what it records."""
    with request.param() as device:
        yield device
    assert not device.faults


@pytest.fixture(params=[REAL])
def real_cuda(request):
    """A CUDA device, for what would take a CPU too long."""
    with request.param() as device:
        yield device


@pytest.fixture(params=[PRETEND])
def pretend_cuda(request):
    """A pretend device, for deliberate faults."""
    with request.param() as device:
        yield device


@pytest.fixture
def short_validation(monkeypatch):
    """Validate with fewer steps of PGD: it is most of a short training."""
    short = functools.partial(absld.trainer.validate, steps=2)
    monkeypatch.setattr(absld.trainer, "validate", short)
