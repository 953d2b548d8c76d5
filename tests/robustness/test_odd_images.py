"""Folders of images as people have them: odd, broken, or meant to break."""

import os
import re
import resource
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from helpers.image_files import make_folder
from helpers.processes import processes
from helpers.program import QUICK, main
from helpers.program import refused as refused_by_the_program
from PIL import Image

import absld
from absld.data.image_files import open_image
from absld.data.sources import load_data
from absld.errors import DataError
from absld.models.architectures import build_model
from absld.storage.checkpoint import save


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
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    (root / "test" / "cat" / "linked.png").symlink_to(tmp_path / "x.png")
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


def test_a_folder_that_is_linked_twice_is_refused(root):
    """Forty such folders in a row would hold 2^40 images."""
    for name in ("a", "b"):
        (root / "train" / "cat" / name).symlink_to(root / "test" / "cat")
    refused(root, "is reached twice")


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("test", "train"),
        ("test/dog", "train/dog"),
        ("test/dog/all", "train/dog"),
        ("test/dog/more", "test"),
        ("test/dog/x.png", "train/dog/00.png"),
        ("train/dog/x.png", "train/dog/00.png"),
        ("train/dog/x.png", "train/cat/00.png"),
        ("train/dog/x.png", "test/dog/y.png"),
    ],
)
def test_no_image_counts_twice_by_a_link(link, target, root, tmp_path):
    """In its class, in another class or in another part; y.png is a link to elsewhere."""
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    (root / "test" / "dog" / "y.png").symlink_to(tmp_path / "x.png")
    if (root / link).is_dir():
        shutil.rmtree(root / link)
    (root / link).symlink_to(root / target)
    refused(root, "is reached twice")


