"""The pretend device itself: deliberate faults in the product are caught, with their line."""

import pytest
import torch
from helpers.cuda_steps import StepRecords
from helpers.pretend_cuda import DeviceFault
from helpers.small_training import CONFIG, TRAIN, VALIDATION, OnStep, network

import absld
import absld.data.augmentation
from absld.methods import Absld

pytestmark = pytest.mark.usefixtures("short_validation")


def train(cuda):
    """Train for an epoch; return the records of its steps."""
    student, teacher = (network(role).to(cuda.device) for role in ("student", "teacher"))
    records = StepRecords(cuda)
    next(absld.fit(student, teacher, TRAIN, VALIDATION, CONFIG, observer=OnStep(records)))
    return records


def test_noise_from_the_cpu_is_refused(pretend_cuda, monkeypatch):
    batch = absld.data.augmentation.Views.batch

    def with_noise(self, draw):
        made = batch(self, draw)
        return made._replace(noise=torch.randn(made.noise.shape))

    monkeypatch.setattr(absld.data.augmentation.Views, "batch", with_noise)
    with pytest.raises(DeviceFault, match="add: a CPU tensor among tensors of cuda:0"):
        train(pretend_cuda)


def test_a_generator_of_another_device_is_refused(pretend_cuda, monkeypatch):
    on_cpu = lambda *key, device="cpu": torch.Generator()  # noqa: E731
    monkeypatch.setattr(absld.data.augmentation, "generator", on_cpu)
    with pytest.raises(DeviceFault, match="randperm: a generator of cpu for cuda:0"):
        train(pretend_cuda)


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: float(loss.detach()),
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().reshape(1).tolist(),
        lambda loss: loss.detach().isfinite().nonzero(),
        lambda loss: torch.ones(3).to(loss.device),
        lambda loss: torch.tensor(1.0, device=loss.device),
        lambda loss: loss.detach().repeat(3)[torch.ones(3, device=loss.device).bool()],
        lambda loss: torch.cuda.synchronize(),
    ],
)
def test_a_hidden_wait_is_counted(wait, pretend_cuda, monkeypatch):
    step = Absld.step

    def waiting(self, *given):
        result = step(self, *given)
        wait(result.loss)
        return result

    monkeypatch.setattr(Absld, "step", waiting)
    records = train(pretend_cuda)
    assert len(records) == 2
    for record in records:
        assert len(record.waits) == 1 and " at stepper.py:" in record.waits[0]


def test_what_cuda_does_without_a_word_is_recorded(pretend_cuda):
    x, index = torch.ones(3, device="cuda"), torch.tensor([0, 1])
    with pretend_cuda.step() as record:
        x[index]
        torch.rand(3, device="cuda")
        x.scatter_add(0, index.to("cuda"), x)
    assert len(record.cpu_indices) == len(record.global_draws) == len(record.unrepeatable) == 1


def test_a_copy_of_pinned_memory_need_not_be_waited_for(pretend_cuda):
    numbers = torch.arange(3.0)
    with pretend_cuda.step() as record:
        there = numbers.pin_memory().to("cuda", non_blocking=True)
        back = there.to("cpu", non_blocking=True)
        there.copy_((2 * numbers).pin_memory(), non_blocking=True)
        buffer = torch.empty(3, pin_memory=True).copy_(there, non_blocking=True)
    assert not record.waits
    assert torch.equal(back, numbers) and torch.equal(buffer, 2 * numbers)
    with pretend_cuda.step() as record:
        numbers.to("cuda", non_blocking=True)
        there.copy_(numbers, non_blocking=True)
        buffer.copy_(there)
    assert len(record.waits) == 3


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.numpy(),
        lambda x: x + torch.ones(3),
        lambda x: x + x.to("cuda:1"),
        lambda x: torch.cat([x, torch.tensor(1.0)]),
        lambda x: torch.arange(3)[x.long()],
        lambda x: x.uniform_(generator=torch.Generator("cuda:1")),
    ],
)
def test_what_cuda_refuses_is_refused(refused, pretend_cuda):
    with pytest.raises(DeviceFault):
        refused(torch.ones(3, device="cuda"))
    assert pretend_cuda.faults
