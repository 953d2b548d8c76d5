"""Trainings on a CUDA device: the numbers of a CPU, and few waits."""

import functools
import sys
from dataclasses import replace

import pytest
import torch
from helpers.cuda_steps import AS_ON_CUDA, StepRecords, assert_clean
from helpers.image_files import make_cifar
from helpers.program import few_digits, main
from helpers.small_training import CONFIG, OnStep, bytes_of, image_set, network
from torch import nn

import absld
import absld.runs.training_run
import absld_min
from absld.config.resolve import resolve
from absld.data.dataset import Splits
from absld.data.placement import Placement
from absld.engine.distributed import Distributed
from absld.engine.logit_cache import LogitCacheSettings
from absld.errors import Interrupted
from absld.progress import Observer

DATA = bytes_of(image_set()), bytes_of(image_set(4, seed=1))
SETTINGS = {
    "plain": {"engine": "plain"},
    "auto": {"engine": "auto"},
    "fast": {"engine": "fast", "precision": "fp32", "compile": False},
}
WAITS = {"plain": 1, "auto": 0, "fast": 0}


@functools.cache
def tiny_digits():
    """The digits, but two batches of training images and one of each other split."""
    parts = zip(few_digits(), (32, 16, 16), strict=True)
    return Splits(*(part.subset(torch.arange(n)) for part, n in parts))


def trained(device, on_step=lambda report: None, teacher=None, fit=None, data=DATA, **settings):
    """Train on a device; return the digest of the weights, and the loss of each epoch."""
    config = replace(CONFIG, epochs=2, **{"max_steps": 2} | settings)
    student = network("student").to(device)
    teacher = (network("teacher") if teacher is None else teacher).to(device)
    given = {"observer": OnStep(on_step), **(fit or {})}
    reports = list(absld.fit(student, teacher, *data, config, **given))
    return absld.digest(student.state_dict()), [report.loss for report in reports]


def expected(cuda, engine, **settings):
    """Train as `trained` does with an engine: on a CPU, or without graph on a real device."""
    if cuda.is_pretend:
        return trained("cpu", engine="plain", **AS_ON_CUDA[engine], **settings)
    without = {"cuda_graph": False, "check_every": 1}
    return trained(cuda.device, **SETTINGS[engine], **without, **settings)


@pytest.mark.parametrize("engine", SETTINGS)
@pytest.mark.parametrize("method", absld.methods.METHODS)
def test_every_method_has_the_numbers_of_a_cpu_and_few_waits(
    method, engine, cuda, short_validation
):
    records = StepRecords(cuda)
    found = trained(cuda.device, records, method=method, **SETTINGS[engine])
    assert found == expected(cuda, engine, method=method)
    assert_clean(records, WAITS[engine])


@pytest.mark.parametrize("engine", SETTINGS)
def test_averaged_weights_are_those_of_a_cpu_and_need_no_wait_in_a_step(
    engine, cuda, short_validation
):
    averaged = {"method": "cfa", "weight_averaging": 0.5, "averaging_start": 0.0}
    records = StepRecords(cuda)
    found = trained(cuda.device, records, **averaged, **SETTINGS[engine])
    assert found == expected(cuda, engine, **averaged)
    assert_clean(records, WAITS[engine])


@pytest.mark.parametrize("engine", SETTINGS)
def test_mapped_images_give_the_same_numbers_and_as_few_waits(engine, cuda, short_validation):
    records = StepRecords(cuda)
    mapped = [Placement("no").place(part) for part in DATA]
    found = trained(cuda.device, records, data=mapped, **SETTINGS[engine])
    assert found == trained(cuda.device, **SETTINGS[engine])
    assert_clean(records, WAITS[engine])


def test_bfloat16_needs_no_wait(cuda, short_validation):
    records = StepRecords(cuda)
    _, losses = trained(cuda.device, records, engine="fast", compile=False)
    assert torch.tensor(losses).isfinite().all()
    assert_clean(records, 0)


