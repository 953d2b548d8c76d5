"""Networks of timm and torchvision by name: built from their registries, nothing else."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.program import QUICK, main, refused

import absld
from absld.config.files import read_recipe
from absld.config.imports import names_code
from absld.errors import CheckpointError, UsageError
from absld.models import loading
from absld.models.layers import Normalised
from absld.models.loading import load_network
from absld.storage.checkpoint import save
from absld.storage.files import digest

KEY = (0, "test")
C = 3
STUDENT = "timm:test_resnet"
NETWORKS = ["timm:resnet10t", "timm:test_vit", "torchvision:squeezenet1_1", "torchvision:resnet18"]


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Any download ends the test."""
    pytest.importorskip("timm")  # here, for it takes long to import

    def refuse(*given, **settings):
        raise AssertionError("a download starts")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 64, 64), (2, 32, 32)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_a_library_takes_images_and_classes(name, shape):
    before = torch.get_rng_state()
    one, two, other = (
        load_network(name, C, key, image_shape=shape) for key in (KEY, KEY, (1, "test"))
    )
    assert torch.equal(torch.get_rng_state(), before)
    digests = [digest(network.model.state_dict()) for network in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]  # from the key alone
    assert (one.architecture, one.notes) == (name, ())
    with torch.no_grad():
        assert one.model.eval()(torch.rand(2, *shape)).shape == (2, C)


def test_a_network_of_a_fixed_size_is_built_for_the_images():
    for name, side in (("timm:test_vit", 48), ("torchvision:vit_b_16", 32)):
        with torch.device("meta"):
            model = load_network(name, C, KEY, image_shape=(3, side, side)).model
            assert model(torch.zeros(1, 3, side, side)).shape == (1, C)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_has_one_head_in_train_mode_too(name):
    with torch.device("meta"):
        model = load_network(f"torchvision:{name}", C, KEY).model.train()
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, C)


def test_a_grey_image_gives_what_its_rgb_copy_gave():
    rgb, grey = (
        load_network("torchvision:squeezenet1_1", C, KEY, image_shape=(c, 64, 64)).model.eval()
        for c in (3, 1)
    )
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(grey(x), rgb(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:resnet18x", "did you mean timm:resnet18"),
        ("timm:resnet18.no_such_weights", "did you mean timm:resnet18."),
        ("timm:hf-hub:owner/name", "not a place on a hub"),
        ("timm:hf_hub:timm/resnet18.a1_in1k", "not a place"),
        ("timm:local-dir:/etc", "not a place"),
        ("timm:", "needed: a network"),
        ("torchvision:resnet19", "did you mean torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "for images that torchvision lists"),
        ("torchvision:../resnet18", "torchvision:resnet18"),
    ],
)
def test_a_name_that_a_library_does_not_have_is_refused(name, hint):
    with pytest.raises(UsageError, match="has no network") as caught:
        load_network(name, C, KEY)
    assert hint in caught.value.hint


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="needs the package timm") as caught:
        load_network("timm:resnet10t", C, KEY)
    assert caught.value.hint == "pip install 'absld[timm]'"


def test_the_name_of_a_library_s_network_is_not_that_of_code():
    assert not any(map(names_code, NETWORKS))
    assert names_code("timm.models:resnet18") and names_code("torchvision.models:resnet18")


# --- Files ---


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_may_name_a_library_s_network(name, tmp_path):
    """It is built for the size of the images that the file states, in the channels of the data."""
    model = load_network(name, C, ("saved",), image_shape=(1, 64, 64)).model
    content = {"model": model.state_dict(), "architecture": name, "image_shape": [1, 64, 64]}
    save(content, tmp_path / "best.pt")
    network = load_network(str(tmp_path / "best.pt"), C, KEY, image_shape=(1, 32, 32))
    assert network.architecture == name
    assert digest(network.model.state_dict()) == digest(model.state_dict())
    del content["architecture"]
    save(content, tmp_path / "bare.pt")
    typed = load_network(str(tmp_path / "bare.pt"), C, KEY, name, image_shape=(1, 64, 64))
    assert digest(typed.model.state_dict()) == digest(model.state_dict())


