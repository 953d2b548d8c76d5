"""Data sets of the Hugging Face Hub, from a hub on loopback and from the cache."""

import io
import json

import pytest
import torch
from helpers.dataset_hub import COMMIT, dataset_hub, use_dataset_hub
from helpers.program import main, refused
from PIL import Image

from absld.config.datasets import Columns, HubDataset, parse_hub_dataset
from absld.config.resolve import resolve
from absld.data.decoding import Form
from absld.data.placement import Placement
from absld.data.sources import load_data, load_split
from absld.errors import DataError, UsageError
from absld.progress import Observer


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("datasets")  # here, for it takes long to import


def encoded(value, format="png"):
    """A file of an image: a gradient below `value`, so that it is not constant."""
    image = Image.new("RGB", (8, 8), (value, 0, 0))
    image.putpixel((0, 0), (255 - value, 1, 2))
    file = io.BytesIO()
    image.save(file, format)
    return {"bytes": file.getvalue(), "path": None}


def table(count, label=None, images=None, **more):
    """A parquet file: images, whose class is their number modulo 2, and labels."""
    import datasets

    columns = {"img": images or [encoded(100 * (i % 2) + i) for i in range(count)]}
    features = {"img": datasets.Image()}
    columns["label"] = [i % 2 for i in range(count)] if label is None else label
    if label is None:
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    made = datasets.Dataset.from_dict(columns | more)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    file = io.BytesIO()
    made.to_parquet(file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with dataset_hub() as server:
        use_dataset_hub(monkeypatch, server.url, tmp_path)
        server.repositories["me/pets"] = {
            "README.md": b"---\nlicense: mit\n---\n",
            "data/train-00000-of-00001.parquet": table(40),
            "data/test-00000-of-00001.parquet": table(10),
        }
        yield server


class Notes(Observer):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def load_test(name, columns=(), **placement):
    return load_split(name, "", Form(8), "test", Placement(**placement), Columns(*columns))


def test_a_data_set_of_the_hub_has_its_columns_classes_and_splits(hub):
    seen = Notes()
    splits = load_data("hf:me/pets", "", 8, placement=Placement(observer=seen))
    assert [len(part) for part in splits] == [38, 2, 10]
    assert splits.test.classes == ("cat", "dog")
    assert torch.equal(splits.test.labels, torch.arange(10) % 2)
    assert torch.equal(splits.test.rows(slice(10))[:, 0, 7, 7].long() // 100, splits.test.labels)
    assert f"hf:me/pets: commit {COMMIT}" in seen.notes
    assert "test: split test of hf:me/pets" in seen.notes


def test_without_a_network_the_cache_is_read(hub, tmp_path, monkeypatch):
    before = load_test("hf:me/pets@v1")
    use_dataset_hub(monkeypatch, hub.url, tmp_path, offline=True)
    asked = len(hub.requests)
    for name in ("hf:me/pets", "hf:me/pets@v1", f"hf:me/pets@{COMMIT}"):
        assert load_test(name).digest() == before.digest()
    with pytest.raises(DataError, match=f"its cache has commit {COMMIT}"):
        load_test("hf:me/pets@v2")
    with pytest.raises(DataError, match="hf:me/never"):
        load_test("hf:me/never")
    assert len(hub.requests) == asked


def test_a_mapped_set_is_the_same(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("ABSLD_CACHE", str(tmp_path / "cache"))
    mapped = load_test("hf:me/pets", in_memory="no")
    assert mapped.digest() == load_test("hf:me/pets").digest()
    assert type(mapped).__name__ == "MappedImages"


@pytest.mark.parametrize("split", ["validation", "valid"])
def test_validation_images_are_the_test_where_there_are_no_others_with_labels(split, hub):
    files = hub.repositories["me/pets"]
    files["data/test-00000-of-00001.parquet"] = table(4, label=[-1] * 4)
    files[f"data/{split}-00000-of-00001.parquet"] = table(6, label=[0, 1] * 3)
    files["data/train-00000-of-00001.parquet"] = table(40, label=[0, 1] * 20)
    data = load_test("hf:me/pets", ("img", "label"))
    assert len(data) == 6


def test_a_folder_of_images_on_the_hub(hub):
    hub.repositories["me/folder"] = {
        f"{part}/{name}/{i}.png": encoded(100 * k + i)["bytes"]
        for part in ("train", "test")
        for k, name in enumerate(("cat", "dog"))
        for i in range(3)
    }
    data = load_test("hf:me/folder")
    assert data.classes == ("cat", "dog") and data.class_counts() == [3, 3]
    assert torch.equal(data.rows(slice(6))[:, 0, 7, 7].long() // 100, data.labels)


def test_columns_can_be_named_and_other_labels_become_classes(hub):
    files = hub.repositories["me/pets"]
    for part, count in (("train", 20), ("test", 10)):
        names = ["zebra", "ant"] * (count // 2)
        files[f"data/{part}-00000-of-00001.parquet"] = table(count, coarse=names)
    data = load_test("hf:me/pets", ("", "coarse"))
    assert data.classes == ("ant", "zebra")
    assert torch.equal(data.labels, 1 - torch.arange(10) % 2)


def test_columns_that_are_not_there_are_said(hub):
    with pytest.raises(UsageError, match="no column 'label' of kind Image"):
        load_test("hf:me/pets", ("label", ""))
    with pytest.raises(UsageError, match="no column 'species'") as caught:
        load_test("hf:me/pets", ("", "species"))
    assert "--label-column, one of img (Image), label (ClassLabel)" in caught.value.hint
    hub.repositories["me/words"] = {"test.parquet": table(4, label=["a", "b"] * 2)}
    with pytest.raises(UsageError, match="0 columns of kind ClassLabel"):
        load_test("hf:me/words")


def test_images_are_opened_by_the_list_of_formats(hub):
    """PostScript is run by what opens it; a path is not a way to it either."""
    images = [*map(encoded, range(8)), encoded(1, "eps"), None]
    hub.repositories["me/pets"]["data/test-00000-of-00001.parquet"] = table(10, images=images)
    with pytest.raises(DataError, match=r"cannot read 2 images: image 8: .*image 9: no image"):
        load_test("hf:me/pets")


def test_a_repository_with_code_is_refused_and_the_code_is_not_run(hub, tmp_path):
    script = f"open({str(tmp_path / 'executed')!r}, 'w')"
    hub.repositories["me/pets"]["pets.py"] = script.encode()
    with pytest.raises(DataError, match="scripts are no longer supported") as caught:
        load_test("hf:me/pets")
    assert "no code of a repository is run" in caught.value.hint
    assert not (tmp_path / "executed").exists()


def test_files_that_hold_no_images_are_refused(hub):
    hub.repositories["me/texts"] = {"train.txt": b"a\nb\n"}
    with pytest.raises(DataError, match="its files are of kind 'text'"):
        load_test("hf:me/texts")


def test_what_is_not_on_the_hub_is_said(hub, tmp_path):
    with pytest.raises(DataError, match="hf:me/none: DatasetNotFoundError") as caught:
        load_test("hf:me/none")
    assert "HF_TOKEN" in caught.value.hint
    with pytest.raises(DataError, match="BuilderConfig 'small' not found") as caught:
        load_test("hf:me/pets/small")
    assert "hf:owner/name/subset" in caught.value.hint
    (tmp_path / "me" / "pets").mkdir(parents=True)
    with pytest.raises(DataError, match="me/pets is a name in this folder"):
        load_test("hf:me/pets")


def test_names_of_data_sets_on_the_hub():
    assert parse_hub_dataset("hf:me/pets") == HubDataset("me/pets")
    assert parse_hub_dataset("hf:a/b@v1/c") == HubDataset("a/b", "v1", "c")
    assert parse_hub_dataset("hf:a/b@refs%2Fpr%2F1") == HubDataset("a/b", "refs/pr/1")
    assert parse_hub_dataset("hf:a/b@refs/convert/parquet/c").revision == "refs/convert/parquet"
    for name in ("hf:", "hf:pets", "hf:a/b/c/d", "hf:a/b@", "hf:a/b c", "hf:a/b\n"):
        with pytest.raises(UsageError, match="does not name a data set"):
            resolve({"dataset": name})


def test_columns_are_for_data_sets_on_the_hub():
    with pytest.raises(UsageError, match="for data sets on the hub, not cifar10"):
        resolve({"dataset": "cifar10", "label_column": "fine"})


def test_a_run_on_a_data_set_of_the_hub(hub, tmp_path, monkeypatch, capfd):
    flags = ["--device", "cpu", "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8"]
    flags += ["--student", "convnet", "--teacher-model", "convnet", "--allow-weak-teacher"]
    assert main("train", "--dataset", "hf:me/pets", "--image-size", "8", *flags) == 0
    assert "hf:me/pets: commit" in capfd.readouterr().out
    (run,) = (tmp_path / "runs").glob("hf-me-pets-absld-*")
    assert main("evaluate", run, "--attacks", "clean", "--no-checks", "--json") == 0
    results = json.loads(capfd.readouterr().out)
    assert results["data"]["dataset"] == "hf:me/pets" and results["data"]["of"] == 10
    # As somebody else's run, whose data set was never fetched here.
    use_dataset_hub(monkeypatch, hub.url, tmp_path / "elsewhere")
    asked = len(hub.requests)
    refused(capfd, 2, "has not been fetched before", "type --dataset hf:me", "evaluate", run)
    refused(
        capfd, 2, "nothing that a run's file names is fetched", "type --dataset hf:me/pets",
        "train", "--recipe", run / "config.toml",
    )  # fmt: skip
    assert len(hub.requests) == asked


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError) as caught:
        load_test("hf:me/pets")
    assert caught.value.hint == "pip install 'absld[datasets]'"
