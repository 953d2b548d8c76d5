"""Data sets in the formats of their archives, made here: SVHN and Tiny ImageNet; sizes of images."""

import hashlib
import os
import shutil
import time

import numpy as np
import pytest
import torch
from helpers.image_files import make_cifar, make_folder, publish
from PIL import Image

from absld.data.decoding import Form
from absld.data.sources import load_data, load_split
from absld.errors import DataError
from absld.evaluation.class_names import check_class_names
from absld.models.loading import Network


def refused(*patterns, dataset, root, **settings):
    with pytest.raises(DataError) as caught:
        load_data(dataset, str(root), **settings)
    for pattern in patterns:
        assert pattern in f"{caught.value}\n{caught.value.hint}"


# --- SVHN: images (32,32,3,N) and labels 1..10, of which 10 means 0, in MATLAB's format ---


def make_svhn(root, monkeypatch, per_class=4):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    lists = {}
    for part, red in (("train", 1), ("test", 2)):
        labels = np.tile(np.arange(1, 11), per_class)
        images = np.zeros((32, 32, 3, len(labels)), np.uint8)
        images[:, :, 0], images[0, 1, 1] = red, labels  # which file, and row 0, column 1: the label
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": labels[:, None].astype(np.uint8)})
        lists[part] = ["nowhere", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        publish(f"svhn-{part}", path, monkeypatch)
    monkeypatch.setattr(SVHN, "split_list", lists)


def test_svhn_in_the_published_format(tmp_path, monkeypatch):
    make_svhn(tmp_path, monkeypatch)
    splits = load_data("svhn", str(tmp_path))
    assert [len(part) for part in splits] == [30, 10, 40]
    for part, red in zip(splits, (1, 1, 2), strict=True):
        assert part.images.shape[1:] == (3, 32, 32) and part.images.dtype == torch.uint8
        assert part.classes == tuple("0123456789")
        assert part.labels.bincount(minlength=10).min() > 0
        assert (part.images[:, 0] == red).all()
        # Rows stay rows; a class is the digit, so 10 is 0.
        assert torch.equal(part.images[:, 1, 0, 1].long() % 10, part.labels)
        assert not part.images[:, 1, 1, 0].any()


# --- Tiny ImageNet: train/ID/images/*.JPEG, val/images/*.JPEG with a table of their classes ---

IDS = ("n01443537", "n01629819", "n01641577", "n01644900")
WORDS = ("goldfish, Carassius auratus", "European fire salamander", "frog", "frog, tailed frog")


def make_tiny_imagenet(root, train=6, val=2, side=64):
    """Grey images whose brightness is the class; the last one is a greyscale JPEG."""
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(IDS) + "\n")
    rows = [*zip(IDS, WORDS, strict=True), ("n99999999", "not among the 200")]
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in rows))
    table = []
    (root / "val" / "images").mkdir(parents=True)
    for k, wnid in enumerate(IDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes\n")
        names = [folder / f"{wnid}_{n}.JPEG" for n in range(train)]
        for n in range(val):
            names.append(root / "val" / "images" / f"val_{n * len(IDS) + k}.JPEG")
            table.append(f"{names[-1].name}\t{wnid}\t0\t0\t62\t62\n")
        for name in names:
            mode = "L" if name == names[-1] else "RGB"
            Image.new(mode, (side, side), 60 * k if mode == "L" else (60 * k,) * 3).save(name)
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(table)))
    (root / "test" / "images").mkdir(parents=True)  # without labels: not read


@pytest.mark.parametrize("below", ["tiny-imagenet-200", ""])
def test_tiny_imagenet_as_its_archive_unpacks(below, tmp_path):
    root = tmp_path / "hier drin"
    make_tiny_imagenet(root / below)
    splits = load_data("tiny-imagenet", str(root), 64)
    assert [len(part) for part in splits] == [20, 4, 8]
    assert splits.test.classes == (
        "n01443537 goldfish", "n01629819 European fire salamander", "n01641577 frog",
        "n01644900 frog",
    )  # fmt: skip
    for part in splits:
        assert part.images.shape[1:] == (3, 64, 64)
        brightness = part.images.float().mean((1, 2, 3)) / 60
        assert torch.equal(brightness.round().long(), part.labels)
    assert load_data("tiny-imagenet", str(root), 16).test.images.shape[2:] == (16, 16)


def test_tiny_imagenet_is_unpacked_from_an_archive_put_there_by_hand(tmp_path, monkeypatch):
    make_tiny_imagenet(tmp_path / "made" / "tiny-imagenet-200")
    whole = load_data("tiny-imagenet", str(tmp_path / "made"))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "tiny-imagenet-200"
    shutil.make_archive(path, "zip", tmp_path / "made")
    publish("tiny-imagenet", path.with_suffix(".zip"), monkeypatch)
    assert load_data("tiny-imagenet", str(tmp_path / "data")).test.digest() == whole.test.digest()
    assert (path / "wnids.txt").exists()


