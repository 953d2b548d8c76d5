"""The networks of the single file."""

import pytest
import torch

from absld import digest
from absld_min import build_model

SMALL = "convnet"


@pytest.fixture(scope="module")
def wide():
    return build_model("wrn-34-10", 10, "test")


@pytest.fixture(scope="module")
def residual():
    return build_model("resnet18", 10, "test")


def block(prefix, width_in, width, shortcut):
    """Names and shapes of a block of the published WideResNet."""
    return {
        f"{prefix}.bn1.weight": (width_in,),
        f"{prefix}.conv1.weight": (width, width_in, 3, 3),
        f"{prefix}.bn2.running_var": (width,),
        f"{prefix}.conv2.weight": (width, width, 3, 3),
    } | ({f"{prefix}.convShortcut.weight": (width, width_in, 1, 1)} if shortcut else {})


def test_wide_resnet_has_the_published_names_and_shapes(wide):
    shapes = {name: tuple(tensor.shape) for name, tensor in wide.state_dict().items()}
    expected = {"conv1.weight": (16, 3, 3, 3), "bn1.weight": (640,), "fc.weight": (10, 640)}
    for i, (width_in, width) in enumerate([(16, 160), (160, 320), (320, 640)], 1):
        expected |= block(f"block{i}.layer.0", width_in, width, shortcut=True)
        for j in range(1, 5):
            expected |= block(f"block{i}.layer.{j}", width, width, shortcut=False)
    assert expected.items() <= shapes.items()
    assert sum(p.numel() for p in wide.parameters()) == 46_160_474
    assert sum("convShortcut" in name for name in shapes) == 3


def test_resnet18_has_the_names_of_torchvision_and_the_published_shapes(residual):
    shapes = {name: tuple(tensor.shape) for name, tensor in residual.state_dict().items()}
    expected = {"conv1.weight": (64, 3, 3, 3), "bn1.bias": (64,), "linear.weight": (10, 512)}
    for i, (width_in, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        for j in (0, 1):
            expected[f"layer{i}.{j}.conv1.weight"] = (width, width if j else width_in, 3, 3)
            expected[f"layer{i}.{j}.bn2.running_mean"] = (width,)
        if i > 1:
            expected[f"layer{i}.0.downsample.0.weight"] = (width, width_in, 1, 1)
            expected[f"layer{i}.0.downsample.1.weight"] = (width,)
    assert expected.items() <= shapes.items()
    assert sum(p.numel() for p in residual.parameters()) == 11_173_962
    assert sum(".downsample.0." in name for name in shapes) == 3


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_networks_take_any_size(name, side):
    assert build_model(name, 5, "test").eval()(torch.zeros(2, 3, side, side)).shape == (2, 5)


def test_wide_resnet_runs(wide):
    assert wide.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_strides_halve_the_image_where_they_should(wide, residual):
    sizes = []
    for model, names in ((wide, ["block1", "block3"]), (residual, ["layer1", "layer4"])):
        hooks = [
            getattr(model, name).register_forward_hook(lambda m, i, o: sizes.append(o.shape[2]))
            for name in names
        ]
        model.eval()(torch.zeros(1, 3, 32, 32))
        for hook in hooks:
            hook.remove()
    assert sizes == [32, 8, 32, 4]


def test_a_wide_block_is_the_published_formula(wide):
    """Batch norm first; a resizing shortcut starts behind it, a plain one does not."""
    wide.eval()
    x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for b, x_in in (
        (wide.block1.layer[0], x),
        (wide.block1.layer[1], wide.block1.layer[0](x)),
    ):
        normed = torch.relu(b.bn1(x_in))
        shortcut = b.convShortcut(normed) if b.convShortcut else x_in
        expected = shortcut + b.conv2(torch.relu(b.bn2(b.conv1(normed))))
        torch.testing.assert_close(b(x_in), expected)


def test_initial_weights_come_from_the_key_alone():
    before = torch.get_rng_state()
    first = digest(build_model(SMALL, 3, 0, "student").state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert digest(build_model(SMALL, 3, 0, "student").state_dict()) == first
    assert digest(build_model(SMALL, 3, 0, "teacher").state_dict()) != first
    assert digest(build_model(SMALL, 3, 1, "student").state_dict()) != first
