"""Networks by name, and files of them: the published ones, of any channels, with a fitting stem."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import published_networks as published

import absld
from absld.errors import CheckpointError, UsageError
from absld.models.architectures import MODELS, STEMS, build_exactly, find_model, name_for
from absld.models.layers import Normalised
from absld.models.loading import NAMES_ALONE, load_network
from absld.models.recognition import recognise_architecture
from absld.storage.checkpoint import save
from absld.storage.files import digest

C = 3
KEY = (0, "test")
DOCS = Path(__file__).parents[2] / "docs" / "results"


def shaken(name, classes=C, channels=3, dtype=torch.float64):
    """A network whose batch norms are not the identity, in double precision."""
    model = build_exactly(name, classes, channels, ("shaken",)).to(dtype)
    random = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64)
            tensor.add_(0.3 * noise.to(tensor))
    return model


STRIDES = {
    "mobilenetv2": (1, 1, 1, 2, 2, 1, 2, 1),
    "mobilenetv2-imagenet": (2, 1, 2, 2, 2, 1, 2, 1),
}
REFERENCES = {
    "dm-wrn-10-1": partial(published.deepmind_wide, depth=10),
    "dm-wrn-16-2": partial(published.deepmind_wide, depth=16),
    "dm-wrn-10-1-relu": partial(published.deepmind_wide, depth=10, activation=F.relu),
    "dm-preactresnet18": published.deepmind_preact,
    "dm-preactresnet18-relu": partial(published.deepmind_preact, activation=F.relu),
    "wrn-10-3": partial(published.wide, depth=10),
    "wrn-22-1": partial(published.wide, depth=22),
    "resnet18": partial(published.resnet, depths=(2, 2, 2, 2)),
    "resnet50": partial(published.resnet, depths=(3, 4, 6, 3)),
    "preactresnet18": partial(published.preact, activated_shortcut=True),
    "preactresnet18-no-norm": partial(published.preact, activated_shortcut=False),
    "preactresnet18-no-norm-activated": partial(published.preact, activated_shortcut=True),
    "preactresnet18-imagenet": partial(published.preact, activated_shortcut=True, large=True),
    **{name: partial(published.mobilenet, strides=strides) for name, strides in STRIDES.items()},
}


# Deeper ones amplify the rounding of a batch norm over three values, one an image.
SIDES = {"resnet50": 16, "mobilenetv2-imagenet": 64}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_network_computes_what_its_published_names_say(name):
    """Logits, and gradients of the images and of the first weights; in eval and in train mode."""
    model, side = shaken(name), SIDES.get(name, 32 if "imagenet" in name else 8)
    drawn = torch.rand(
        3, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    first = next(key for key, _ in model.named_parameters())
    for train in (False, True):
        model.train(train).zero_grad()
        state = {
            key: t.detach().clone().requires_grad_(t.is_floating_point())
            for key, t in model.state_dict().items()
        }
        x, theirs_x = (drawn.clone().requires_grad_() for _ in range(2))
        ours, theirs = model(x), REFERENCES[name](state, theirs_x, train=train)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        for logits in (ours, theirs):
            (logits**2).sum().backward()
        torch.testing.assert_close(x.grad, theirs_x.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            model.get_parameter(first).grad, state[first].grad, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_of_large_images_is_torchvision_s(name):
    from torchvision import models

    theirs = models.get_model(name, weights=None, num_classes=C).eval()
    ours = build_exactly(f"{name}-imagenet", C, 3, ()).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_network_of_100_classes_has_the_normalisation_of_cifar_100():
    model = shaken("dm-wrn-10-1", classes=100).eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    theirs = published.deepmind_wide(
        model.state_dict(), x, depth=10, of_data=[v.double() for v in published.CIFAR100]
    )
    torch.testing.assert_close(model(x), theirs, rtol=1e-6, atol=1e-6)


# --- Channels ---


@pytest.mark.parametrize("name", [*MODELS, "wrn-10-1", "dm-wrn-10-1"])
def test_each_network_takes_images_of_any_channels(name):
    with torch.device("meta"):
        for channels in (1, 2):
            shape = (channels, 32, 32)
            model = absld.build_model(name, C, "test", image_shape=shape)
            assert model(torch.zeros(2, *shape)).shape == (2, C)
        assert find_model(name)(C)(torch.zeros(2, 3, 32, 32)).shape == (2, C)


# --- Stems ---


@pytest.mark.parametrize("name", STEMS)
def test_the_stem_is_chosen_by_the_shorter_side_or_by_name(name):
    small, large = (3, 95, 300), (3, 96, 96)
    assert name_for(name, small) == name
    assert name_for(name, large) == f"{name}-imagenet"
    for shape in (small, large):
        assert name_for(f"{name}-cifar", shape) == name
        assert name_for(f"{name}-imagenet", shape) == f"{name}-imagenet"


@pytest.mark.parametrize("name", ["convnet", "wrn-28-4", "dm-preactresnet18", "timm:resnet18"])
def test_a_network_with_one_stem_keeps_its_name(name):
    assert name_for(name, (3, 224, 224)) == name


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 4), ("preactresnet18", 4), ("mobilenetv2", 4)]
)
def test_the_stem_for_large_images_makes_them_smaller(name, side):
    """By 32 before the average, where the stem for small images makes them smaller by 8."""
    sizes = {}
    for large in (False, True):
        model = build_exactly(name + "-imagenet" * large, C, 3, ()).eval()
        model.pool.register_forward_pre_hook(
            lambda _, given, large=large: sizes.update({large: given[0].shape[-1]})
        )
        with torch.device("meta"):
            model.to("meta")(torch.zeros(1, 3, 32 * side, 32 * side))
    assert sizes == {False: 4 * side, True: side}


# --- Names ---


@pytest.mark.parametrize(
    "name",
    ["wrn-35-10", "wrn-4-1", "wrn-28-0", "wrn-028-10", "wrn-1000-1", "wrn-28-100", "wrn-28",
     "wrn-28-10-relu", "dm-wrn-28-10-silu", "resnet18-large", "convnet-cifar", "wrn-28-10-cifar", ""],
)  # fmt: skip
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match="there is no network") as caught:
        absld.build_model(name, C)
    assert "wrn-DEPTH-WIDTH" in caught.value.hint and "6n + 4" in caught.value.hint


@pytest.mark.parametrize(
    "name", [*MODELS, "wrn-10-1", "wrn-34-15", "wrn-106-16", "dm-wrn-94-16", "dm-wrn-82-8"]
)
def test_names_and_shapes_tell_the_network(name):
    """But for activations and shortcuts, which they do not tell."""
    with torch.device("meta"):
        state = find_model(name)(C).state_dict()
    told = name.removesuffix("-relu").removesuffix("-activated")
    assert recognise_architecture(state) == told
    grey = {k: t[:, :1] if t.ndim == 4 and t.shape[1] == 3 else t for k, t in state.items()}
    assert recognise_architecture(grey) == told
    del state[next(reversed(state))]
    assert recognise_architecture(state) is None


def test_images_of_odd_sides_are_padded_as_tensorflow_does():
    """So that the shortcut of a block has the size of its convolutions."""
    for name in ("dm-wrn-10-1", "dm-preactresnet18"):
        assert build_exactly(name, C, 3, ()).eval()(torch.rand(1, 3, 7, 9)).shape == (1, C)


# --- Files ---


def file_of(folder, content):
    torch.save(content, folder / "net.pt")
    return str(folder / "net.pt")


def changes(network):
    return [note for note in network.notes if NAMES_ALONE not in note]


DM = ["dm-wrn-10-1", "dm-preactresnet18"]


@pytest.mark.parametrize("mean", ["mean", "mu", "module.0.mean"])
@pytest.mark.parametrize("name", DM)
def test_the_normalisation_of_a_deepmind_network_is_that_of_its_file(name, mean, tmp_path):
    """Whatever its name and shape: it counts once."""
    model = shaken(name, dtype=torch.float32).eval()
    model.mean.fill_(0.4), model.std.fill_(0.3)
    prefix = "module.0." if "." in mean else ""
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    state[mean] = state.pop(f"{prefix}mean").view(1, 3, 1, 1)
    state[mean.replace("mean", "std").replace("mu", "sigma")] = state.pop(f"{prefix}std")
    network = load_network(file_of(tmp_path, state), C, KEY)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(network.model.eval()(x), model(x))
    assert network.architecture == name


@pytest.mark.parametrize("name", DM)
def test_a_normalisation_that_a_file_lacks_is_the_network_s_own_and_said(name, tmp_path):
    """Older files hold none: the networks had it as plain numbers."""
    model = shaken(name, dtype=torch.float32).eval()
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key not in ("mean", "std") and "num_batches_tracked" not in key
    }
    network = load_network(file_of(tmp_path, state), C, KEY)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(network.model.eval()(x), model(x))
    counters, mean, std = changes(network)
    assert "counters of batch norms" in counters
    assert "'mean' of the pixels is not in it" in mean and "'std' of the pixels" in std


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("convnet", ""),
        ("convnet-wide", ""),
        ("resnet18", ""),
        ("wrn-10-1", "module."),
        ("wrn-10-1", "net.module."),
    ],
)
def test_a_sequential_of_a_normalisation_and_a_network_is_read(name, before, tmp_path):
    model = shaken(name, dtype=torch.float32).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    state = {f"{before}1.{key}": tensor for key, tensor in model.state_dict().items()}
    state |= {f"{before}0.mean": mean, f"{before}0.std": std}
    network = load_network(file_of(tmp_path, state), C, KEY)
    x = torch.rand(2, 3, 8, 8)
    expected = model((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.equal(network.model.eval()(x), expected)
    assert "normalisation of the pixels is put before" in changes(network)[-1]


def test_a_sequential_whose_first_layer_has_no_tensors_is_said(tmp_path):
    """It may have been a normalisation, which nobody knows then."""
    state = {f"module.1.{k}": t for k, t in shaken("wrn-10-1").state_dict().items()}
    network = load_network(file_of(tmp_path, state), C, KEY)
    assert "has no tensors before 'module.1.'" in changes(network)[-1]
    other = {f"module.0.{k}": t for k, t in shaken("wrn-10-1").state_dict().items()}
    assert len(changes(load_network(file_of(tmp_path, other), C, KEY))) == 1


def test_a_normalisation_of_grey_images_is_read(tmp_path):
    model = build_exactly("wrn-10-1", C, 1, KEY).eval()
    state = model.state_dict() | {"mu": torch.tensor([0.4]), "sigma": torch.tensor([0.3])}
    network = load_network(file_of(tmp_path, state), C, KEY, image_shape=(1, 8, 8))
    assert isinstance(network.model, Normalised)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(network.model.eval()(x), model((x - 0.4) / 0.3))


@pytest.mark.parametrize(
    "name", ["dm-wrn-10-1-relu", "dm-preactresnet18-relu", "preactresnet18-no-norm-activated"]
)
def test_of_networks_that_share_names_and_shapes_the_typed_one_is_read(name, tmp_path):
    path = file_of(tmp_path, {"state_dict": shaken(name, dtype=torch.float32).state_dict()})
    assert load_network(path, C, KEY, name).architecture == name
    assert load_network(path, C, KEY, "wrn-34-10").architecture in name  # which it is not


def test_weights_of_several_are_chosen_by_their_key(tmp_path):
    """The average of training files as those of DeepMind's networks hold it."""
    one, two = (build_exactly("dm-wrn-10-1", C, 3, (key,)).state_dict() for key in "ab")
    content = {
        "model_state_dict": {f"module.{key}": tensor for key, tensor in one.items()},
        "ema": {f"module.{key}": tensor for key, tensor in two.items()},
    }
    path = file_of(tmp_path, content)
    first, average = load_network(path, C, KEY), load_network(path, C, KEY, weights="ema")
    assert digest(first.model.state_dict()) == digest(one)
    assert digest(average.model.state_dict()) == digest(two)
    assert "'ema' left out; to choose: --weights 'ema'" in changes(first)[0]