def test_tiny_imagenet_that_is_not_whole(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    table = root / "val" / "val_annotations.txt"
    whole = table.read_text()
    table.write_text(whole.replace(IDS[0], "n00000000"))
    refused(
        "'n00000000' of 'val_0.JPEG' is not a class of wnids.txt",
        dataset="tiny-imagenet",
        root=tmp_path,
    )
    table.write_text("")
    refused("no images", str(root / "val"), dataset="tiny-imagenet", root=tmp_path)
    table.write_text(whole)
    broken = root / "train" / IDS[1] / "images" / f"{IDS[1]}_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    refused(f"cannot read {broken}", "remove it", dataset="tiny-imagenet", root=tmp_path)
    broken.unlink()
    assert len(load_data("tiny-imagenet", str(tmp_path)).train) == 19
    (root / "wnids.txt").write_text("n01443537\nn01641577\n")
    refused("'n01629819' of", "not a class", dataset="tiny-imagenet", root=tmp_path)


def add(name, text):
    def change(root):
        with (root / name).open("ab") as file:
            file.write(text)

    return change


def pipe(name):
    def change(root):
        (root / name).unlink()
        os.mkfifo(root / name)

    return change


def link(name, target):
    def change(root):
        (root / name).rename(root / "before") if (root / name).exists() else None
        (root / name).symlink_to(root / target)

    return change


TABLE = "val/val_annotations.txt"
FAULTS = {
    "a name twice": (add(TABLE, b"val_0.JPEG\tn01629819\n"), f"{TABLE}: 'val_0.JPEG' is not"),
    "no such file": (add(TABLE, b"x.JPEG\tn01629819\n"), f"{TABLE}: 'x.JPEG' is not in images/"),
    "a path": (
        add(TABLE, b"../../train/n01443537/images/n01443537_0.JPEG\tn01629819\n"),
        f"{TABLE}: '../../train/n01443537/images/n01443537_0.JPEG' is not in images/",
    ),
    "a pipe": (pipe("val/images/val_0.JPEG"), f"{TABLE}: 'val_0.JPEG' is not in images/"),
    "no tab": (add(TABLE, b"val_0.JPEG n01629819\n"), "'' of 'val_0.JPEG n01629819' is not"),
    "not UTF-8": (add("words.txt", b"\xff"), "words.txt: 'utf-8' codec can't decode"),
    "no such class": (add("wnids.txt", b"n9\n"), "train: no folder of 'n9'"),
    "a path of a class": (add("wnids.txt", b"../val\n"), "train: no folder of '../val'"),
    "without end": (link("words.txt", "/dev/zero"), "words.txt: not a regular file"),
    "a class twice": (
        link("train/n01443537/images", "train/n01629819/images"),
        "train/n01629819/images is reached twice",
    ),
    "training images as test": (
        link("val/images", "train/n01629819/images"),
        "val/images is reached twice",
    ),
    "a training image as test": (
        link("val/images/x.JPEG", "train/n01443537/images/n01443537_0.JPEG"),
        "val/images/x.JPEG is reached twice",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_tiny_imagenet_is_named(fault, tmp_path):
    change, cause = FAULTS[fault]
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    change(root)
    refused(cause, dataset="tiny-imagenet", root=tmp_path)


def test_many_classes_of_tiny_imagenet_take_no_time(tmp_path):
    """Quadratic in their number, 60,000 would take a minute."""
    make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    add("wnids.txt", "\n".join(f"x{k}" for k in range(60_000)).encode())(
        tmp_path / "tiny-imagenet-200"
    )
    start = time.process_time()
    refused("no folder of 'x0'", dataset="tiny-imagenet", root=tmp_path)
    assert time.process_time() - start < 5


def test_tiny_imagenet_has_one_order_of_classes_whoever_reads_it(tmp_path):
    """Sorted ids, whatever the order of wnids.txt: a network of one is a network of the other."""
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    (root / "wnids.txt").write_text("\n".join(reversed(IDS)) + "\n")
    tiny = load_data("tiny-imagenet", str(tmp_path)).train
    (root / "test").rename(root / "unlabelled")
    for wnid in IDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").unlink()
        (root / "test" / wnid).mkdir(parents=True)
        (root / "train" / wnid / "images" / f"{wnid}_0.JPEG").rename(
            root / "test" / wnid / "0.JPEG"
        )
    folder = load_data("folder", str(root)).train
    for data in (tiny, folder):
        brightness = data.images.float().mean((1, 2, 3)) / 60
        assert torch.equal(brightness.round().long(), data.labels)
    network = Network(torch.nn.Identity(), "convnet", classes=tiny.classes)
    assert folder.classes == IDS != tiny.classes
    assert check_class_names(network, folder, "net.pt", "by-name").notes == ()


def test_what_tiny_imagenet_leaves_out_is_said(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    (root / "train" / "n00000000").mkdir()
    (root / "train" / IDS[0] / "images" / ".DS_Store").write_text("")
    (note,) = [n for n in load_data("tiny-imagenet", str(tmp_path)).train.notes if "skipped" in n]
    assert "skipped 2 names (hidden" in note
    assert "n00000000" in note and f"{IDS[0]}/images/.DS_Store" in note


def test_validation_images_that_tiny_imagenet_does_not_list_are_said(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    before = load_data("tiny-imagenet", str(tmp_path)).test
    Image.new("RGB", (64, 64), "red").save(root / "val" / "images" / "unlisted.JPEG")
    after = load_data("tiny-imagenet", str(tmp_path)).test
    assert after.digest() == before.digest()
    assert "skipped 1 names" in after.notes[-1] and "images/unlisted.JPEG" in after.notes[-1]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("dataset", ["digits", "svhn", "tiny-imagenet"])
def test_a_set_that_is_read_alone_is_the_same(dataset, name, tmp_path, monkeypatch):
    if dataset == "svhn":
        make_svhn(tmp_path, monkeypatch)
    if dataset == "tiny-imagenet":
        make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    whole = getattr(load_data(dataset, str(tmp_path)), name)
    alone = load_split(dataset, str(tmp_path), Form(), name)
    assert alone.digest() == whole.digest() and alone.notes == whole.notes


def test_a_folder_in_another_size(tmp_path):
    root = make_folder(tmp_path / "images") or tmp_path / "images"
    assert load_data("folder", str(root)).train.images.shape[2:] == (32, 32)
    assert load_data("folder", str(root), 20).test.images.shape[2:] == (20, 20)


def test_every_fault_of_the_data_has_a_way_out(tmp_path):
    """Also those of the images as a set, which know no files."""
    root = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(root)
    (root / "wnids.txt").write_text(f"{IDS[0]}\n")
    (root / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{IDS[0]}\n")
    refused("two classes or more", "tiny-imagenet-200/", dataset="tiny-imagenet", root=tmp_path)


# --- Pipes, whose reading would wait for ever ---


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python/meta"),
        ("svhn", "test_32x32.mat"),
        ("tiny-imagenet", "wnids.txt"),
        ("tiny-imagenet", "tiny-imagenet-200/words.txt"),
    ],
)
def test_a_pipe_among_the_files_of_an_archive_is_refused(dataset, name, tmp_path):
    pipe = tmp_path / name
    pipe.parent.mkdir(exist_ok=True)
    (pipe.parent / "wnids.txt").write_text("a\nb\n")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    refused(f"{pipe}: ", "not a regular file", dataset=dataset, root=tmp_path)


# --- Links, through which a download would write ---


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("svhn", "train_32x32.mat"),
        ("svhn", "test_32x32.mat"),
        ("tiny-imagenet", "tiny-imagenet-200.zip"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_no_download_writes_through_a_link(dataset, name, exists, tmp_path, monkeypatch):
    data, victim = tmp_path / "data", tmp_path / "victim"
    data.mkdir()
    if "/" in name:
        make_cifar(data, dataset, monkeypatch)  # an archive that is whole, to be unpacked
    if exists:
        victim.write_text("mine")
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).symlink_to(victim)
    refused(f"{data / name}: a link", "remove it", dataset=dataset, root=data)
    assert victim.exists() == exists and (not exists or victim.read_text() == "mine")


def test_no_archive_is_unpacked_through_a_link(tmp_path, monkeypatch):
    make_cifar(tmp_path / "data", "cifar10", monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "cifar-10-batches-py").symlink_to(tmp_path / "elsewhere")
    refused("cifar-10-batches-py: a link", dataset="cifar10", root=tmp_path / "data")
    assert not [*(tmp_path / "elsewhere").iterdir()]


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py", ""])
def test_links_to_whole_archives_and_folders_are_read(name, tmp_path, monkeypatch):
    """Also a link to the whole folder of data, the empty name here."""
    make_cifar(tmp_path / "elsewhere", "cifar10", monkeypatch)
    if name == "cifar-10-batches-py":
        load_data("cifar10", str(tmp_path / "elsewhere"))  # unpacks it
    if name:
        (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(load_data("cifar10", str(tmp_path / "data")).test) == 40