class CountedCalls(nn.Module):
    """A network that counts the batches that it is called for in each size."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


def test_a_whole_logit_cache_is_held_on_the_device(cuda, tmp_path, short_validation):
    """Each image has one view, so that the first epoch makes the cache whole."""
    records = StepRecords(cuda)
    views = {"padding": 0, "flip": 0.0, "max_steps": None, "cuda_graph": False}
    without = trained(cuda.device, **views)
    for batches in (3, 0):  # the second training finds the cache
        teacher = CountedCalls(network("teacher"))
        cached = {"logit_cache": LogitCacheSettings(tmp_path, 1.0)}
        assert trained(cuda.device, records, teacher, cached, **views) == without
        opening = 1  # the outputs that are part of the cache's identity
        assert teacher.sizes.count(CONFIG.batch_size) == opening + batches
    assert_clean(records, 0)


def test_a_training_that_was_interrupted_goes_on_as_before(cuda, tmp_path):
    class Stops(Observer):
        def step(self, report):
            if report.epoch == 2 and report.phase == "training" and report.done == 1:
                raise Interrupted(15)

    def run(device, folder, observer=None, resume=False, **settings):
        small = {"dataset": "digits", "epochs": 2, "teacher_epochs": 1, "max_steps": 2}
        small |= {"batch_size": 16, "allow_weak_teacher": True, "out": str(tmp_path / folder)}
        config = resolve(small | settings | {"device": device})
        return absld.runs.training_run.train(
            config, observer or Observer(), resume=resume, splits=tiny_digits()
        ).student_sha256

    whole = run("cpu", "a", channels_last=True) if cuda.is_pretend else run(cuda.device, "a")
    with pytest.raises(Interrupted):
        run(cuda.device, "b", Stops())
    assert run(cuda.device, "b", resume=True) == whole


def test_two_processes_wait_no_more_than_one(cuda, monkeypatch, short_validation):
    """The other process, whose tensors are the same, is a stand-in for torch.distributed."""

    class Parallel(nn.Module):
        def __init__(self, module, broadcast_buffers=True):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        if op == torch.distributed.ReduceOp.SUM:
            tensor *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    fit = {"distributed": Distributed(rank=1, world_size=2)}
    records = StepRecords(cuda)
    found = trained(cuda.device, records, fit=fit, **SETTINGS["auto"])
    assert found == expected(cuda, "auto", fit=fit)
    assert_clean(records, 0)


# --- Both artefacts, whole ---


def states_of_file(folder):
    return [torch.load(folder / f"{role}.pt", "cpu") for role in ("teacher", "student")]


def states_of_package(folder, methods):
    paths = [next(folder.glob(f"*-{method}-*/best.pt")) for method in methods]
    return [torch.load(path, "cpu")["model"] for path in paths]


def equal_states(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert sorted(mine) == sorted(other)
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name


def test_both_artefacts_end_with_the_same_weights(
    cuda, tmp_path, monkeypatch, settings_of_torch, few_digits_in_an_empty_folder
):
    """The single file waits twice a step at most."""
    flags = ["--epochs", "2", "--teacher-epochs", "1", "--batch-size", "16"]

    def load_tiny(config):
        parts = tiny_digits().to(config.device)
        return [(part.images, part.labels) for part in parts], list(parts.train.classes)

    tiny_digits()
    monkeypatch.setattr("helpers.program.few_digits", tiny_digits)
    monkeypatch.setattr(absld_min, "load_data", load_tiny)
    if cuda.is_pretend:
        with monkeypatch.context() as as_on_cuda:
            as_on_cuda.setattr(torch, "contiguous_format", torch.channels_last)
            absld_min.main([*flags, "--device", "cpu", "--out", str(tmp_path / "cpu")])
    records = StepRecords(cuda)
    monkeypatch.setattr(absld_min, "batches", records.of_batches(absld_min.batches))
    absld_min.main([*flags, "--device", cuda.device, "--out", str(tmp_path / "file")])
    assert_clean(records, 2)
    flags += ["--device", cuda.device, "--allow-weak-teacher", "--out", str(tmp_path / "package")]
    assert main("train", *flags) == 0
    file = states_of_file(tmp_path / "file")
    equal_states(states_of_package(tmp_path / "package", ["teacher", "absld"]), file)
    if cuda.is_pretend:
        equal_states(file, states_of_file(tmp_path / "cpu"))


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_certificate_of_the_networks_of_the_paper(
    precision, real_cuda, tmp_path, monkeypatch, settings_of_torch
):
    """ResNet-18 with a WideResNet-34-10 teacher, a few steps on images of 32x32."""
    make_cifar(tmp_path, "cifar10", monkeypatch, train=4, test=1)
    teacher = str(tmp_path / "wide.pt")
    torch.save(absld_min.build_model("wrn-34-10", 10, "some").state_dict(), teacher)
    flags = ["--dataset", "cifar10", "--data", str(tmp_path), "--teacher", teacher]
    flags += ["--epochs", "2", "--batch-size", "32", "--device", "cuda", "--out", str(tmp_path)]
    flags += ["--precision", precision]
    absld_min.main(flags)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main("train", *flags, "--allow-weak-teacher") == 0
    theirs = torch.load(tmp_path / "student.pt", "cpu")
    equal_states(states_of_package(tmp_path, ["absld"]), [theirs])
