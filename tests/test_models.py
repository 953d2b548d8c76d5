"""The networks, and the reading of other people's weights."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from absld_min import build_model, digest, load_weights

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


def test_resnet18_has_the_published_names_and_shapes(residual):
    shapes = {name: tuple(tensor.shape) for name, tensor in residual.state_dict().items()}
    expected = {"conv1.weight": (64, 3, 3, 3), "bn1.bias": (64,), "linear.weight": (10, 512)}
    for i, (width_in, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        for j in (0, 1):
            expected[f"layer{i}.{j}.conv1.weight"] = (width, width if j else width_in, 3, 3)
            expected[f"layer{i}.{j}.bn2.running_mean"] = (width,)
        if i > 1:
            expected[f"layer{i}.0.shortcut.0.weight"] = (width, width_in, 1, 1)
            expected[f"layer{i}.0.shortcut.1.weight"] = (width,)
    assert expected.items() <= shapes.items()
    assert sum(p.numel() for p in residual.parameters()) == 11_173_962
    assert sum(".shortcut.0." in name for name in shapes) == 3


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


def test_digest_is_as_defined():
    """SHA-256 over the sorted names, each followed by dtype, shape and raw bytes."""
    import hashlib
    import struct

    state = {"b": torch.tensor(3), "a": torch.tensor([[1.0, 2.0]])}
    content = b"atorch.float32(1, 2)" + struct.pack("<2f", 1, 2)
    content += b"btorch.int64()" + struct.pack("<q", 3)
    assert digest(state) == hashlib.sha256(content).hexdigest()
    assert digest({"a": torch.zeros(1)}) != digest({"a": torch.zeros(1, dtype=torch.int32)})


# --- Weights from files ---


def weights(seed=1):
    return build_model(SMALL, 3, "other", seed).state_dict()


def loaded(path):
    model = build_model(SMALL, 3, "test")
    load_weights(model, path)
    return model


def refuse(path, *patterns):
    with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
        loaded(path)
    for pattern in patterns:
        assert pattern in str(caught.value)


WRAPPERS = [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    lambda state: {"net": state},
    lambda state: {"model_state_dict": state, "epoch": 3},
    lambda state: {"state_dict": {"net": state}},
    lambda state: {"module." + name: tensor for name, tensor in state.items()},
    lambda state: {"_orig_mod." + name: tensor for name, tensor in state.items()},
    lambda state: {"module.model." + name: tensor for name, tensor in state.items()},
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_bare_and_wrapped_state_dicts_load(wrap, tmp_path, capsys):
    path = tmp_path / "tëacher file.pt"
    torch.save(wrap(weights()), path)
    assert digest(loaded(path).state_dict()) == digest(weights())
    said = capsys.readouterr().err
    renamed = not (
        wrap(weights()).keys() & {"0.weight", "state_dict", "model_state_dict", "model", "net"}
    )
    assert ("renamed or left out" in said) == renamed


def test_the_unused_group_of_the_published_teacher_is_left_out(wide, tmp_path, capsys):
    path = tmp_path / "trades.pt"
    extra = {
        name.replace("block1", "sub_block1"): tensor
        for name, tensor in wide.state_dict().items()
        if name.startswith("block1.")
    }
    torch.save(wide.state_dict() | extra, path)
    model = build_model("wrn-34-10", 10, "another")
    load_weights(model, path)
    assert digest(model.state_dict()) == digest(wide.state_dict())
    assert (
        f"{len(extra)} tensors renamed or left out, such as sub_block1." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "b''"),
        (b"<!DOCTYPE html><html><body>quota exceeded</body></html>", "<!DOCTYPE html>"),
        (b"just a note\n", "just a note"),
    ],
)
def test_files_that_are_no_checkpoints(content, said, tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_bytes(content)
    refuse(path, str(path), "no state dict", said)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(path, "no state dict, or half of one", "PK")


def test_a_missing_file(tmp_path):
    refuse(tmp_path / "none.pt", "No such file", "none.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_payload_never_runs(how, tmp_path, single_thread):
    """Also where the environment asks torch to load without its guard."""
    path, proof = tmp_path / "teacher.pt", tmp_path / "it ran"
    content = {"model": Payload(proof)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    refuse(path, "no state dict", "mkdir")
    code = (
        "import sys; from absld_min import *\n"
        "try: load_weights(build_model('convnet', 3), sys.argv[1])\n"
        "except ValueError as error: sys.exit(4)"
    )
    environment = single_thread | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    child = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert child.returncode == 4 and not proof.exists()


def test_a_whole_module_is_refused_by_type(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "teacher.pt")
    refuse(tmp_path / "teacher.pt", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3}, {3: "a", "b": 4}])
def test_other_content_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "teacher.pt")
    refuse(tmp_path / "teacher.pt", "no state dict")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    state = weights()
    state["0.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "teacher.pt")
    refuse(tmp_path / "teacher.pt", "0.weight", "NaN or infinity")


def test_one_changed_byte_in_a_tensor_is_noticed(tmp_path):
    """The archive itself would load: torch does not compare its check sums."""
    path, state = tmp_path / "teacher.pt", weights()
    torch.save({"model": state, "sha256": digest(state)}, path)
    assert digest(loaded(path).state_dict()) == digest(state)
    raw, needle = bytearray(path.read_bytes()), state["0.weight"].numpy().tobytes()
    raw[raw.index(needle) + 5] ^= 1
    path.write_bytes(raw)
    refuse(path, "SHA-256")


def test_another_architecture_is_named(residual, tmp_path):
    torch.save(residual.state_dict(), tmp_path / "teacher.pt")
    refuse(tmp_path / "teacher.pt", "0.weight", "nearest: resnet18")


def test_another_number_of_classes(tmp_path):
    torch.save(build_model(SMALL, 7, "test").state_dict(), tmp_path / "teacher.pt")
    refuse(tmp_path / "teacher.pt", "size mismatch", "[7, 64]", "[3, 64]")
