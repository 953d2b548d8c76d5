"""The logit cache of a teacher on a CUDA device."""

import pytest
import torch
from helpers.small_training import TRAIN, bytes_of, network

import absld
from absld.config.resolve import resolve
from absld.data.augmentation import Views
from absld.data.dataset import InMemoryImages
from absld.engine.logit_cache import DeviceCachedTeacher, LogitCacheSettings, cached_epoch, fill
from absld.engine.precision import float32_precision
from absld.engine.techniques import Techniques
from absld.runs.logit_caches import describe_cache
from absld.stepper import freeze_teacher


def with_cache(teacher, views, folder, batch_size, precision="fp32"):
    settings = {"flip": 0.5, "precision": precision, "batch_size": batch_size}
    return LogitCacheSettings(folder, 1.0).wrap(teacher, views, **settings)


def test_a_batch_size_has_a_cache_of_its_own(cuda, tmp_path):
    teacher = network("teacher").to(cuda.device).requires_grad_(False)
    views = Views(TRAIN.to(cuda.device), 1)
    for batch_size, caches in ((4, 1), (6, 2), (4, 2)):
        cached = with_cache(teacher, views, tmp_path, batch_size)
        assert isinstance(cached, DeviceCachedTeacher)
        assert len(list(tmp_path.glob("*.cache"))) == caches


def test_a_run_on_a_device_says_that_it_needs_a_whole_cache(cuda):
    config = resolve({"padding": 1})
    assert describe_cache(config, TRAIN).endswith("in runs/logit-caches")
    text = describe_cache(config, TRAIN.to(cuda.device))
    assert text.endswith("; used once all are there: `absld teacher cache` fills it")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "wrn-28-4"])
def test_cached_and_evaluated_logits_are_equal(name, precision, channels_last, real_cuda, tmp_path):
    """Wherever in its batch a view is; in TF32, up to the rounding of 10 bits: there, the order of
    some sums depends on the place."""
    size, device = 128, real_cuda.device
    data = InMemoryImages(
        torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.arange(size) % 10,
        tuple("0123456789"),
    )
    views = Views(bytes_of(data).to(device), 1)
    techniques = Techniques(
        precision=precision, teacher_precision=precision, channels_last=channels_last
    )
    with float32_precision(precision):
        teacher = absld.build_model(name, 10, "teacher").to(device)
        cached = with_cache(freeze_teacher(teacher, techniques), views, tmp_path, size, precision)
        *_, _ = fill(cached, views, size)
        random = torch.Generator().manual_seed(1)
        for batch in torch.randperm(len(views), generator=random).split(size)[:10]:
            numbers = batch.to(device)
            x = views.of_numbers(numbers)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            evaluated = cached(x, numbers)
            with cached_epoch(cached):
                held = cached(x, numbers)
            cached.held = None
            if precision == "tf32":
                torch.testing.assert_close(held, evaluated, rtol=2e-3, atol=2e-3)
            else:
                assert torch.equal(held, evaluated)
