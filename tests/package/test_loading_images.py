"""The package's image sets, splits, views and batches, and where images come from."""

import inspect
import socket

import pytest
import torch
from helpers import strategies as draw
from helpers.image_files import make_folder, numbered
from hypothesis import given
from hypothesis import strategies as st

from absld.data.archives import ARCHIVES
from absld.data.augmentation import Views, batches, steps_per_epoch
from absld.data.dataset import (
    InMemoryImages,
    Splits,
    check_classes,
    describe_images,
    pixels,
    stratified,
)
from absld.data.decoding import Form
from absld.data.sources import hold_out, load_data, load_split
from absld.errors import DataError
from absld.seeding import generator

LABELS = torch.tensor([0, 1, 2, 1])
IMAGES = torch.zeros(4, 3, 8, 8)
CLASSES = ("cat", "dog", "eel")


def refused(*patterns, images=IMAGES, labels=LABELS, classes=CLASSES):
    with pytest.raises(ValueError) as caught:
        InMemoryImages(images, labels, classes)
    assert isinstance(caught.value, DataError)
    for pattern in patterns:
        assert pattern in str(caught.value)


# --- Sets ---


@pytest.mark.parametrize("images", [IMAGES, IMAGES.to(torch.uint8), IMAGES.double(), IMAGES[:, :1]])
def test_a_set(images):
    data = InMemoryImages(images, LABELS, CLASSES)
    assert (len(data), data.num_classes) == (4, 3)
    assert data.to("cpu").digest() == data.digest()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_images_become_float32(kind):
    images = (numbered(4) / 255).to(kind)
    data = InMemoryImages(images.requires_grad_(), LABELS, CLASSES)
    assert data.images.dtype == torch.float32 and not data.images.requires_grad
    assert torch.equal(data.images, images.detach().float())


def test_a_description_has_sizes_and_counts_of_all_sets():
    sets = Splits(
        *(InMemoryImages(IMAGES[:n], LABELS[:n], CLASSES, ("a note",)) for n in (4, 3, 2))
    )
    assert sets.class_counts() == {"train": [1, 2, 1], "validation": [1, 1, 1], "test": [1, 1, 0]}
    assert sets.describe() == [
        "images of 3 classes, 8x8, RGB; 0.0 MiB in memory",
        "train: 4 images; cat 1, dog 2, eel 1",
        "validation: 3 images; 1 of each class",
        "test: 2 images; cat 1, dog 1, eel 0",
        "warning: no test images of eel: accuracy there is NaN, and does not count",
        "a note",
    ]


def test_of_many_classes_the_rarest_and_the_most_frequent_are_described():
    labels = torch.cat([torch.arange(2, 100).repeat_interleave(2), torch.tensor([0] * 9 + [1])])
    names = [f"class\n{k}" for k in range(130)]
    data = InMemoryImages(torch.zeros(len(labels), 1, 2, 2), labels, tuple(names))
    first, counts, absent = describe_images({"test": data})
    assert first == "images of 130 classes, 2x2, grey; 0.0 MiB in memory"
    assert counts.startswith(r"test: 206 images; class\n100 0, ") and ", ..., " in counts
    assert counts.endswith(r", class\n0 9") and counts.count("class") == 20
    assert absent.endswith(r"class\n119, ...: accuracy there is NaN, and does not count")


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_outside_the_classes(label):
    """-1 would be read as the last class by indexing."""
    ends = f"{min(label, 0)}..{max(label, 2)}"
    refused(f"0..2, not {ends}", labels=torch.tensor([0, 1, 2, label]))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS.float(), "int64 of shape (4,), not torch.float32"),
        (LABELS.int(), "not torch.int32"),
        (LABELS.view(4, 1), "not torch.int64 of shape (4, 1)"),
        (LABELS[:3], "of shape (3,)"),
        (torch.tensor(1), "of shape ()"),
    ],
)
def test_labels_of_another_type_or_shape(labels, said):
    refused(said, labels=labels)


@pytest.mark.parametrize("pixel", [-1e-6, 1.0001, 255.0, float("nan"), float("inf")])
def test_pixels_outside_the_box(pixel):
    images = IMAGES.clone()
    images[2, 1, 3, 4] = pixel
    refused("pixels must be in [0,1], not ", images=images)
    if pixel == pixel:
        refused(f"{pixel:g}", images=images)


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_images_of_another_type(kind):
    refused(f"uint8 or floating, not {kind}", images=IMAGES.to(kind))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 3, 8, 8, 1), (4,), ()])
