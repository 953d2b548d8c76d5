"""The shape of the images that a network was trained on: kept in its file, compared with the data.

A network of images of 8x8 on the same images in 32x32 is another network, and nothing fails.
"""

from pathlib import Path

import pytest
import torch
from helpers.image_files import make_folder
from helpers.program import QUICK, main, refused

from absld.data.dataset import InMemoryImages
from absld.errors import CheckpointError
from absld.evaluation.class_names import check_image_shape
from absld.models.architectures import build_model
from absld.models.loading import Network, load_network
from absld.storage.checkpoint import load, save

ON_IMAGES = ["--dataset", "folder", "--data", "images", "--device", "cpu"]
EVALUATE = ["--attacks", "clean", "--no-checks", *ON_IMAGES]
SHAPES = "trained on images of 3x8x8; those of the data are 3x32x32"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file of weights that were trained on images of 8x8."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("images"), side=12)
    state = build_model("convnet", 2, "small").state_dict()
    content = {"model": state, "architecture": "convnet", "image_shape": [3, 8, 8]}
    save(content, Path("small.pt"))
    return "small.pt"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "small.pt", *EVALUATE],
        ["evaluate", "large.pt", "--against", "small.pt", *EVALUATE],
        ["teacher", "check", "small.pt", *ON_IMAGES],
    ],
    ids=["evaluate", "against", "teacher check"],
)
def test_images_of_another_size_are_refused_where_none_was_typed(command, small, capfd):
    state = build_model("convnet", 2, "large").state_dict()
    save({"model": state, "architecture": "convnet"}, Path("large.pt"))
    refused(capfd, 4, f"small.pt: {SHAPES}", "--image-size 8", *command)


@pytest.mark.parametrize(("size", "noted"), [(8, False), (32, True)])
def test_a_size_that_is_typed_is_used_and_noted_if_it_is_another(size, noted, small, capfd):
    assert main("evaluate", small, *EVALUATE, "--image-size", size) == 0
    printed = capfd.readouterr()
    assert (SHAPES in printed.out + printed.err) == noted


@pytest.mark.parametrize("role", ["--teacher", "--student"])
def test_a_training_at_another_size_is_noted(role, small, capfd):
    flags = ["train", *QUICK, *ON_IMAGES, "--batch-size", "8", role, small]
    flags += ["--method", "sat"] if role == "--student" else ["--student", "convnet"]
    assert main(*flags, "--image-size", 32) == 0, capfd.readouterr().err
    assert f"{small}: {SHAPES}" in " ".join(capfd.readouterr().out.split())


def test_a_run_keeps_the_shape_of_its_images_and_is_evaluated_at_it(small, capfd):
    flags = [
        "train",
        *QUICK,
        *ON_IMAGES,
        "--batch-size",
        "8",
        "--method",
        "sat",
        "--student",
        "convnet",
    ]
    assert main(*flags, "--image-size", 12, "--out", "runs") == 0, capfd.readouterr().err
    (run,) = Path("runs").glob("folder-sat-*")
    assert load(run / "best.pt")["image_shape"] == [3, 12, 12]
    assert main("evaluate", run, "--attacks", "clean", "--no-checks", "--device", "cpu") == 0
    capfd.readouterr()
    refused(capfd, 4, "3x12x12", "--image-size 12", "evaluate", run / "best.pt", *EVALUATE)


@pytest.mark.parametrize("stated", [None, "3x8x8", [3, 8], [3, 8.0, 8], [3, True, 8], {3: 8}])
def test_a_file_that_states_no_shape_is_not_compared(stated, small):
    save(load(Path(small)) | {"image_shape": stated}, Path("other.pt"))
    network = load_network("other.pt", 2, ("seed",))
    assert network.image_shape == ()
    data = InMemoryImages(torch.zeros(2, 3, 5, 5), torch.arange(2), ("a", "b"))
    assert check_image_shape(network, data, "other.pt", refuse=True) is network


def test_other_channels_and_sides_are_told():
    network = Network(torch.nn.Identity(), "convnet", image_shape=(1, 28, 20))
    data = InMemoryImages(torch.zeros(2, 3, 5, 6), torch.arange(2), ("a", "b"))
    with pytest.raises(CheckpointError, match="of 1x28x20; those of the data are 3x5x6"):
        check_image_shape(network, data, "x.pt", refuse=True)
    (note,) = check_image_shape(network, data, "x.pt").notes
    assert note == "x.pt: trained on images of 1x28x20; those of the data are 3x5x6"
