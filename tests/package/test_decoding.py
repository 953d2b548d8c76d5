"""Any indexed source becomes an image set, and a set that does not fit in memory a mapped file."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers.image_files import make_folder
from helpers.processes import processes
from helpers.small_training import CONFIG, TRAIN, VALIDATION, train
from PIL import Image
from torchvision.transforms.v2 import functional

import absld
from absld.cli.output import Output
from absld.cli.signals import StopRequest
from absld.cli.view import LINE_EVERY, View
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import to_toml
from absld.config.resolve import resolve
from absld.data import placement
from absld.data.decoding import decode
from absld.data.mapped import MappedImages
from absld.data.placement import Placement
from absld.data.sources import load_data
from absld.errors import DataError
from absld.evaluation.targets import complete_config
from absld.progress import Observer
from absld.storage.files import digest
from absld.trainer import training_identity

CLASSES = ("cat", "dog", "eel")
MAPPED = Placement("no")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of caches for each test."""
    monkeypatch.setenv("ABSLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


class Items(list):
    """A dataset that counts how often it is read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def arrays(n=9, side=6, channels=3):
    random = np.random.default_rng(n)
    return random.integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def items(images=None):
    return Items((image, k % 3) for k, image in enumerate(arrays() if images is None else images))


def refused(source, cause, hint="", **settings):
    with pytest.raises(DataError) as caught:
        decode(source, CLASSES, **settings)
    assert cause in str(caught.value) and hint in caught.value.hint, caught.value
    return str(caught.value)


# --- One protocol, in memory or mapped ---


@pytest.mark.parametrize("index", [slice(2, 5), slice(None), torch.tensor([7, 0, 0, 3])])
def test_a_mapped_set_gives_what_the_set_in_memory_gives(index):
    held, mapped = (decode(items(), CLASSES, in_memory=where) for where in ("yes", "no"))
    assert isinstance(mapped, MappedImages) and isinstance(mapped, absld.ImageSet)
    order = torch.tensor([8, 1, 4, 5, 6, 2, 0, 3, 3])
    for a, b in ((held, mapped), (held.subset(order), mapped.subset(order).to("cpu"))):
        assert torch.equal(a.rows(index), b.rows(index))
        assert a.digest() == b.digest() == b.digest()  # computed, and then read
        assert a.class_counts() == b.class_counts() and torch.equal(a.labels, b.labels)
        assert (a.image_shape, a.dtype, len(a)) == (b.image_shape, b.dtype, len(b))
        for ours, theirs in zip(a.batches(4), b.batches(4), strict=True):
            assert all(map(torch.equal, ours, theirs))
        assert torch.equal(b.in_memory().images, a.images) and b.in_memory().notes == a.notes


def test_a_training_does_not_depend_on_where_its_images_are():
    data = TRAIN, VALIDATION
    mapped = [MAPPED.place(part) for part in data]
    assert all(isinstance(part, MappedImages) for part in mapped)
    students, identities = [], []
    for sets in (data, mapped):
        student, _ = train(CONFIG, data=sets)
        students.append(digest(student.state_dict()))
        identities.append(training_identity(student, None, *sets, CONFIG, "student"))
    assert students[0] == students[1] and identities[0] == identities[1]


def test_whether_images_are_in_memory_decides_nothing_of_a_run(
    few_digits_in_an_empty_folder, capfd
):
    from helpers.program import QUICK, digests, main, the_run

    found = []
    for where in ("yes", "no"):
        assert main("train", *QUICK, "--in-memory", where, "--out", where) == 0
        printed = capfd.readouterr().out
        assert ("mapped from" in printed) == (where == "no")
        found.append((digests(printed), the_run(out=where).name))
    assert found[0] == found[1]
    assert main("evaluate", the_run(out="no"), "--in-memory", "no", "--no-checks") == 0


@pytest.mark.parametrize(
    ("where", "available", "in_memory"),
    [("auto", 10_000, True), ("auto", 600, False), ("no", 10_000, False), ("yes", 600, True)],
)
def test_auto_keeps_images_in_memory_that_take_half_of_it_at_most(
    where, available, in_memory, monkeypatch
):
    monkeypatch.setattr(placement, "available_memory", lambda: available)
    data = decode(items(arrays(n=9, side=4)), CLASSES, in_memory=where)  # 432 bytes
    assert isinstance(data, MappedImages) != in_memory


def test_images_that_are_to_be_in_memory_and_do_not_fit(monkeypatch):
    monkeypatch.setattr(placement, "available_memory", lambda: 400)
    refused(items(arrays(side=4)), "do not fit in", "--in-memory no", in_memory="yes")


def test_a_large_set_is_decoded_once_and_read_from_its_file(monkeypatch):
    monkeypatch.setattr("absld.data.decoding.LARGE", 100)
    source = items()
    sets = [decode(source, CLASSES, key="content", size=6, in_memory="yes") for _ in range(2)]
    assert source.read == len(source) + 2 * 2  # the first and the last one, to find the file
    assert sets[0].digest() == sets[1].digest() and sets[0].storage == "in memory"


# --- Images of any kind ---


@pytest.mark.parametrize(
    "kind",
    [
        Image.fromarray,
        lambda a: a,
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a: np.dstack([a, a[..., :1]]),  # an alpha channel
    ],
)
@pytest.mark.parametrize("size", [None, 4])
def test_images_of_any_kind_are_decoded_as_files(kind, size, tmp_path):
    images = arrays()
    for k, image in enumerate(images):
        for part in ("train", "test"):
            folder = tmp_path / part / CLASSES[k % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{k}.png")
    data = decode(items(map(kind, images)), CLASSES, size=size)
    files = load_data("folder", str(tmp_path), size or 6).test
    assert torch.equal(data.rows(torch.arange(9).view(3, 3).T.flatten()), files.images)


def test_grey_images_of_one_channel_stay_so():
    grey = arrays(channels=1)
    for kind in (lambda a: a, lambda a: a[..., 0], lambda a: torch.from_numpy(a).permute(2, 0, 1)):
        data = decode(items(map(kind, grey)), CLASSES, channels=1)
        assert torch.equal(data.images, torch.from_numpy(grey).permute(0, 3, 1, 2))
        assert data.notes == ("images: 9 images, images of 6x6",)
        assert torch.equal(
            decode(items(map(kind, grey)), CLASSES).images, data.images.repeat(1, 3, 1, 1)
        )
    assert decode(items(), CLASSES, channels=1).notes[0].endswith("9 RGB, read as grey")


def test_crop_resizes_the_shorter_side_and_takes_the_centre():
    image = arrays(1, side=20)[0][:, :9]
    data = decode(items([image] * 3), CLASSES, size=6, resize="crop")
    resized = functional.resize(torch.from_numpy(image).permute(2, 0, 1), [6])
    assert torch.equal(data.images[0], functional.center_crop(resized, [6, 6]))
    assert data.notes[0].endswith("images of 20x9, resized to 6x6 by their centre")
    long = np.zeros((1, 60_000, 3), np.uint8)
    refused(items([long]), "224x13440000 pixels, more than", size=224, resize="crop")


@pytest.mark.parametrize(
    ("image", "label", "cause"),
    [
        (arrays(1, side=5)[0], 0, "image 9: 5x5 pixels, the first image has 6x6"),
        (arrays(1)[0], 3, "image 9: label 3 is not in 0..2"),
        (arrays(1)[0], -1, "image 9: label -1"),
        (arrays(1)[0], 1.0, "image 9: label 1.0 is not a whole number"),
        (arrays(1)[0].astype(float), 0, "image 9: float64 of shape (6, 6, 3) is not an image"),
        (arrays(1, channels=2)[0], 0, "uint8 of shape (6, 6, 2) is not an image"),
        (torch.full((3, 6, 6), 1.5), 0, "pixels in 1.5..1.5, not in [0,1]"),
        (torch.full((3, 6, 6), torch.nan), 0, "not in [0,1]"),
        ("cat.png", 0, "str is not an image"),
        (None, 0, "is not an image"),
    ],
)
def test_an_item_that_is_not_an_image_with_a_label(image, label, cause):
    refused(Items([*items(), (image, label)]), cause, "needed: (image, label)")


@pytest.mark.parametrize("item", [{"image": 1, "label": 2}, (1, 2, 3), "ab", None])
def test_an_item_that_is_not_a_pair(item):
    size = " of 3" if isinstance(item, tuple) else ""
    refused(Items([*items(), item]), f"image 9: {type(item).__name__}{size}, not (image, label)")


def test_an_error_that_says_only_a_key_gets_its_name():
    class Faulty(Items):
        def __getitem__(self, index):
            raise KeyError("image")

    refused(Faulty(items()), "image 0: KeyError: 'image'")


def test_an_image_of_the_caller_is_not_turned():
    images = [Image.fromarray(array[:, :4]) for array in arrays()]
    for image in images:
        image.getexif()[0x0112] = 6
    data = decode(items(images), CLASSES)
    assert data.image_shape == (3, 4, 6) and "turned upright" in data.notes[0]
    assert all(image.size == (4, 6) and image.getexif()[0x0112] == 6 for image in images)


def test_floats_that_are_rounded_are_said():
    data = decode(items(torch.rand(9, 3, 6, 6)), CLASSES)
    assert data.notes == ("images: 9 images, images of 6x6; 9 of floats, rounded to 8 bits",)


def test_all_items_at_fault_are_named_at_once():
    said = refused(Items([*items(), *[("x", 0)] * 12]), "cannot read 12 images: image 9: ")
    assert said.endswith("; ...")


def test_datasets_without_images_or_with_constant_ones():
    refused(Items(), "images: no images")
    for where in ("yes", "no"):
        refused(items([np.full((4, 4, 3), 7, np.uint8)] * 4), "constant colour", in_memory=where)


# --- The file ---


def changed_file(root):
    Image.fromarray(arrays(1)[0]).save(root / "train" / "cat" / "00.png")


def moved_file(root):
    (root / "train" / "cat" / "00.png").rename(root / "train" / "cat" / "07.png")


@pytest.mark.parametrize(
    ("change", "form"),
    [(changed_file, ()), (moved_file, ()), (None, (31,)), (None, (32, "crop")),
     (None, (32, "squash", 1))],
)  # fmt: skip
def test_other_files_or_another_form_have_a_file_of_their_own(change, form, tmp_path, cache):
    root = tmp_path / "data"
    make_folder(root, train=3)
    before = load_data("folder", str(root), placement=MAPPED)
    names = {*cache.glob("*.images")}
    load_data("folder", str(root), placement=MAPPED)
    assert {*cache.glob("*.images")} == names and len(names) == 2
    if change:
        change(root)
    load_data("folder", str(root), *form, placement=MAPPED)
    assert len({*cache.glob("*.images")} - names) == (1 if change else 2)
    assert before.train.digest() == before.train.in_memory().digest()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def changed(path):
    header = path.with_suffix(".header")
    header.write_bytes(header.read_bytes().replace(b"9 images", b"8 images"))


def without_header(path):
    path.with_suffix(".header").unlink()
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path):
    path.write_bytes(bytes(path.stat().st_size))


def unreadable(path):
    path.with_suffix(".header").write_bytes(b"nothing")


@pytest.mark.parametrize("damage", [truncated, changed, without_header, unreadable, replaced])
def test_a_file_that_is_not_whole_is_decoded_anew(damage, cache):
    expected = decode(items(), CLASSES, key="content", in_memory="no").rows(slice(None))
    (path,) = cache.glob("*.images")
    damage(path)
    source = items()
    again = decode(source, CLASSES, key="content", in_memory="no")
    assert source.read == len(source) + 3  # one for the shape, two to find the file
    assert torch.equal(again.rows(slice(None)), expected)


@pytest.mark.parametrize("other", [arrays(6), arrays()[:8], 255 - arrays()])
def test_sets_that_share_a_key_by_mistake_are_told_apart(other):
    for images in (arrays(), other):
        data = decode(items(images), CLASSES, key="mine", in_memory="no")
        assert data.digest() == decode(items(images), CLASSES).digest()


def test_a_set_with_a_key_names_its_image_at_fault():
    faulty = Items([("x", 0), *items()])
    refused(faulty, "image 0: str is not", key="mine", in_memory="no", size=6)


def test_a_cache_folder_that_is_a_link(cache, tmp_path):
    cache.parent.mkdir()
    cache.symlink_to(tmp_path, target_is_directory=True)
    said = refused(items(), f"image cache: {cache}: a link", "ABSLD_CACHE", in_memory="no")
    assert "of a run" not in said


def test_where_a_mapped_set_is_takes_a_short_line(cache):
    notes = []

    class Seen(Observer):
        def note(self, text):
            notes.append(text)

    decode(items(), CLASSES, in_memory="no", observer=Seen())
    (path,) = cache.glob("*.images")
    assert notes == [f"images: 9 images, 0.0 MiB in {cache}/{path.name[:8]}..."]


def test_a_kept_digest_that_is_not_one_is_computed_anew(cache):
    data = decode(items(), CLASSES, in_memory="no")
    expected = data.digest()
    (kept,) = cache.glob("*.sha256")
    kept.write_text("none")
    assert data.digest() == expected == kept.read_text()


def test_nothing_is_written_through_links(cache, tmp_path):
    decode(items(), CLASSES, key="content", in_memory="no")
    target = tmp_path / "of somebody"
    for path in sorted(cache.iterdir()):
        target.write_text("kept")
        path.unlink()
        path.symlink_to(target)
    refused(items(), "a link", "ABSLD_CACHE", key="content", in_memory="no")
    (cache / "x.lock").unlink(missing_ok=True)
    assert target.read_text() == "kept"


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ABSLD_CACHE", str(tmp_path / "file"))
    refused(items(), "image cache: ", "ABSLD_CACHE=DIR", in_memory="no")


def test_a_full_disk_leaves_no_file(cache, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    refused(items(), "No space left", "ABSLD_CACHE=DIR", in_memory="no")
    assert not [*cache.glob("*.images")]


def test_images_that_change_from_pass_to_pass_have_no_file(cache):
    class Noise(Items):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + np.uint8(self.read), label

    refused(Noise(items()), "differ each time", "random transforms", in_memory="no")
    assert not [*cache.glob("*.images")]


def test_one_process_decodes_and_another_one_waits_for_it(monkeypatch):
    reading, go_on, waits = threading.Event(), threading.Event(), threading.Event()

    class Slow(Items):
        def __getitem__(self, index):
            if index == 1:  # the first and the last one are read to find the file
                reading.set()
                assert go_on.wait(30)
            return super().__getitem__(index)

    class Waiting(Observer):
        def wait(self, text):
            assert "another process" in text
            waits.set()
            go_on.set()

    found = []

    def run(source, observer):
        settings = {"key": "content", "in_memory": "no", "observer": observer, "size": 6}
        found.append(decode(source, CLASSES, **settings).digest())

    first, second = Slow(items()), items()
    threads = [threading.Thread(target=run, args=(first, Observer()))]
    threads[0].start()
    assert reading.wait(30)
    threads.append(threading.Thread(target=run, args=(second, Waiting())))
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert waits.is_set() and found[0] == found[1] and (first.read, second.read) == (11, 2)


def test_progress_counts_the_images_of_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr("absld.data.decoding.TOGETHER", 3 * 32 * 32 * 10)
    seen = []

    class Seen(Observer):
        def load(self, name, done, total, unit="bytes"):
            seen.append((name, done, total, unit))

    make_folder(tmp_path / "data")
    load_data("folder", str(tmp_path / "data"), placement=Placement(observer=Seen()))
    done = [("train", 10, 24), ("train", 20, 24), ("train", 24, 24), ("test", 8, 8)]
    assert seen == [(f"reading {part}", n, total, "images") for part, n, total in done]


def test_progress_of_reading_is_a_line_now_and_then(tmp_path):
    path = tmp_path / "output"
    with path.open("w") as stream, View(Output(stream, StopRequest(), as_json=False)) as view:
        view.load("reading train", 1, 8, "images")
        view.last_line -= LINE_EVERY
        view.load("reading train", 2, 8, "images")
        view.load("reading train", 8, 8, "images")
        view.load("reading test", 4, 4, "images")
    (line,) = path.read_text().splitlines()
    assert line.startswith("reading train: 2 of 8 images, 0:0") and line.endswith(" left")


# --- Data sets ---


def test_grey_digits_are_one_channel_of_the_digits():
    grey, colour = (load_data("digits", "", 8, "squash", channels) for channels in (1, 3))
    for ours, theirs in zip(grey, colour, strict=True):
        assert torch.equal(ours.images, theirs.images[:, :1])
    assert "8x8, grey" in grey.describe()[0]


def test_data_sets_that_are_not_grey():
    with pytest.raises(DataError, match="svhn has images of 3 channels"):
        load_data("svhn", "", channels=1)


@pytest.mark.parametrize("given", [{"image_size": 20, "resize": "crop"}, {"channels": 1}])
def test_an_evaluation_takes_the_form_of_its_images_from_the_run(given, tmp_path):
    run = tmp_path / "run"
    config = resolve({"dataset": "folder", "data": "data", **given})
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config, {}))
    found = complete_config(EvaluationConfig(), str(run))
    form = (config.image_size, config.resize, config.channels)
    assert (found.image_size, found.resize, found.channels) == form
    other = complete_config(EvaluationConfig(resize="squash", channels=3), str(run))
    assert (other.resize, other.channels) == ("squash", 3)


# --- Real processes ---

DECODE = """
import sys
import numpy as np
from absld.data.decoding import decode

class Noise:
    def __len__(self):
        return COUNT
    def __getitem__(self, index):
        if index == STOP:
            print("half", flush=True)
            sys.stdin.read()
        return np.random.default_rng(index).integers(0, 256, (224, 224, 3), dtype=np.uint8), index % 2
"""


def child(code, **values):
    for name, value in values.items():
        code = code.replace(name, str(value))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def refuse_options():
    options = ("resize", "Crop"), ("channels", 4), ("in_memory", False), ("size", 0)
    for name, value in (*options, ("size", 32.0), ("size", True)):
        with pytest.raises(DataError) as caught:
            absld.decode([], ("a", "b"), **{name: value})
        assert str(caught.value) == f"{name}={value!r}" and caught.value.hint


def test_options_without_meaning_are_refused():
    """In a process without the type checks of tests."""
    process = processes.Process(target=refuse_options)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_read(cache):
    code = (
        DECODE
        + """
digests = {decode(Noise(), ("a", "b"), key="k", in_memory=w).digest() for w in ("no", "yes")}
print(len(digests))
"""
    )
    with child(code, COUNT=300, STOP=200) as killed:
        assert killed.stdout.readline() == "half\n"
        killed.kill()
    assert [path.name[:9] for path in cache.glob("*.images")] == [".partial-"]
    assert child(code, COUNT=300, STOP=-1).communicate()[0] == "1\n"
    assert [path.name[0] != "." for path in cache.glob("*.images")] == [True]


@pytest.mark.slow
def test_loading_a_mapped_set_takes_little_memory(cache):
    code = (
        DECODE
        + """
import resource
import torch, torchvision.transforms.v2, PIL.Image, pooch
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
data = decode(Noise(), ("a", "b"), key="k", in_memory="no")
data.subset(torch.randperm(len(data))).digest()
print(peak() - before, data.size)
"""
    )
    for _ in range(2):  # decoding it, and opening it again
        taken, size = map(int, child(code, COUNT=4000, STOP=-1).communicate()[0].split())
        assert size > 600e6 and taken < 300e6
