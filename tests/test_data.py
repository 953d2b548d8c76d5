"""Image sources, splits, views and batches."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import strategies as draw
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from absld_min import Config, batches, generator, load_data, split


def make_folder(root, classes=("cat", "dog"), train=12, test=4, side=10, suffix="png"):
    """DIR/{train,test}/CLASS/NN.png; the first channel holds 200 * the class."""
    for part, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((side, side, 3), 8 * i, np.uint8)
                pixels[:, :, 0] = 200 * k
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.{suffix}")
    return root


def folder_config(root, **settings):
    return Config(dataset="folder", data=str(root), device="cpu", batch_size=2, **settings)


def test_digits():
    sets, classes = load_data(Config(device="cpu"))
    assert [len(labels) for _, labels in sets] == [1018, 180, 599]
    assert classes == list("0123456789")
    for images, labels in sets:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        assert torch.equal(images[:, 0], images[:, 2]) and images.max() == 255
        shares = labels.bincount() / len(labels)
        assert ((shares - 0.1) < 0.015).all()


def test_splits_are_disjoint_and_the_same_for_all_seeds():
    first, again = load_data(Config(device="cpu"))[0], load_data(Config(device="cpu", seed=5))[0]
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


@given(st.lists(st.integers(2, 30), min_size=2, max_size=5))
def test_split_is_in_proportion(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = torch.arange(len(labels))
    size = max(len(counts), len(labels) // 4)
    if size <= len(labels) - len(counts):
        (kept, _), (taken, taken_labels) = split(index, labels, size)
        assert sorted([*kept.tolist(), *taken.tolist()]) == index.tolist()
        assert torch.equal(labels[taken], taken_labels)
        expected = torch.tensor(counts) * size / len(labels)
        found = taken_labels.bincount(minlength=len(counts))
        assert len(taken) == size and ((found - expected).abs() <= 1).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tiff"])
def test_folder_of_any_format(suffix, tmp_path):
    root = make_folder(tmp_path / "spaces and ümlauts", suffix=suffix)
    sets, classes = load_data(folder_config(root))
    assert classes == ["cat", "dog"]
    assert [images.shape for images, _ in sets] == [(22, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32)]
    for images, labels in sets:
        assert images.dtype == torch.uint8
        assert ((images[:, 0].float().mean((1, 2)) > 100) == labels.bool()).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "I;16"])
def test_images_of_any_mode(mode, tmp_path):
    root = make_folder(tmp_path)
    Image.new(mode, (40, 20)).save(
        root / "train" / "cat" / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    )
    train, validation, _ = load_data(folder_config(root))[0]
    assert len(train[1]) + len(validation[1]) == 25


def refuse(root, *patterns, config=None):
    with pytest.raises((OSError, ValueError)) as caught:
        load_data(config or folder_config(root))
    for pattern in patterns:
        assert pattern in str(caught.value)


def test_missing_folder(tmp_path):
    refuse(tmp_path / "nothing", "nothing")


def test_empty_class(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "eel").mkdir()
    refuse(root, "eel")


@pytest.mark.parametrize("content", [b"no image", b"", None])
def test_unreadable_file(content, tmp_path):
    root = make_folder(tmp_path)
    bad = root / "train" / "cat" / "bad.png"
    whole = (root / "train" / "cat" / "00.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    refuse(root, "cannot read", "bad.png")


def test_one_class(tmp_path):
    refuse(make_folder(tmp_path, classes=["cat"]), "cat")


def test_classes_of_train_and_test_differ(tmp_path):
    root = make_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    refuse(root, "dog", "wolf")


def test_a_class_with_one_image(tmp_path):
    root = make_folder(tmp_path)
    for path in sorted((root / "train" / "dog").iterdir())[1:]:
        path.unlink()
    refuse(root, "1 member")


def test_fewer_images_than_a_batch(tmp_path):
    root = make_folder(tmp_path)
    config = Config(dataset="folder", data=str(root), device="cpu", batch_size=500)
    refuse(root, "22 training images", "--batch-size", config=config)


def test_a_hundred_to_one(tmp_path):
    root = make_folder(tmp_path, train=2, side=4)
    source = root / "train" / "cat" / "00.png"
    for i in range(198):
        (source.parent / f"more{i}.png").write_bytes(source.read_bytes())
    sets, _ = load_data(folder_config(root))
    assert all(labels.bincount(minlength=2).min() >= 1 for _, labels in sets)


# --- CIFAR, in archives of the published format that the tests make ---


def make_cifar(root, folder, parts, key, meta, monkeypatch, family, classes=10):
    """Batches as pickled dicts of rows of 3072 bytes, with the check sums that torchvision wants."""

    def write(name, content):
        raw = pickle.dumps(content)
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    sums = []
    for n, name in enumerate(parts):
        labels = np.repeat(np.arange(classes), 4).tolist()
        rows = np.tile(np.array(labels, np.uint8)[:, None], (1, 3072))
        rows[:, 1024:2048] = n  # green: which file the image comes from
        sums.append([name, write(name, {"data": rows, key: labels})])
    names = [f"class {k}" for k in range(classes)]
    md5 = write(meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(family, "train_list", sums[:-1])
    monkeypatch.setattr(family, "test_list", sums[-1:])
    monkeypatch.setattr(family, "meta", meta | {"md5": md5})
    return names


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_in_the_published_format(dataset, tmp_path, monkeypatch):
    from torchvision import datasets

    family = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    ten = dataset == "cifar10"
    classes = 10 if ten else 100
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    names = make_cifar(
        tmp_path, family.base_folder, parts, "labels" if ten else "fine_labels",
        dict(family.meta), monkeypatch, family, classes,
    )  # fmt: skip
    config = Config(dataset=dataset, data=str(tmp_path), device="cpu", batch_size=8)
    sets, found = load_data(config)
    assert found == names
    total = sum(len(labels) for _, labels in sets[:2])
    assert total == 4 * classes * (len(parts) - 1) and len(sets[2][1]) == 4 * classes
    for images, labels in sets:
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert (sets[2][0][:, 1] == len(parts) - 1).all()  # the test file, in the green channel


def test_cifar_archive_that_is_not_what_it_should_be(tmp_path, monkeypatch):
    from torchvision import datasets

    with tarfile.open(tmp_path / datasets.CIFAR10.filename, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *args, **kw: (_ for _ in ()).throw(OSError("no network"))
    )
    config = Config(dataset="cifar10", data=str(tmp_path), device="cpu")
    with pytest.raises((OSError, RuntimeError)):
        load_data(config)


# --- Batches ---


def one_epoch(config, images, labels, *key):
    return list(batches(config, images, labels, *(key or (0, "student", 1))))


def numbered(n, side=8):
    """Images whose pixels tell their number, row and column, in the three channels."""
    rows = torch.arange(1, side + 1).view(1, side, 1).expand(n, side, side)
    number = torch.arange(1, n + 1).view(n, 1, 1).expand(n, side, side)
    return torch.stack([number, rows, rows.mT], dim=1).to(torch.uint8)


def test_an_epoch_takes_every_image_once_but_a_short_last_batch():
    images, labels = numbered(11), torch.arange(11)
    epoch = one_epoch(Config(batch_size=4), images, labels)
    taken = torch.cat([labels for _, labels, _ in epoch])
    assert [len(labels) for _, labels, _ in epoch] == [4, 4]
    assert len(taken.unique()) == 8
    for x_nat, batch_labels, _ in epoch:
        assert torch.equal((x_nat[:, 0].amax((1, 2)) * 255).round().long() - 1, batch_labels)


@pytest.mark.parametrize(("dataset", "padding"), [("digits", 1), ("cifar10", 4)])
def test_views_are_all_crops_of_the_padded_image_and_their_mirrors(dataset, padding):
    """Every view is one of the (2 * padding + 1)^2 windows, mirrored or not, and all occur."""
    images = numbered(1).expand(3000, -1, -1, -1)
    config = Config(dataset=dataset, batch_size=1000)
    epoch = one_epoch(config, images, torch.zeros(3000, dtype=torch.long))
    views = {x.numpy().tobytes() for x_nat, _, _ in epoch for x in (x_nat * 255).round().byte()}
    padded = torch.zeros(3, 8 + 2 * padding, 8 + 2 * padding, dtype=torch.uint8)
    padded[:, padding:-padding, padding:-padding] = images[0]
    expected = set()
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            window = padded[:, dy : dy + 8, dx : dx + 8]
            flips = (window,) if dataset == "digits" else (window, window.flip(2))
            expected |= {flip.contiguous().numpy().tobytes() for flip in flips}
    assert views == expected
    assert len(expected) == (9 if dataset == "digits" else 162)


@given(draw.seeds)
def test_batches_come_from_their_key_alone(seed):
    images, labels = numbered(8), torch.arange(8)
    config = Config(batch_size=4)
    state = torch.get_rng_state()
    first = one_epoch(config, images, labels, seed, "student", 1)
    assert torch.equal(torch.get_rng_state(), state)
    again = one_epoch(config, images, labels, seed, "student", 1)
    other = one_epoch(config, images, labels, seed, "student", 2)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0][2], other[0][2])


def test_images_stay_in_range_and_noise_is_small():
    x_nat, _, noise = one_epoch(Config(batch_size=500), numbered(500), torch.zeros(500).long())[0]
    assert x_nat.dtype == noise.dtype == torch.float32
    assert x_nat.min() >= 0 and x_nat.max() <= 1
    assert 0.00099 < noise.std() < 0.00101 and noise.mean().abs() < 1e-5


def test_generator_knows_its_whole_key():
    keys = [(0, "student", 1), (0, "student", 2), (1, "student", 1), (0, "teacher", 1), (0,)]
    drawn = {torch.rand(1, generator=generator("cpu", *key)).item() for key in keys}
    assert len(drawn) == len(keys)