def hidden_folder(folder):
    (folder / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
    for path in (folder / ".ipynb_checkpoints", folder / ".ipynb_checkpoints" / "deep"):
        Image.new("RGB", (4, 4)).save(path / "copy.png")


SKIPPED = {
    "a hidden folder": hidden_folder,
    "a hidden file": lambda folder: (folder / ".DS_Store").write_bytes(b"Bud1"),
    "a copy of macOS": lambda folder: (folder / "._00.png").write_bytes(b"Mac OS X"),
    "a link to nowhere": lambda folder: (folder / "gone.png").symlink_to("nowhere"),
    "a link to itself": lambda folder: (folder / "self.png").symlink_to("self.png"),
    "a link through a file": lambda folder: (folder / "x.png").symlink_to(f"{__file__}/x"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe.png"),
}


@pytest.mark.parametrize("where", ["train", "train/cat", "test/dog"])
@pytest.mark.parametrize("kind", SKIPPED)
def test_what_is_neither_class_nor_image_is_skipped_and_said(kind, where, root):
    before = load_data("folder", str(root))
    SKIPPED[kind](root / where)
    after = load_data("folder", str(root))
    assert [part.digest() for part in after] == [part.digest() for part in before]
    (said,) = [line for line in after.describe() if "skipped" in line]
    (name,) = {*os.listdir(root / where)} - {"cat", "dog", *(f"{i:02}.png" for i in range(12))}
    path = os.path.join(where, name).split("/", 1)[1]
    assert said.startswith(f"{where.split('/')[0]}: skipped 1 ") and path in said


def test_a_file_beside_the_classes_is_skipped_and_said(root):
    (root / "train" / "README\x1b[2J.txt").write_text("")
    said = load_data("folder", str(root)).describe()
    assert any("skipped 1 " in line and r"README\x1b[2J.txt" in line for line in said)
    assert len(load_data("folder", str(root)).train.classes) == 2


# --- Names of classes ---


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_class_whose_name_is_not_utf_8_is_refused_at_once(
    command, part, root, capfd, monkeypatch
):
    monkeypatch.chdir(root.parent)
    for each in ("train", "test") if command == "train" else ("test",):
        os.rename(root / each / "dog", os.fsencode(root / each) + b"/caf\xe9 \x1b")
    if command == "train":
        flags = ["train", *QUICK, "--student", "convnet"]
    else:
        save({"model": build_model("convnet", 2, "n").state_dict()}, Path("n.pt"))
        flags = ["evaluate", "n.pt"]
    shown = r"caf\udce9 \x1b: this name is not UTF-8"
    refused_by_the_program(capfd, 3, shown, "rename", *flags, "--dataset", "folder", "--data", root)


def test_a_folder_whose_name_is_not_utf_8_is_refused_at_once(root):
    other = os.fsdecode(os.fsencode(root.parent) + b"/caf\xe9")
    root.rename(other)
    refused(other, r"caf\udce9: this name is not UTF-8")


def test_a_file_whose_name_is_not_utf_8_is_read_and_named(root):
    path = os.fsencode(root / "train" / "cat") + b"/caf\xe9.png"
    before = sum(count(root))
    shutil.copy(root / "train" / "cat" / "00.png", path)
    assert sum(count(root)) == before + 1
    Path(os.fsdecode(path)).write_text("no image")
    refused(root, r"caf\udce9.png")


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
    "grey and alpha": (Image.new("LA", (40, 40), (70, 0)), "PNG", (70, 70, 70)),
    "16 bit": (Image.new("I;16", (40, 40), 40_000), "PNG", (156, 156, 156)),
    "16 bit TIFF": (Image.new("I;16", (40, 40), 257 * 100), "TIFF", (100, 100, 100)),
    "16 bit PGM": (Image.new("I;16", (40, 40), 257 * 100), "PPM", (100, 100, 100)),
    "float": (Image.new("F", (40, 40), 0.2), "TIFF", (51, 51, 51)),
    "float PFM": (Image.new("F", (40, 40), 1.0), "PPM", (255, 255, 255)),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_pixel_becomes_rgb(kind, root):
    """By the range of their type, where they have more than 8 bits."""
    image, form, expected = ODD[kind]
    one_class_more(root, "odd", lambda path: image.save(path, form))
    torch.testing.assert_close(of_class(root, "odd"), torch.tensor(expected).float())


def tiff(bits, white, data):
    """A grey TIFF of 2x2 pixels, of which `white` says whether 0 is white (0) or black (1)."""
    tags = [(256, 3, 2), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, white), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, 2), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "white", "data"),
    [
        (12, 1, b"\x00\x0f\xff\xff\xf0\x00"),
        (16, 1, b"\0\0\xff\xff\xff\xff\0\0"),
        (16, 0, b"\xff\xff\0\0\0\0\xff\xff"),
        (8, 0, b"\xff\0\0\xff"),
    ],
)
def test_a_tiff_has_the_range_of_its_bits_and_its_own_white(bits, white, data, tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(bits, white, data))
    image, traits = open_image(str(tmp_path / "x.tif"))
    assert image.getchannel(1).tobytes() == b"\x00\xff\xff\x00"
    assert ("of more than 8 bits (I;16), scaled to 8" in traits) == (bits > 8)


@pytest.mark.parametrize(
    ("mode", "value", "cause"),
    [
        ("I", 70_000, "mode I, integers of 32 bits"),
        ("I", -1, "mode I, integers of 32 bits"),
        ("F", 1.5, "mode F with 1.5..1.5, not 0..1"),
        ("F", -0.1, "mode F with -0.1..-0.1"),
        ("F", float("nan"), "mode F with nan..nan"),
    ],
)
def test_values_without_a_range_are_refused_by_their_mode(mode, value, cause, root):
    Image.new(mode, (9, 9), value).save(root / "test" / "cat" / "x.png", "TIFF")
    refused(root, f"x.png: {cause}")


