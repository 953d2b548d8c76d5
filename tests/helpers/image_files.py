"""Images that tests make: folders, archives of CIFAR's format, and pixels that tell their place."""

import hashlib
import pickle
import tarfile

import numpy as np
import torch
from PIL import Image

from absld.data.archives import ARCHIVES


def make_folder(root, classes=("cat", "dog"), train=12, test=4, side=10, suffix="png"):
    """Write DIR/{train,test}/CLASS/NN.png; the first channel holds 200 * the class, modulo 256."""
    for part, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((side, side, 3), 8 * i, np.uint8)
                pixels[:, :, 0] = 200 * k % 256
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.{suffix}")
    return root


def make_cifar(root, dataset, monkeypatch, train=4, test=4):
    """Write CIFAR's archive into `root`, set the checksums to it, return the class names.

    Batches are pickled dicts of rows of 3072 bytes: noise, but the first red pixel is the label and
    the first green one tells the batch. train, test: images of each class in each batch.
    """
    from torchvision import datasets

    family = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    ten = dataset == "cifar10"
    classes = 10 if ten else 100
    parts = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    parts += ["test_batch" if ten else "test"]
    folder = root / family.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    sums = []
    for n, name in enumerate(parts):
        labels = np.repeat(np.arange(classes), test if n == len(parts) - 1 else train).tolist()
        rows = np.random.default_rng(n).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        rows[:, 0], rows[:, 1024] = labels, n
        key = "labels" if ten else "fine_labels"
        sums.append([name, write(name, {"data": rows, key: labels})])
    names = [f"class {k}" for k in range(classes)]
    md5 = write(family.meta["filename"], {family.meta["key"]: names})
    archive = root / family.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, family.base_folder)
    for part in folder.iterdir():
        part.unlink()
    folder.rmdir()
    monkeypatch.setattr(family, "train_list", sums[:-1])
    monkeypatch.setattr(family, "test_list", sums[-1:])
    monkeypatch.setattr(family, "meta", family.meta | {"md5": md5})
    monkeypatch.setattr(family, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    publish(dataset, archive, monkeypatch)
    return names


def publish(key, path, monkeypatch, *urls):
    """Let a file made here be the published archive `key`, at these URLs."""
    content = path.read_bytes()
    sums = (hashlib.new(name, content).hexdigest() for name in ("md5", "sha256"))
    archive = ARCHIVES[key]._replace(name=path.name, size=len(content), urls=urls)
    monkeypatch.setitem(
        ARCHIVES, key, archive._replace(**dict(zip(("md5", "sha256"), sums, strict=True)))
    )


def numbered(n, side=8):
    """Return images whose three channels tell their number, row and column."""
    rows = torch.arange(1, side + 1).view(1, side, 1).expand(n, side, side)
    number = torch.arange(1, n + 1).view(n, 1, 1).expand(n, side, side)
    return torch.stack([number, rows, rows.mT], dim=1).to(torch.uint8)