def test_images_of_another_shape(shape):
    refused(str(shape), images=torch.zeros(shape), labels=LABELS if shape else torch.tensor(0))


def test_no_images():
    refused("(0, 3, 8, 8)", images=IMAGES[:0], labels=LABELS[:0])


def test_a_number_is_no_set_of_images():
    refused("()", images=torch.tensor(0.5))


@pytest.mark.parametrize(
    "part", [IMAGES.numpy(), IMAGES.to_sparse(), IMAGES.to("meta"), IMAGES.tolist(), None]
)
def test_images_and_labels_that_are_not_dense_tensors(part):
    """The checks of types in these tests would refuse some before."""
    check = inspect.unwrap(InMemoryImages.__post_init__)
    for name in ("images", "labels"):
        data = object.__new__(InMemoryImages)
        fields = {"images": IMAGES, "labels": LABELS, "classes": CLASSES, name: part}
        data.__dict__.update(fields)
        with pytest.raises(DataError, match=f"{name} must be a dense tensor, not "):
            check(data)


@pytest.mark.parametrize("shape", [(4, 3, 0, 8), (4, 3, 8, 0), (4, 0, 8, 8)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_images_without_pixels(shape, kind):
    refused(str(shape), images=torch.zeros(shape, dtype=kind))


@pytest.mark.parametrize("classes", ["cde", ("cat", "dog", 3), {"cat", "dog", "eel"}, None])
def test_classes_that_are_not_names_in_order(classes):
    with pytest.raises(DataError, match="classes must be a tuple of names"):
        inspect.unwrap(check_classes)(classes)


def test_two_classes_of_one_name():
    refused("two classes have the name 'dog'", classes=("cat", "dog", "dog"))


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_less_than_two_classes(classes):
    refused("two classes or more", str(classes), classes=classes)


def test_a_digest_is_of_all_there_is():
    sets = [
        InMemoryImages(IMAGES, LABELS, CLASSES),
        InMemoryImages(IMAGES.to(torch.uint8), LABELS, CLASSES),
        InMemoryImages(IMAGES.view(4, 1, 24, 8), LABELS, CLASSES),
        InMemoryImages(IMAGES, LABELS.flip(0), CLASSES),
        InMemoryImages(IMAGES, LABELS, ("cat", "dog", "elk")),
        InMemoryImages(IMAGES + 1, LABELS, CLASSES),
    ]
    assert len({data.digest() for data in sets}) == len(sets)
    assert sets[0].digest() == InMemoryImages(IMAGES.clone(), LABELS.clone(), CLASSES).digest()


def test_a_set_that_lies_otherwise_in_memory_has_the_same_digest():
    images = draw.images(0).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    data = InMemoryImages(images, LABELS, CLASSES)
    assert data.digest() == InMemoryImages(images.contiguous(), LABELS, CLASSES).digest()


def test_pixels_are_bytes_over_255():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(pixels(images).flatten(), torch.arange(256) / 255)
    assert torch.equal(pixels(IMAGES), IMAGES)


# --- Sources ---


def unfit(root, *patterns, dataset="folder"):
    with pytest.raises(DataError) as caught:
        load_data(dataset, str(root))
    for pattern in patterns:
        assert pattern in f"{caught.value}\n{caught.value.hint}"
    assert caught.value.hint


def test_a_folder_with_spaces_and_umlauts(tmp_path):
    root = make_folder(tmp_path / "ein Ordner für Bilder", classes=["cat", "日本"])
    splits = load_data("folder", str(root))
    assert [len(part) for part in splits] == [22, 2, 8]
    for part in splits:
        assert part.classes == ("cat", "日本") and part.images.shape[1:] == (3, 32, 32)
        red = part.images[:, 0].float().mean((1, 2))
        assert torch.equal(red > 100, part.labels.bool())  # make_folder's red tells the class


def test_a_folder_that_is_missing(tmp_path):
    unfit(tmp_path / "nothing", "nothing", "train/CLASS/*", "test/CLASS/*")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class(part, tmp_path):
    root = make_folder(tmp_path)
    (root / part / "eel").mkdir()
    unfit(root, "eel")


@pytest.mark.parametrize("content", [b"no image", b"", "half"])
def test_an_unreadable_file_is_named(content, tmp_path):
    root = make_folder(tmp_path)
    whole = (root / "train" / "cat" / "00.png").read_bytes()
    bad = root / "test" / "cat" / "bad.png"
    bad.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    unfit(root, f"cannot read {bad}")


def test_one_class(tmp_path):
    unfit(make_folder(tmp_path, classes=["cat"]), "cat")


def test_classes_of_train_and_test_that_differ(tmp_path):
    root = make_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    unfit(root, "dog", "wolf", "both need the same folders")


def test_a_class_of_one_image_has_none_in_validation(tmp_path):
    root = make_folder(tmp_path)
    for path in sorted((root / "train" / "dog").iterdir())[1:]:
        path.unlink()
    splits = load_data("folder", str(root))
    assert splits.class_counts() == {"train": [11, 1], "validation": [1, 0], "test": [4, 4]}
    assert any("no validation images of dog" in line for line in splits.describe())
    for path in sorted((root / "train" / "cat").iterdir())[1:]:
        path.unlink()
    unfit(root, "no class has two images", "to validate on")


@pytest.mark.parametrize("part", ["train", "test"])
def test_only_what_is_needed_has_to_be_there(part, tmp_path):
    """The other part is not even looked at."""
    root = make_folder(tmp_path)
    names = ("test",) if part == "test" else ("train", "validation")
    whole = load_data("folder", str(root))
    other = root / ("train" if part == "test" else "test")
    for fault in ("broken", "gone"):
        if fault == "broken":
            (other / "cat" / "00.png").write_text("no image")
        else:
            other.rename(root / "elsewhere")
        for name in names:
            found = load_split("folder", str(root), Form(), name)
            assert found.digest() == getattr(whole, name).digest()
    unfit(root, other.name, "to train, test/CLASS/*")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "tiny-imagenet"])