@pytest.mark.parametrize("side", [64, 128])
def test_a_file_says_which_stem_it_has(side, tmp_path):
    """Its name is that of the network, whatever the size of the images that it meets."""
    built = load_network("resnet18", C, KEY, image_shape=(3, side, side))
    assert built.architecture == ("resnet18" if side == 64 else "resnet18-imagenet")
    save({"model": built.model.state_dict(), "architecture": built.architecture}, tmp_path / "a.pt")
    for shape in ((3, 32, 32), (3, 224, 224)):
        read = load_network(str(tmp_path / "a.pt"), C, KEY, image_shape=shape)
        assert read.architecture == built.architecture


def test_a_file_of_other_channels_is_refused(tmp_path):
    path = file_of(tmp_path, shaken("convnet", dtype=torch.float32).state_dict())
    with pytest.raises(CheckpointError, match=r"expected \(16, 1, 3, 3\)") as caught:
        load_network(path, C, KEY, image_shape=(1, 8, 8))
    assert "channels" in caught.value.hint


# --- Factories ---

FACTORIES = """
from torch import nn
def net(channels, side, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))
def timm_like(num_classes, in_chans=3, img_size=224): return net(in_chans, img_size, num_classes)
def named(classes, in_channels=3): return net(in_channels, 8, classes)
def required(in_channels, classes): return net(in_channels, 8, classes)
def by_keyword(*, num_channels, **others): return net(num_channels, 8, others["num_classes"])
def of_width(num_classes, num_channels=64): return nn.Sequential(net(3, 8, num_channels), nn.Linear(num_channels, num_classes))
"""


