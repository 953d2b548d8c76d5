"""Folders of images as people have them: odd, broken, or meant to break."""

import resource
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers.image_files import make_folder
from helpers.processes import processes
from helpers.program import QUICK, main
from helpers.program import refused as refused_by_the_program
from PIL import Image

from absld.data.sources import load_data
from absld.errors import DataError


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "Bilder hier")


def count(root):
    return [len(part) for part in load_data("folder", str(root))]


def refused(root, cause):
    with pytest.raises(DataError) as caught:
        load_data("folder", str(root))
    assert cause in str(caught.value) and caught.value.hint


# --- Where files lie ---


def test_folders_within_a_class_belong_to_it(root):
    before = sum(count(root))
    (root / "train" / "cat" / "2024" / "more").mkdir(parents=True)
    for path in sorted((root / "train" / "cat").glob("*.png"))[:3]:
        path.rename(root / "train" / "cat" / "2024" / "more" / path.name)
    assert sum(count(root)) == before


def test_links_are_followed(root, tmp_path):
    """People keep their images elsewhere; what a link leads to is what they mean."""
    before = sum(count(root))
    elsewhere = tmp_path / "elsewhere"
    (root / "train" / "cat").rename(elsewhere)
    (root / "train" / "cat").symlink_to(elsewhere)
    (root / "test" / "cat" / "linked.png").symlink_to(next(elsewhere.iterdir()))
    assert sum(count(root)) == before + 1


@pytest.mark.parametrize("back", ["train/cat/again -> train/cat", "train/cat/up -> ."])
def test_a_circle_of_links_is_refused(back, root):
    link, target = back.split(" -> ")
    (root / link).symlink_to(root / target, target_is_directory=True)
    refused(root, "a link to a folder that holds it")


def test_two_links_that_lead_to_each_other_are_refused(root):
    (root / "train" / "cat" / "a").symlink_to(root / "train" / "dog")
    (root / "train" / "dog" / "b").symlink_to(root / "train" / "cat")
    refused(root, "a link to a folder that holds it")


def test_a_link_to_nowhere_is_passed_over_as_no_file(root):
    before = sum(count(root))
    (root / "train" / "cat" / "gone.png").symlink_to(root / "gone")
    assert sum(count(root)) == before


# --- What is in them ---


def one_class_more(root, name, save):
    """The image of `save` as the only kind of a new class."""
    for part, copies in (("train", 8), ("test", 2)):
        (root / part / name).mkdir()
        for number in range(copies):
            save(root / part / name / f"das Bild {number} é.bin")


def of_class(root, name):
    test = load_data("folder", str(root)).test
    return test.images[test.labels == test.classes.index(name)].float().mean((0, 2, 3))


ODD = {
    "CMYK": (Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    "grey": (Image.new("L", (40, 40), 100), "PNG", (100, 100, 100)),
    "one bit": (Image.new("1", (40, 40), 1), "PNG", (255, 255, 255)),
    "palette": (Image.new("P", (40, 40), 0), "PNG", (0, 0, 0)),
    "alpha": (Image.new("RGBA", (40, 40), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
    "16 bit": (Image.new("I;16", (40, 40), 40_000), "PNG", (255, 255, 255)),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_pixel_becomes_rgb(kind, root):
    """16 bits saturate, as Pillow converts them: said in the docs."""
    image, form, expected = ODD[kind]
    one_class_more(root, "odd", lambda path: image.save(path, form))
    torch.testing.assert_close(of_class(root, "odd"), torch.tensor(expected).float())


def test_of_an_animation_the_first_picture_counts(root):
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    one_class_more(
        root, "odd", lambda path: red.save(path, "GIF", save_all=True, append_images=[blue])
    )
    torch.testing.assert_close(of_class(root, "odd"), torch.tensor([255.0, 0, 0]))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge(side=50_000):
    """The header of a PNG that would take 7.5 GB."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def train_on(root, said):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_data("folder", str(root))
    except DataError as error:
        said.append(str(error))
    said.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def test_an_image_of_a_huge_size_is_refused_before_it_takes_memory(root):
    bad = root / "train" / "cat" / "huge.png"
    bad.write_bytes(huge())
    with processes.Manager() as manager:
        said = manager.list()
        child = processes.Process(target=train_on, args=(root, said))
        child.start()
        child.join(60)
        cause, grown = said
    assert cause.startswith(f"cannot read {bad}: ") and "decompression bomb" in cause
    assert grown < 300, f"{grown} MiB"


@pytest.mark.parametrize("content", [huge(), huge()[:30], b"", b"text", b"GIF89a" + bytes(10)])
def test_the_program_names_the_file(content, root, capfd, monkeypatch):
    monkeypatch.chdir(root.parent)
    bad = root / "test" / "dog" / "das hier é.png"
    bad.write_bytes(content)
    flags = ["train", *QUICK, "--dataset", "folder", "--data", root, "--student", "convnet"]
    refused_by_the_program(capfd, 3, f"cannot read {bad}", "remove it", *flags)


def test_the_program_trains_on_an_odd_folder(root, capfd, monkeypatch):
    monkeypatch.chdir(root.parent)
    one_class_more(root, "日本 x", lambda path: ODD["CMYK"][0].save(path, "TIFF"))
    flags = ["--dataset", "folder", "--data", root, "--student", "convnet"]
    flags += ["--teacher-model", "convnet", "--batch-size", "8"]
    assert main("train", *QUICK, *flags) == 0, capfd.readouterr().err
    assert "日本 x" in capfd.readouterr().out


def test_what_is_in_a_folder_is_read_once(root, monkeypatch):
    """At the start: steps work on tensors."""
    splits = load_data("folder", str(root))
    monkeypatch.setattr(Path, "open", None)
    assert all(part.images.dtype == torch.uint8 for part in splits)