def test_no_data_and_no_network(dataset, tmp_path, monkeypatch):
    """The host, its mirrors, and the way out without them."""

    def getaddrinfo(*args, **settings):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ABSLD_DATA_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("no retry would help"))
    root = tmp_path / "images here"
    archive = ARCHIVES["svhn-train" if dataset == "svhn" else dataset]
    causes = [f"{url}: Name or service not known" for url in archive.urls]
    unfit(root, archive.md5, *causes, f"put it into {root} by hand", dataset=dataset)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 12, 30, 120, 1000]), min_size=2, max_size=6).map(
        lambda counts: [2, *counts]
    )
)
def test_every_class_has_its_share_of_the_validation_images(counts):
    """Whatever the rarest class: about 5 %, at least one of two or more, none of one."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).float() / len(labels)
    data = InMemoryImages(images, labels, tuple(map(str, range(len(counts)))))
    train, validation = hold_out(data, 0.05)
    for count, held_out in zip(counts, validation.class_counts(), strict=True):
        assert held_out == 0 if count < 2 else 1 <= held_out <= max(1, 0.05 * count + 1)
    kept = torch.cat([train.images, validation.images]).flatten().sort().values
    assert torch.equal(kept, images.flatten())


@pytest.mark.parametrize(("count", "classes"), [(20, 10), (120, 10), (3, 7), (100, 100)])
def test_balanced_classes_are_split_by_scikit_learn(count, classes):
    """As in absld_min.py, and as ever: runs of before stay comparable."""
    from sklearn.model_selection import train_test_split

    labels = torch.arange(classes).repeat(count)
    images = torch.rand(len(labels), 1, 1, 1)
    size = max(round(0.05 * len(labels)), classes)
    expected = train_test_split(images, test_size=size, stratify=labels, random_state=0)
    found = hold_out(InMemoryImages(images, labels, tuple(map(str, range(classes)))))
    assert all(torch.equal(x, part.images) for x, part in zip(expected, found, strict=True))


# --- Views and batches ---


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_views_are_all_crops_and_their_mirrors(padding, kind):
    """Each offset is its own window of the padded image; the zeros are where they should be."""
    images = numbered(2, side=5)
    data = InMemoryImages(
        images if kind == torch.uint8 else images / 255, torch.tensor([0, 1]), CLASSES
    )
    views = Views(data, padding)
    padded = torch.zeros(2, 3, 5 + 2 * padding, 5 + 2 * padding)
    padded[:, :, padding : padding + 5, padding : padding + 5] = images / 255
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            offsets = torch.tensor([dy, dy]), torch.tensor([dx, dx])
            plain = views(torch.tensor([1, 0]), *offsets, torch.tensor([False, False]))
            window = padded[[1, 0], :, dy : dy + 5, dx : dx + 5]
            assert torch.equal(plain, window) and plain.dtype == torch.float32
            mixed = views(torch.tensor([1, 0]), *offsets, torch.tensor([False, True]))
            assert torch.equal(mixed, torch.stack([window[0], window[1].flip(2)]))


def epoch(key=(0, "student", 1), n=11, padding=1, side=8, **settings):
    data = InMemoryImages(numbered(n, side), torch.arange(n), tuple(map(str, range(n))))
    given = {"batch_size": 4, "flip": 0.5, "radius": 0.001, "steps": n // 4} | settings
    return list(batches(Views(data, padding), *key, **given))


def same(a, b):
    return len(a) == len(b) and all(
        all(map(torch.equal, one[:3], two[:3])) for one, two in zip(a, b, strict=True)
    )


@given(draw.seeds, st.integers(0, 5))
def test_batches_from_a_step_on_are_the_tail_of_the_whole(seed, first):
    """So a run that goes on in mid-epoch sees what it would have seen."""
    key = (seed, "student", 1)
    assert same(epoch(key, n=20, first_step=first), epoch(key, n=20)[first:])


def test_noise_is_normal_and_of_the_deviation_that_was_asked_for():
    ((x_nat, _, noise, _),) = epoch(n=400, side=16, batch_size=400, steps=1, radius=0.01)
    assert noise.shape == x_nat.shape and noise.dtype == x_nat.dtype
    assert 0.0099 < noise.std() < 0.0101 and noise.mean().abs() < 1e-4
    assert not epoch(radius=0.0)[0].noise.any()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flips_never_and_always(flip):
    """Blue tells the column: it rises to the right, unless mirrored."""
    for x_nat, *_ in epoch(flip=flip, padding=0):
        slope = x_nat[:, 2].diff(dim=2)
        assert ((slope < 0) if flip else (slope > 0)).all()


@pytest.mark.parametrize(
    ("images", "size", "most", "steps"),
    [(11, 4, None, 2), (12, 4, None, 3), (3, 4, None, 0), (12, 4, 2, 2), (12, 4, 9, 3)],
)
def test_steps_of_an_epoch(images, size, most, steps):
    assert steps_per_epoch(images, size, most) == steps


def test_a_data_set_that_there_is_not():
    with pytest.raises(DataError, match="no data set 'mnist'"):
        load_data("mnist", "data")


# --- Subsets (see test_intervals, too) ---


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 6), draw.seeds)
def test_a_subset_is_exactly_in_proportion_where_it_can_be(shares, times, seed):
    """Classes of 6 times their share each, of which `times` in 6 are taken."""
    labels = torch.arange(len(shares)).repeat_interleave(6 * torch.tensor(shares))
    labels = labels[torch.randperm(len(labels), generator=generator(seed))]
    chosen = stratified(labels, len(shares), times * sum(shares), "test", seed)
    assert labels[chosen].bincount().tolist() == [times * share for share in shares]


@given(
    st.lists(st.sampled_from([0, 1, 2, 30]), min_size=2, max_size=6).filter(any),
    st.integers(1, 45),
    st.integers(1, 45),
    draw.seeds,
)
def test_a_smaller_subset_is_part_of_a_larger(sizes, one, other, seed):
    """And the first images are of classes of their own, the rare ones, too."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator(seed))]
    small, large = (stratified(labels, 6, size, seed) for size in sorted((one, other)))
    assert set(small.tolist()) <= set(large.tolist())
    present = len(labels.unique())
    assert len(labels[small].unique()) == min(len(small), present)