@pytest.mark.parametrize(
    ("name", "channels"),
    [("timm_like", 1), ("timm_like", 3), ("named", 1), ("named", 3), ("required", 3),
     ("required", 2), ("by_keyword", 1), ("of_width", 3)],
)  # fmt: skip
def test_a_factory_gets_the_channels_where_it_names_them(name, channels, tmp_path, monkeypatch):
    """With RGB images a default stays: it may mean something else."""
    module = f"channels_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    shape = (channels, 8, 8)
    model = load_network(f"{module}:{name}", C, KEY, image_shape=shape).model
    assert model(torch.zeros(2, *shape)).shape == (2, C)
    if name == "of_width":
        assert model[1].in_features == 64


# --- The published list ---


def test_the_page_says_how_many_of_the_published_list_are_recognised():
    """As the script counts; and no name more or less is recognised."""
    script = runpy.run_path(str(DOCS / "robustbench_recognition.py"))
    found, architectures = script["count"]()
    page = (DOCS / "robustbench-recognition.md").read_text()
    assert architectures.total() >= 60
    assert f"\n{architectures.total()} of {len(found)} entries are recognised.\n" in page
    for entry, name in found.items():
        assert f"| {entry} | {f'`{name}`' if name else 'no'} |" in page
    pang = script["wide"](34, 20, unused=True, pixels=True)
    del pang["fc.bias"]  # its last layer computes something else
    assert script["recognised"](pang) is None
    assert script["recognised"](script["wide"](28, 10) | {"activation.alpha": (1,)}) is None