@pytest.mark.parametrize(
    "name", ["timm:vit_giant_patch14_224", "wrn-994-96", "torchvision:vit_h_14"]
)
def test_a_small_file_that_names_a_large_network_takes_no_memory(name, tmp_path, monkeypatch):
    build = loading.build_network

    def without_memory(*given):
        assert torch.get_default_device().type == "meta"
        return build(*given)

    monkeypatch.setattr(loading, "build_network", without_memory)
    save({"model": {"w": torch.zeros(1)}, "architecture": name}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="unexpected"):
        load_network(str(tmp_path / "best.pt"), C, KEY, image_shape=(3, 224, 224))


def test_a_network_that_is_not_built_without_memory_is_read(tmp_path):
    name = "torchvision:regnet_y_400mf"
    state = load_network(name, C, KEY).model.state_dict()
    save({"model": state, "architecture": name}, tmp_path / "best.pt")
    loaded = load_network(str(tmp_path / "best.pt"), C, KEY).model.state_dict()
    assert digest(loaded) == digest(state)


def test_a_network_of_a_hub_in_a_file_is_not_fetched(tmp_path):
    save({"model": {"w": torch.zeros(1)}, "architecture": "timm:hf-hub:a/b"}, tmp_path / "best.pt")
    with pytest.raises(UsageError, match="has no network"):
        load_network(str(tmp_path / "best.pt"), C, KEY)


# --- Pretrained weights ---


@pytest.fixture
def weights_of_libraries(monkeypatch):
    """The weights that a download would bring: random ones of 1,000 classes."""

    def of_torchvision(url, **settings):
        from torchvision import models

        return models.get_model("squeezenet1_1", weights=None).state_dict()

    def of_timm(*given, **settings):
        import timm

        return timm.create_model("resnet10t", pretrained=False).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", of_torchvision)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", of_timm)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_pretrained_weights_come_with_their_normalisation_and_a_new_head(
    name, channels, tmp_path, weights_of_libraries
):
    shape = (channels, 64, 64)
    network = load_network(name, C, KEY, image_shape=shape, pretrained=True)
    (note,) = network.notes
    assert "with a new last layer" in note and "is put before the network" in note
    assert isinstance(network.model, Normalised)
    mean = torch.tensor([0.485, 0.456, 0.406])
    mean = mean if channels == 3 else mean.mean(0, keepdim=True)
    torch.testing.assert_close(network.model.mean.flatten(), mean)
    x = torch.rand(2, *shape)
    assert network.model.eval()(x).shape == (2, C)
    # As a run saves it; read without any download.
    content = {"model": network.model.state_dict(), "architecture": name}
    save(content, tmp_path / "best.pt")
    again = load_network(str(tmp_path / "best.pt"), C, KEY, image_shape=shape)
    torch.testing.assert_close(again.model.eval()(x), network.model(x))


def test_pretrained_weights_that_cannot_be_had_are_said(monkeypatch):
    def fail(*given, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UsageError, match="no route to host") as caught:
        load_network("timm:resnet10t", C, KEY, pretrained=True)
    assert "--pretrained" in caught.value.hint


# --- From the command line ---


@pytest.mark.usefixtures("few_digits_in_an_empty_folder")
def test_a_student_of_a_library_is_trained_and_evaluated(capfd):
    quick = ["--method", "sat", "--student", STUDENT, "--device", "cpu"]
    assert main("train", *QUICK, *quick) == 0
    capfd.readouterr()
    (run,) = Path("runs").glob("digits-sat-*")
    assert main("evaluate", str(run), "--attacks", "clean", "--no-checks", "--device", "cpu") == 0
    network = absld.load_network(str(run), 10, KEY, image_shape=(3, 8, 8))
    assert network.architecture == STUDENT
    assert read_recipe(str(run / "config.toml"))["student"] == STUDENT  # for no code is named


@pytest.mark.usefixtures("few_digits_in_an_empty_folder")
def test_pretrained_weights_are_for_networks_of_libraries(capfd):
    refused(capfd, 2, "there are no pretrained weights for convnet", "timm:NAME",
            "train", *QUICK, "--pretrained")  # fmt: skip
