"""Corrupted images in the layout of CIFAR-10-C: reading, and evaluation by corruption."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers.program import few_digits, main, refused

from absld.data.corrupted import CLASSES, list_corruptions, load_corrupted
from absld.errors import DataError
from absld.models.architectures import build_model
from absld.storage.checkpoint import save


def make_corrupted(root, *names, count=20, classes=10, side=8):
    """Images whose first channel tells the severity; labels go round."""
    root.mkdir(parents=True)
    np.save(root / "labels.npy", np.arange(5 * count) % classes)
    for k, name in enumerate(names):
        images = np.zeros((5 * count, side, side, 3), np.uint8)
        images[..., 0] = np.repeat(np.arange(1, 6), count)[:, None, None]
        images[..., 1], images[:, 0, 1, 2] = k, 1  # which corruption, and where columns are
        np.save(root / f"{name}.npy", images)
    return root


@pytest.mark.parametrize("inner", ["CIFAR-10-C", "."])
def test_severities_are_parts_in_order(inner, tmp_path):
    make_corrupted(tmp_path / inner / "x", "fog", "snow").rename(tmp_path / "files")
    (tmp_path / inner).rmdir() if inner != "." else None
    (tmp_path / "files").rename(tmp_path / "data" if inner == "." else tmp_path / inner)
    root = str(tmp_path / "data" if inner == "." else tmp_path)
    every = load_corrupted("cifar10-c", root, "snow", None)
    assert every.images.shape == (100, 3, 8, 8) and every.classes == CLASSES["cifar10-c"]
    assert (every.images[:, 1] == 1).all() and every.images[:, 2, 0, 1].all()
    for severity in range(1, 6):
        part = load_corrupted("cifar10-c", root, "snow", severity)
        assert (part.images[:, 0] == severity).all()
        assert torch.equal(part.labels, every.labels[20 * severity - 20 : 20 * severity])


def test_the_corruptions_of_published_means_are_taken_unless_others_are_named(tmp_path):
    root = str(make_corrupted(tmp_path / "C", "fog", "spatter", "contrast"))
    assert list_corruptions("cifar10-c", root, "") == ["contrast", "fog"]
    assert list_corruptions("cifar10-c", root, "spatter, fog") == ["spatter", "fog"]
    with pytest.raises(DataError, match="no corruption 'mist'"):
        list_corruptions("cifar10-c", root, "fog,mist")
    with pytest.raises(DataError, match=r"no labels\.npy"):
        list_corruptions("cifar10-c", str(tmp_path), "")


def test_classes_without_names_are_numbers(tmp_path):
    root = str(make_corrupted(tmp_path / "C", "fog", classes=4))
    data = load_corrupted("corrupted", root, "fog", 1)
    assert data.classes == ("0", "1", "2", "3") and data.notes == ("labels.npy names 4 classes",)
    assert len(load_corrupted("cifar100-c", root, "fog", 1).classes) == 100


@pytest.mark.filterwarnings("error")
def test_grey_images_are_a_copy_of_their_file(tmp_path):
    root = make_corrupted(tmp_path / "C", "fog")
    np.save(root / "fog.npy", np.load(root / "fog.npy")[..., :1])
    images = load_corrupted("cifar10-c", str(root), "fog", 2).images
    assert images.shape == (20, 1, 8, 8) and (images.add_(1) == 3).all()


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def save_archive(path):
    with path.open("wb") as file:
        np.savez(file, x=1)


FAULTS = {
    "pickles": (lambda p: np.save(p, np.array([Evil()]), allow_pickle=True), "Python objects"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Evil())), "magic string is not correct"),
    "an archive": (save_archive, "magic string is not correct"),
    "floats": (lambda p: np.save(p, np.zeros((100, 8, 8, 3))), "float64 of shape"),
    "too few": (lambda p: np.save(p, np.zeros((90, 8, 8, 3), np.uint8)), "(90, 8, 8, 3)"),
    "four channels": (lambda p: np.save(p, np.zeros((100, 8, 8, 4), np.uint8)), "(100, 8, 8, 4)"),
    "no image": (lambda p: np.save(p, np.zeros(100, np.uint8)), "uint8 of shape (100,)"),
    "a claim": (
        lambda p: p.write_bytes(p.read_bytes()[:128].replace(b"(100,", b"(9" + b"9" * 9 + b",")),
        "fog.npy: ",
    ),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "fog.npy: "),
    "nothing": (lambda p: p.write_bytes(b""), "fog.npy: "),
    "a pipe": (lambda p: p.unlink() or os.mkfifo(p), "not a regular file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_an_array_of_images_is_refused(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_corrupted(tmp_path / "C", "fog")
    change, cause = FAULTS[fault]
    change(root / "fog.npy")
    with pytest.raises(DataError) as caught:
        load_corrupted("cifar10-c", str(root), "fog", None)
    assert cause in str(caught.value) and caught.value.hint
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("labels", [np.zeros((100, 2), int), np.zeros(100), np.arange(99) % 10])
def test_labels_that_are_not_numbers_in_five_parts_are_refused(labels, tmp_path):
    root = make_corrupted(tmp_path / "C", "fog")
    np.save(root / "labels.npy", labels)
    np.save(root / "fog.npy", np.zeros((len(labels), 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"labels\.npy"):
        load_corrupted("cifar10-c", str(root), "fog", None)


@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"model": build_model("convnet", 10, "net").state_dict()}, tmp_path / "net.pt")
    data = few_digits().test
    root = tmp_path / "C"
    root.mkdir()
    np.save(root / "labels.npy", data.labels.repeat(5).numpy())
    for name, gain in (("fog", 0.5), ("noise", 0.1), ("speckle_noise", 0.2)):
        parts = [data.images * (1 - gain * k / 5) for k in range(1, 6)]
        np.save(root / f"{name}.npy", torch.cat(parts).byte().permute(0, 2, 3, 1).numpy())
    return ["evaluate", "net.pt", "--dataset", "corrupted", "--data", root, "--device", "cpu"]


def test_a_network_is_evaluated_on_every_corruption_and_their_mean(network, capfd):
    assert main(*network, "--json") == 0
    results = json.loads(capfd.readouterr().out)
    rows = results["corruptions"]
    assert [row["corruption"] for row in rows] == ["fog", "noise"]
    averages = [row["metrics"]["average"]["value"] for row in rows]
    assert results["mean"]["average"] == pytest.approx(sum(averages) / 2)
    for k, of_class in enumerate(results["mean"]["classes"]):
        of_each = [row["classes"][k]["value"] for row in rows]
        expected = None if None in of_each else sum(of_each) / 2  # None: a class without images
        assert of_class["value"] == pytest.approx(expected)
    for row in rows:
        with open(row["file"]) as file:
            alone = json.load(file)
        assert alone["robust"]["metrics"] == row["metrics"] and alone["checks"] is None
        assert alone["data"]["dataset"] == f"corrupted {row['corruption']}"
        assert [attack["name"] for attack in alone["attacks"]] == ["clean"]
    assert main(*network) == 0
    printed = capfd.readouterr().out
    assert "\nfog  " in printed and "\nmean over corruptions" in printed


def test_one_corruption_is_an_evaluation_like_any_other(network, capfd):
    flags = ["--corruption", "fog", "--severity", "3", "--attacks", "fgsm", "--json"]
    assert main(*network, *flags) == 0
    results = json.loads(capfd.readouterr().out)
    assert results["schema"] == "absld-evaluation-1"
    assert results["data"]["dataset"] == "corrupted fog severity 3"
    assert results["data"]["of"] == len(few_digits().test)
    assert [attack["name"] for attack in results["attacks"]] == ["clean", "fgsm"]


@pytest.mark.parametrize(
    ("cause", "hint", "flags"),
    [
        ("has test images only", "only", ["--split", "validation"]),
        ("severity must be in [1, 5]", "--help", ["--severity", "6"]),
        ("one corruption at a time, not 2", "--corruption fog", ["--against", "net.pt"]),
        ("--strict needs the checks", "--checks", ["--strict"]),
        ("are for corrupted images", "cifar10-c", ["--dataset", "digits", "--severity", "1"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused(cause, hint, flags, network, capfd):
    refused(capfd, 2, cause, hint, *network, *flags)


@pytest.mark.parametrize("command", [["train"], ["compare", "--methods", "rslad,absld"]])
def test_nothing_is_trained_on_corrupted_images(command, capfd):
    refused(
        capfd, 2, "for evaluation, not for training", "only", *command, "--dataset", "cifar10-c"
    )