def test_every_image_has_its_chance():
    """Of 4 and 12 images 1 and 3 are taken: each in a quarter of the subsets, and more seldom than
    by five standard errors once in a million times."""
    labels = torch.tensor([0, 1, 1, 1] * 4)
    before = torch.get_rng_state()
    taken = torch.zeros(16)
    for key in range(2000):
        taken[stratified(labels, 2, 4, "test", key)] += 1
    assert torch.equal(torch.get_rng_state(), before)
    assert ((taken / 2000 - 0.25).abs() <= 5 * (0.25 * 0.75 / 2000) ** 0.5).all()


@pytest.mark.parametrize("images", [IMAGES, IMAGES.to(torch.uint8)])
def test_a_subset_has_its_images_in_the_order_of_their_numbers(images):
    images = images.clone()
    images[:, 0, 0, 0] = torch.tensor([0, 1, 0, 1]).to(images.dtype)
    data = InMemoryImages(images, LABELS, CLASSES)
    some = data.subset(torch.tensor([3, 0, 3]))
    assert torch.equal(some.images, images[[3, 0, 3]]) and some.images.dtype == images.dtype
    assert (some.labels.tolist(), some.classes) == ([1, 0, 1], CLASSES)
    some.images[0] = 0
    assert torch.equal(data.images, images)  # a set of its own
    with pytest.raises(DataError, match="0, 3, 8, 8"):
        data.subset(torch.tensor([], dtype=torch.long))
