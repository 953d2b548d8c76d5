"""The single file's images: sources, splits, views and batches."""

import pytest
import torch
from helpers import strategies as draw
from helpers.image_files import make_cifar, numbered
from hypothesis import given

from absld_min import DIGITS, Config, batches, generator, load_data

ON_CPU = {"device": "cpu"}


def test_the_digits_are_split_in_proportion_to_the_classes():
    data, classes = load_data(Config(**ON_CPU))
    assert [len(labels) for _, labels in data] == [1018, 180, 599]
    assert classes == list("0123456789")
    for images, labels in data:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        assert torch.equal(images[:, 0], images[:, 2]) and images.max() == 255
        shares = labels.bincount() / len(labels)
        assert ((shares - 0.1) < 0.015).all()


def test_splits_do_not_depend_on_the_seed():
    first, again = (load_data(Config(seed=seed, **ON_CPU))[0] for seed in (0, 5))
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_published_archive(dataset, tmp_path, monkeypatch):
    names = make_cifar(tmp_path, dataset, monkeypatch, train=20, test=2)
    data, found = load_data(Config(dataset=dataset, data=str(tmp_path), **ON_CPU))
    classes, batches_of = len(names), 5 if dataset == "cifar10" else 1
    assert found == names
    total = 20 * classes * batches_of
    assert [len(labels) for _, labels in data] == [total * 19 // 20, total // 20, 2 * classes]
    for images, labels in data:
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
        assert images.is_contiguous() and labels.bincount().min() > 0
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert (data[2][0][:, 1, 0, 0] == batches_of).all()  # green tells the file


# --- Batches ---


def one_epoch(config, images, labels, *key):
    return list(batches(config, images, labels, *(key or (0, "student", 1))))


def test_an_epoch_takes_every_image_once_but_a_short_last_batch():
    images, labels = numbered(11), torch.arange(11)
    epoch = one_epoch(Config(batch_size=4, **ON_CPU), images, labels)
    taken = torch.cat([labels for _, labels, _ in epoch])
    assert [len(labels) for _, labels, _ in epoch] == [4, 4]
    assert len(taken.unique()) == 8
    for x_nat, batch_labels, _ in epoch:
        assert torch.equal((x_nat[:, 0].amax((1, 2)) * 255).round().long() - 1, batch_labels)


@pytest.mark.parametrize("settings", [DIGITS, {}], ids=["digits", "cifar10"])
def test_views_are_all_crops_of_the_padded_image_and_their_mirrors(settings):
    """Every view is one of the (2 * padding + 1)^2 windows, mirrored or not, and all occur."""
    images = numbered(1).expand(3000, -1, -1, -1)
    config = Config(**settings, batch_size=1000, **ON_CPU)
    epoch = one_epoch(config, images, torch.zeros(3000, dtype=torch.long))
    views = {x.numpy().tobytes() for x_nat, _, _ in epoch for x in (x_nat * 255).round().byte()}
    padding = config.padding
    padded = torch.zeros(3, 8 + 2 * padding, 8 + 2 * padding, dtype=torch.uint8)
    padded[:, padding:-padding, padding:-padding] = images[0]
    expected = set()
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            window = padded[:, dy : dy + 8, dx : dx + 8]
            flips = (window, window.flip(2)) if config.flip else (window,)
            expected |= {flip.contiguous().numpy().tobytes() for flip in flips}
    assert views == expected
    assert len(expected) == (9 if settings else 162)


@given(draw.seeds)
def test_batches_come_from_their_key_alone(seed):
    images, labels = numbered(8), torch.arange(8)
    config = Config(batch_size=4, **ON_CPU)
    state = torch.get_rng_state()
    first = one_epoch(config, images, labels, seed, "student", 1)
    assert torch.equal(torch.get_rng_state(), state)
    again = one_epoch(config, images, labels, seed, "student", 1)
    other = one_epoch(config, images, labels, seed, "student", 2)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0][2], other[0][2])


def test_images_stay_in_range_and_noise_is_small():
    config = Config(batch_size=500, **ON_CPU)
    x_nat, _, noise = one_epoch(config, numbered(500), torch.zeros(500).long())[0]
    assert x_nat.dtype == noise.dtype == torch.float32
    assert x_nat.min() >= 0 and x_nat.max() <= 1
    assert 0.00099 < noise.std() < 0.00101 and noise.mean().abs() < 1e-5


def test_every_part_of_its_key_changes_a_generator():
    keys = [(0, "student", 1), (0, "student", 2), (1, "student", 1), (0, "teacher", 1), (0,)]
    drawn = {torch.rand(1, generator=generator(*key)).item() for key in keys}
    assert len(drawn) == len(keys)
