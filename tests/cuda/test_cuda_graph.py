"""The attack as a CUDA graph: the same images, for every batch and on every device."""

from dataclasses import replace

import pytest
import torch
from helpers.pretend_cuda import DeviceFault
from helpers.small_training import TRAIN, network

from absld.attack import cross_entropy, kl
from absld.config.settings import TrainConfig
from absld.engine.cuda_graph import GraphedFunction, GraphedNetwork
from absld.engine.engine import Engine, training_attack
from absld.engine.techniques import Techniques
from absld.errors import UsageError
from absld.methods import METHODS
from absld.stepper import Stepper

CONFIG = TrainConfig(epsilon=0.1, attack_steps=3)


def inputs(seed, device):
    """Draw images, noise and soft labels."""
    random = torch.Generator().manual_seed(seed)
    x_nat = torch.rand(4, 3, 4, 4, generator=random)
    noise = 0.01 * torch.randn(x_nat.shape, generator=random)
    soft = torch.randn(4, 3, generator=random).softmax(1)
    return [tensor.to(device) for tensor in (x_nat, noise, soft)]


def attack_of(student, norm="linf", **techniques):
    """Return the training attack on a student as a function of images, noise and soft labels."""
    chosen = Techniques(**techniques)
    engine, attack = Engine(student, chosen), training_attack(replace(CONFIG, norm=norm), chosen)
    return lambda x_nat, noise, soft: attack(engine, kl(soft), x_nat, noise)


@pytest.mark.parametrize(("fold", "norm"), [(False, "linf"), (True, "linf"), (False, "l2")])
def test_a_graph_gives_the_same_attack(fold, norm, cuda):
    """Also after the weights have changed, which the graph reads where they are."""
    student = network("student").to(cuda.device)
    techniques = {"fold_batch_norm": fold, "norm": norm}
    plain = attack_of(student, **techniques)
    graphed = attack_of(student, cuda_graph=True, **techniques)
    seen = []
    for seed in range(3):
        batch = inputs(seed, cuda.device)
        seen.append(plain(*batch))
        assert torch.equal(graphed(*batch), seen[-1])
        with torch.no_grad():
            for parameter in student.parameters():
                parameter *= -1.1
    assert not torch.equal(seen[0], seen[1])


def test_each_shape_and_objective_has_a_graph_of_its_own(cuda):
    """And what a graph returned stays when it is replayed."""
    student = network("student").to(cuda.device)
    engine, attack = Engine(student, Techniques()), training_attack(CONFIG, Techniques())
    graphed = training_attack(CONFIG, Techniques(cuda_graph=True))
    found, expected = [], []
    for n, seed in ((4, 0), (2, 1), (4, 2)):
        x_nat, noise, soft = (tensor[:n] for tensor in inputs(seed, cuda.device))
        for objective in (kl(soft), cross_entropy(soft.argmax(1))):
            found.append(graphed(engine, objective, x_nat, noise))
            expected.append(attack(engine, objective, x_nat, noise))
    assert all(map(torch.equal, found, expected)) and len(graphed.graphs) == 4
    in_l2 = replace(graphed, norm="l2")(engine, kl(soft), x_nat, noise)
    assert torch.equal(in_l2, replace(attack, norm="l2")(engine, kl(soft), x_nat, noise))
    assert len(graphed.graphs) == 5
    wider = replace(graphed, epsilon=0.2, step_size=0.1)  # as a schedule would
    x_nat, noise, soft = inputs(0, cuda.device)
    x_adv = wider(engine, kl(soft), x_nat, noise)
    assert torch.equal(
        x_adv, replace(attack, epsilon=0.2, step_size=0.1)(engine, kl(soft), x_nat, noise)
    )
    assert len(graphed.graphs) == 6


@pytest.mark.parametrize("method", METHODS)
def test_an_attack_that_differs_from_step_to_step_is_not_captured(method, cuda):
    """Radii that are tensors, objectives that count, two networks."""
    networks = [network(role).to(cuda.device) for role in ("student", "teacher")]
    config = TrainConfig(method=method, engine="auto", batch_size=4, padding=1, attack_steps=2)
    stepper = Stepper(*networks, TRAIN, config)
    for number, draw in enumerate(stepper.draws(1)):
        stepper.step(draw, 1, number, lambda metrics: None)
    differs = {"absld-weights", "fair-rslad", "absld-margins", "adaad", "cfa", "dafa", "bat"}
    assert len(stepper.attack.graphs) == (method not in differs)


def test_a_teacher_is_a_graph_only_without_gradient(cuda):
    """Also after its weights have changed."""
    teacher = network("teacher").to(cuda.device).eval().requires_grad_(False)
    graphed = GraphedNetwork(teacher)
    with torch.no_grad():
        for n, seed in ((4, 0), (4, 1), (2, 2)):
            x = inputs(seed, cuda.device)[0][:n]
            assert torch.equal(graphed(x), teacher(x))
            teacher[0].weight.mul_(1.1)
    assert len(graphed.graphs) == 2
    x = inputs(3, cuda.device)[0].requires_grad_()
    graphed(x).sum().backward()
    assert x.grad.abs().sum() > 0 and len(graphed.graphs) == 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_by_a_graph_does_not_wait(norm, cuda):
    student, batch = network("student").to(cuda.device), inputs(0, cuda.device)
    graphed = attack_of(student, norm, cuda_graph=True)
    graphed(*batch)
    with cuda.step() as record:
        graphed(*batch)
    assert not record.waits
    if cuda.is_pretend:
        copies = len(batch) + 1
        assert record.operations == copies + 1  # the replay


def test_a_graph_is_captured_on_the_device_of_its_tensors(pretend_cuda):
    """Whichever device is the current one, and whatever was captured on another before."""
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        student, batch = network("student").to(device), inputs(0, device)
        plain = attack_of(student)(*batch)
        assert torch.equal(attack_of(student, cuda_graph=True)(*batch), plain)
        assert torch.cuda.current_device() == 0
    assert not pretend_cuda.faults


# --- Deliberate faults ---


def test_a_wait_in_a_capture_is_refused(pretend_cuda):
    def waits(x):
        return x / x.sum().item()

    with pytest.raises(UsageError, match=r"_local_scalar_dense, a wait, inside the capture"):
        GraphedFunction(waits, [torch.ones(3, device="cuda")])


def test_a_generator_in_a_capture_is_refused(pretend_cuda):
    """torch does not know it, so that each replay would draw the same numbers."""
    generator = torch.Generator("cuda")

    def draws(x):
        return x + torch.rand(3, generator=generator, device="cuda")

    with pytest.raises(UsageError, match="rand with a generator, inside the capture"):
        GraphedFunction(draws, [torch.ones(3, device="cuda")])


def test_a_capture_on_another_device_is_refused(pretend_cuda):
    graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda:1")
    refused = pytest.raises(DeviceFault, match="on cuda:1 in a capture on cuda:0")
    with refused, torch.cuda.graph(graph):
        x * 2


def test_a_value_that_is_baked_into_a_graph_is_seen(pretend_cuda):
    """A number of Python is that of the first batch for ever."""
    factors = iter([2.0, 2.0, 2.0, 3.0])

    def scaled(x):
        return x * next(factors)

    ones = torch.ones(3, device="cuda")
    graphed = GraphedFunction(scaled, [ones])
    assert graphed(ones).tolist() == [2, 2, 2]
    assert graphed(5 * ones).tolist() == [10, 10, 10] != scaled(5 * ones).tolist()