def test_a_turned_tiff_keeps_the_range_of_its_type(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("I", (9, 9), 70).save(root / "test" / "cat" / "x.tif", exif=exif)
    refused(root, "x.tif: mode I, integers of 32 bits")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(form, orientation, tmp_path):
    """Red is up and left in what a viewer shows; in the file it is where the camera had it."""
    stored = {
        1: (0, 0),
        2: (1, 0),
        3: (1, 1),
        4: (0, 1),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    right, down = stored[orientation]
    picture = Image.new("RGB", (32, 48) if orientation < 5 else (48, 32))
    width, height = picture.width // 2, picture.height // 2
    picture.paste("red", (right * width, down * height, (right + 1) * width, (down + 1) * height))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x", form, exif=exif)
    image, traits = open_image(str(tmp_path / "x"))
    assert image.size == (32, 48)
    assert image.getpixel((4, 4))[0] > 200 and image.getpixel((28, 44))[0] < 50
    assert ("turned upright, as EXIF says" in traits) == (orientation != 1)


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_means_nothing_turns_nothing(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.jpg", exif=exif)
    image, traits = open_image(str(tmp_path / "x.jpg"))
    assert image.size == (4, 6) and not traits


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_a_picture_with_damaged_exif_is_read_as_it_is(exif, tmp_path):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.jpg", exif=exif)
    image, traits = open_image(str(tmp_path / "x.jpg"))
    assert image.size == (4, 6) and not traits


def test_what_reading_changes_is_said(root):
    for k, size in enumerate([(60, 80), (300, 200)]):
        Image.new("L", size, 100 * k).save(root / "test" / "cat" / f"L{k}.png")
    one_class_more(root, "odd", lambda path: ODD["alpha"][0].save(path, "PNG"))
    train, test = load_data("folder", str(root)).describe()[-2:]
    assert train == (
        "train: 32 files, images from 10x10 to 40x40, resized to 32x32; 8 RGBA, read as RGB; "
        "8 whose transparency is dropped; 32 of one constant colour"
    )
    assert test == (
        "test: 12 files, images from 10x10 to 200x300, resized to 32x32 whatever their aspect ratio; "
        "2 grey, read as RGB; 2 RGBA, read as RGB; 2 whose transparency is dropped; "
        "12 of one constant colour"
    )


def test_images_of_the_right_size_are_not_said_to_be_resized(root):
    assert load_data("folder", str(root), 10).train.notes == (
        "train: 24 files, images of 10x10; 24 of one constant colour",
    )


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_set_of_one_constant_colour_is_refused(part, root):
    for path in (root / part).glob("*/*.png"):
        Image.new("RGB", (10, 10), "white").save(path)
    refused(root, f"{part}: all ")


def test_of_an_animation_the_first_picture_counts(root):
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    one_class_more(
        root, "odd", lambda path: red.save(path, "GIF", save_all=True, append_images=[blue])
    )
    torch.testing.assert_close(of_class(root, "odd"), torch.tensor([255.0, 0, 0]))
    said = load_data("folder", str(root)).test.notes
    assert "2 of several frames, of which the first is read" in said[0]


# --- Files that are not images, or that may run something ---


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
(ran) (w) file closefile
showpage
"""
FOREIGN = {
    "EPS": POSTSCRIPT,
    "EPS behind a binary header": struct.pack("<7I2x", 0xC6D3D0C5, 30, 200, 0, 0, 0, 0)
    + POSTSCRIPT,
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "PSD": b"8BPS\0\1" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_formats_of_the_list_are_opened_whatever_the_suffix(kind, root, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, which runs it."""
    monkeypatch.chdir(root.parent)
    monkeypatch.setattr("subprocess.Popen", None)
    for name in ("cat.jpg", "cat.png", "cat"):
        (root / "train" / "cat" / name).write_bytes(FOREIGN[kind])
    refused(root, "cannot read 3 files: ")
    assert not Path("ran").exists()


@pytest.mark.parametrize("form", ["ICO", "TGA", "JPEG2000", "PCX", "DDS", "ICNS", "SGI"])
def test_images_of_other_formats_are_refused(form, root):
    Image.new("RGB", (32, 32), "red").save(root / "test" / "dog" / "x.png", form)
    refused(root, "x.png: cannot identify image file")


def test_nothing_but_open_image_opens_images():
    """PIL is known in one module, which has the list of formats."""
    package = Path(absld.__file__).parent
    opening = re.compile(
        r"Image\.open\(|default_loader|ImageFolder\(|imread|decode_image|read_image\("
    )
    found = [
        (p.name, line) for p in package.rglob("*.py") for line in opening.findall(p.read_text())
    ]
    assert found == [("image_files.py", "Image.open(")] * 2  # a path, and bytes


def test_all_that_is_no_image_is_named_at_once(root):
    """In training and test images: the first ten, and the number."""
    bad = [root / "train" / "cat" / f"{k:02}.txt" for k in range(6)]
    bad += [root / "test" / "dog" / f"{k:02}.txt" for k in range(6)]
    for path in bad:
        path.write_text("no image")
    with pytest.raises(DataError) as caught:
        load_data("folder", str(root))
    cause = str(caught.value)
    assert cause.startswith(
        f"cannot read 12 files: {bad[0]}: cannot identify image file; {bad[1]}: "
    )
    assert all(str(path) in cause for path in bad[:10]) and cause.endswith("; ...")
    assert not any(str(path) in cause for path in bad[10:])


# --- Size ---


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge(width=50_000, height=50_000):
    """The header of a PNG that would take 7.5 GB."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
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


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [
        (50_000, 50_000, "decompression bomb"),
        (8_193, 8_192, "8192x8193 pixels, more than 67,108,864 pixels"),
        (1, 65_537, "65537x1 pixels, more than 67,108,864 pixels, or 65,536 a side"),
    ],
)
def test_an_image_of_a_huge_size_is_refused_before_it_takes_memory(width, height, limit, root):
    bad = root / "train" / "cat" / "huge.png"
    bad.write_bytes(huge(width, height))
    with processes.Manager() as manager:
        said = manager.list()
        child = processes.Process(target=train_on, args=(root, said))
        child.start()
        child.join(60)
        cause, grown = said
    assert cause.startswith(f"cannot read {bad}: ") and limit in cause
    assert grown < 300, f"{grown} MiB"


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_scaling_to_8_bits_takes_no_more_memory_than_other_images(mode, tmp_path):
    Image.new(mode, (1000, 1000)).save(tmp_path / "x.tif")
    open_image(str(tmp_path / "x.tif"))
    tracemalloc.start()
    open_image(str(tmp_path / "x.tif"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 17e6, peak  # bytes, of a million pixels; Pillow's own are not counted


def test_an_image_that_needs_more_memory_than_there_is_is_named(root, monkeypatch):
    def resize(image, size):
        raise MemoryError

    monkeypatch.setattr("torchvision.transforms.v2.functional.resize", resize)
    refused(root, f"cannot read 32 files: {root}/train/cat/00.png: MemoryError; ")


@pytest.mark.parametrize(
    "content", [huge(), huge(8_193, 8_192), huge()[:30], b"", b"text", b"GIF89a" + bytes(10)]
)
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


def test_the_program_evaluates_a_folder_that_has_only_test(root, capfd, monkeypatch):
    monkeypatch.chdir(root.parent)
    shutil.rmtree(root / "train")
    save({"model": build_model("convnet", 2, "n").state_dict()}, Path("n.pt"))
    flags = ["--attacks", "fgsm", "--no-checks", "--device", "cpu"]
    assert main("evaluate", "n.pt", "--dataset", "folder", "--data", root, *flags) == 0
    assert "8 of 8 test images of folder" in capfd.readouterr().out


def test_what_is_in_a_folder_is_read_once(root, monkeypatch):
    """At the start: steps work on tensors."""
    splits = load_data("folder", str(root))
    monkeypatch.setattr(Path, "open", None)
    assert all(part.images.dtype == torch.uint8 for part in splits)
