"""Networks from names, files, runs and factories, and what is refused."""

import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import absld
import absld_min
from absld.errors import CheckpointError, UsageError
from absld.models import loading
from absld.models.architectures import MODELS, build_model, find_model
from absld.models.loading import load_network
from absld.models.state_dicts import find_state_dict
from absld.storage.checkpoint import save
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory

KEY = (0, "test")
C = 3


def weights(seed=1, name="convnet", classes=C):
    return build_model(name, classes, "other", seed).state_dict()


def file_of(folder, content):
    path = folder / "tëacher file.pt"
    torch.save(content, path)
    return str(path)


def changes(network):
    """The notes on changes: all but the one that only names and shapes tell the network."""
    return tuple(note for note in network.notes if loading.NAMES_ALONE not in note)


def refused(spec, *patterns, kind=CheckpointError, architecture="", classes=C, key=""):
    with pytest.raises(kind) as caught:
        load_network(spec, classes, KEY, architecture, key)
    said = f"{caught.value}\n{caught.value.hint}"
    assert said.count("\n") == 1 and caught.value.hint
    for pattern in patterns:
        assert pattern in said


def module_of(folder, monkeypatch, text):
    """A module of the user's, in the current folder; its name."""
    name = f"mine_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


# --- Names ---


@pytest.mark.parametrize("name", ["convnet", "convnet-wide", "resnet18"])
def test_a_name_has_weights_from_the_key_alone(name):
    before = torch.get_rng_state()
    network = load_network(name, C, KEY)
    assert torch.equal(torch.get_rng_state(), before)
    assert digest(network.model.state_dict()) == digest(build_model(name, C, *KEY).state_dict())
    assert (network.architecture, network.notes) == (name, ())


@pytest.mark.parametrize("spec", ["resnet19", "", "conv net", "mine.nets"])
def test_a_name_that_is_none_is_told_what_there_is(spec):
    refused(spec, repr(spec), *MODELS, "package.module:factory", kind=UsageError)


# --- Files ---


def test_a_file_of_this_package(tmp_path):
    save({"model": weights(), "architecture": "convnet"}, tmp_path / "best.pt")
    network = load_network(str(tmp_path / "best.pt"), C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    assert (network.architecture, network.notes) == ("convnet", ())


def test_a_run_directory(tmp_path):
    run = RunDirectory(tmp_path / "a rün")
    run.path.mkdir()
    save({"model": weights(), "architecture": "convnet"}, run.best)
    network = load_network(str(run.path), C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    run.best.unlink()
    refused(str(run.path), "best.pt", "no such file")


def test_a_file_whose_tensors_have_changed(tmp_path):
    """Files of older versions carry a SHA-256 of their tensors."""
    state = weights()
    content = {"model": state, "sha256": digest(state), "history": [{"epoch": 1}]}
    network = load_network(file_of(tmp_path, content), C, KEY)
    assert digest(network.model.state_dict()) == digest(state)
    raw = bytearray((tmp_path / "tëacher file.pt").read_bytes())
    raw[raw.index(state["0.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "tëacher file.pt").write_bytes(raw)
    for key in ("", "model"):
        refused(str(tmp_path / "tëacher file.pt"), "SHA-256", key=key)


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_a_bare_state_dict_is_recognised_by_names_and_shapes(name, tmp_path):
    """Such as the single file saves."""
    state = absld_min.build_model(name, C, "min").state_dict()
    path = file_of(tmp_path, state)
    network = load_network(path, C, KEY)
    (note,) = network.notes
    assert note == f"{path}: recognised as {name} by names and shapes, {loading.NAMES_ALONE}"
    assert network.architecture == name
    assert digest(network.model.state_dict()) == digest(state)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_with_the_published_name_of_shortcuts(name, tmp_path):
    state = build_model(name, C, "published").state_dict()
    published = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    renamed = len(published.keys() - state.keys())
    network = load_network(file_of(tmp_path, published), C, KEY)
    assert network.architecture == name and renamed > 0
    assert digest(network.model.state_dict()) == digest(state)
    (note,) = changes(network)
    assert note.endswith(f"{renamed} tensors of shortcuts, which torchvision calls downsample")
    wrapped = {f"module.{key}": value for key, value in published.items()}
    again = load_network(file_of(tmp_path, wrapped), C, KEY)
    assert digest(again.model.state_dict()) == digest(state) and len(changes(again)) == 2


def test_a_resnet_with_two_names_of_a_shortcut_is_refused(tmp_path):
    state = build_model("resnet18", C, "published").state_dict()
    both = state | {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    refused(file_of(tmp_path, both), "unexpected ['layer2.0.shortcut", architecture="resnet18")


WRAPPERS = [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    lambda state: {"net": state},
    lambda state: {"model_state_dict": state, "epoch": 3},
    lambda state: {"ema": state},
    lambda state: {"state_dict": {"net": state}},
    # What others mean by these names is no matter of ours.
    lambda state: {"model": state, "architecture": ["convnet", 3]},
    lambda state: {"model": state, "architecture": {"name": "convnet"}},
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_state_dicts(wrap, tmp_path):
    network = load_network(file_of(tmp_path, wrap(weights())), C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    assert changes(network) == ()


PREFIXES = ["module.", "_orig_mod.", "model.", "module.model.", "student.", "module.module.f."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_stripped_and_said(prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in weights().items()}
    path = file_of(tmp_path, state)
    network = load_network(path, C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    (note,) = changes(network)
    assert note == f"{path}: prefixes removed from {len(state)} names, such as {min(state)}"


def test_the_unused_group_of_the_published_teacher_is_left_out(tmp_path):
    state = weights(name="resnet18")
    extra = {f"sub_block1.{n}": torch.zeros(1) for n in range(3)}
    network = load_network(file_of(tmp_path, state | extra), C, KEY)
    assert digest(network.model.state_dict()) == digest(state)
    assert "left out 3 tensors sub_block1.*" in network.notes[0]


# --- Files that people have: names and shapes as published ---


def shapes_of_resnet(blocks, layers):
    """Names of a CIFAR ResNet with basic blocks or bottlenecks (`layers` convolutions each)."""
    named = {"conv1.weight": (64, 3, 3, 3)} | norm("bn1", 64)
    width_in, expansion = 64, 4 if layers == 3 else 1
    for i, count in enumerate(blocks):
        width = 64 * 2**i
        for j in range(count):
            at, stride = f"layer{i + 1}.{j}", 2 if i and not j else 1
            out = width * expansion
            convs = {
                2: [(width, width_in, 3, 3), (width, width, 3, 3)],
                3: [(width, width_in, 1, 1), (width, width, 3, 3), (out, width, 1, 1)],
            }[layers]
            for k, shape in enumerate(convs, 1):
                named |= {f"{at}.conv{k}.weight": shape} | norm(f"{at}.bn{k}", shape[0])
            if stride == 2 or width_in != out:
                named |= {f"{at}.shortcut.0.weight": (out, width_in, 1, 1)}
                named |= norm(f"{at}.shortcut.1", out)
            width_in = out
    return named | {"linear.weight": (C, width_in), "linear.bias": (C,)}


def shapes_of_preactresnet():
    named, width_in = {"conv1.weight": (64, 3, 3, 3)}, 64
    for i in range(4):
        width = 64 * 2**i
        for j in range(2):
            at = f"layer{i + 1}.{j}"
            named |= norm(f"{at}.bn1", width_in) | {f"{at}.conv1.weight": (width, width_in, 3, 3)}
            named |= norm(f"{at}.bn2", width) | {f"{at}.conv2.weight": (width, width, 3, 3)}
            if width_in != width:
                named[f"{at}.shortcut.0.weight"] = (width, width_in, 1, 1)
            width_in = width
    return named | norm("bn", 512) | {"linear.weight": (C, 512), "linear.bias": (C,)}


def shapes_of_mobilenet():
    named = {"conv1.weight": (32, 3, 3, 3)} | norm("bn1", 32)
    plan = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)]
    plan += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    number, width_in = 0, 32
    for widening, width, count, first in plan:
        for j in range(count):
            at, wide = f"layers.{number}", widening * width_in
            named |= {f"{at}.conv1.weight": (wide, width_in, 1, 1)} | norm(f"{at}.bn1", wide)
            named |= {f"{at}.conv2.weight": (wide, 1, 3, 3)} | norm(f"{at}.bn2", wide)
            named |= {f"{at}.conv3.weight": (width, wide, 1, 1)} | norm(f"{at}.bn3", width)
            if (first if not j else 1) == 1 and width_in != width:
                named |= {f"{at}.shortcut.0.weight": (width, width_in, 1, 1)}
                named |= norm(f"{at}.shortcut.1", width)
            number, width_in = number + 1, width
    assert number == 17
    named |= {"conv2.weight": (1280, 320, 1, 1)} | norm("bn2", 1280)
    return named | {"linear.weight": (C, 1280), "linear.bias": (C,)}


def shapes_of_wide(depth, widening):
    named, width_in = {"conv1.weight": (16, 3, 3, 3)}, 16
    for i in range(3):
        width = 16 * widening * 2**i
        for j in range((depth - 4) // 6):
            at = f"block{i + 1}.layer.{j}"
            named |= norm(f"{at}.bn1", width_in) | {f"{at}.conv1.weight": (width, width_in, 3, 3)}
            named |= norm(f"{at}.bn2", width) | {f"{at}.conv2.weight": (width, width, 3, 3)}
            if width_in != width:
                named[f"{at}.convShortcut.weight"] = (width, width_in, 1, 1)
            width_in = width
    return named | norm("bn1", width_in) | {"fc.weight": (C, width_in), "fc.bias": (C,)}


def norm(at, width):
    named = {f"{at}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    return named | {f"{at}.num_batches_tracked": ()}


PUBLISHED = {
    "resnet18": shapes_of_resnet([2, 2, 2, 2], 2),
    "resnet34": shapes_of_resnet([3, 4, 6, 3], 2),
    "resnet50": shapes_of_resnet([3, 4, 6, 3], 3),
    "preactresnet18": shapes_of_preactresnet(),
    "mobilenetv2": shapes_of_mobilenet(),
    "wrn-28-4": shapes_of_wide(28, 4),
    "wrn-28-10": shapes_of_wide(28, 10),
    "wrn-34-10": shapes_of_wide(34, 10),
    "wrn-70-16": shapes_of_wide(70, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_recognised(name):
    with torch.device("meta"):
        state = {key: torch.zeros(shape) for key, shape in PUBLISHED[name].items()}
        own = find_model(name)(C).state_dict()
    published = PUBLISHED[name]
    if name in ("resnet18", "resnet34", "resnet50"):  # ours are of torchvision's blocks
        published = {key.replace(".shortcut.", ".downsample."): s for key, s in published.items()}
    assert {key: tuple(tensor.shape) for key, tensor in own.items()} == published
    assert loading.recognise_architecture(state) == name
    fewer = {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
    assert loading.recognise_architecture(fewer) == name


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "mobilenetv2", "wrn-28-4"])
def test_a_published_file_gives_the_outputs_that_it_had(name, tmp_path):
    """Wrapped, prefixed, with an unused group, without counters: the same network."""
    model = build_model(name, C, "published").eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = {f"module.{k}": v for k, v in model.state_dict().items() if "num_batches" not in k}
    extra = {"module.sub_block1.layer.0.bn1.weight": torch.zeros(3)}
    network = load_network(
        file_of(tmp_path, {"state_dict": state | extra, "epoch": 76}), C, KEY, "convnet"
    )
    assert network.architecture == name
    assert torch.equal(network.model.eval()(x), model(x))
    said = " ".join(network.notes)
    assert "left out 1 tensors sub_block1.*" in said and "counters of batch norms" in said
    assert f"prefixes removed from {len(state)} names" in said


def test_the_published_teacher(tmp_path):
    """TRADES' WideResNet-34-10, bare, with its unused group in full, of the shapes of block1."""
    model = build_model("wrn-34-10", 10, "published").eval()
    state = model.state_dict()
    unused = {f"sub_{k}": v for k, v in state.items() if k.startswith("block1.")}
    network = load_network(file_of(tmp_path, state | unused), 10, KEY)
    assert network.architecture == "wrn-34-10"
    (note,) = changes(network)
    assert f"left out {len(unused)} tensors sub_block1.*, which no forward uses" in note
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("mean", "std"), [("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std")]
)
def test_a_normalisation_inside_the_file_is_kept_inside_the_network(mean, std, tmp_path):
    model = build_model("resnet18", C, "normalised").eval()
    x = torch.rand(2, 3, 16, 16)
    of_data = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    state = model.state_dict() | {
        name: tensor.view(1, 3, 1, 1) for name, tensor in zip((mean, std), of_data, strict=True)
    }
    network = load_network(file_of(tmp_path, state), C, KEY)
    expected = model((x - of_data[0].view(3, 1, 1)) / of_data[1].view(3, 1, 1))
    assert torch.equal(network.model.eval()(x), expected)
    assert network.architecture == "resnet18" and "normalisation" in changes(network)[0]
    # As a student of ours is saved, and read again.
    save({"model": network.model.state_dict(), "architecture": "resnet18"}, tmp_path / "own.pt")
    again = load_network(str(tmp_path / "own.pt"), C, KEY)
    assert torch.equal(again.model.eval()(x), expected)


@pytest.mark.parametrize("name", ["mu", "sigma"])
def test_half_a_normalisation_is_not_dropped_silently(name, tmp_path):
    path = file_of(tmp_path, weights() | {name: torch.ones(3)})
    refused(path, f"unexpected ['{name}']", architecture="convnet")


def test_whole_numbers_are_not_read_as_a_normalisation(tmp_path):
    of_pixels = {"mean": torch.tensor([125, 123, 114]), "std": torch.ones(3)}
    path = file_of(tmp_path, weights() | of_pixels)
    refused(path, "unexpected ['mean'", architecture="convnet")


@pytest.mark.parametrize("prefixes", [("module.", "model."), ("module.", "")])
def test_tensors_of_two_networks_are_not_merged(prefixes, tmp_path):
    """A prefix that only some names have tells networks apart."""
    state = weights()
    mixed = {prefixes["linear" in name] + name: tensor for name, tensor in state.items()}
    refused(file_of(tmp_path, mixed), "module.0.weight", architecture="convnet")


@pytest.mark.parametrize("wrapper", ["model.", "module.model.", "net.module."])
def test_a_prefix_of_all_but_a_normalisation_is_stripped(wrapper, tmp_path):
    state = {wrapper + name: tensor for name, tensor in weights().items()}
    state |= {"normalize.mean": torch.zeros(1, 3, 1, 1), "normalize.std": torch.ones(1, 3, 1, 1)}
    network = load_network(file_of(tmp_path, state | {"n_averaged": torch.tensor(3)}), C, KEY)
    assert digest(network.model.net.state_dict()) == digest(weights())


def test_prefixes_without_which_two_tensors_had_one_name_are_none(tmp_path):
    state = weights() | {"module.linear.bias": torch.ones(C)}
    refused(file_of(tmp_path, state), "module.linear.bias", architecture="convnet")


# --- Files with several state dicts ---


def average():
    return weights(seed=2)


def prefixed(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


SEVERAL = {  # content, and the key of the average
    "state_dict": lambda: (
        {"state_dict": weights(), "state_dict_ema": average()},
        "state_dict_ema",
    ),
    "model": lambda: ({"ema": average(), "model": weights(), "epoch": 3}, "ema"),
    "net": lambda: ({"net": weights(), "shadow": prefixed(average())}, "shadow"),
    "": lambda: ({"student": weights(), "averaged": average()}, "averaged"),
    "state_dict.model": lambda: (
        {"state_dict": {"model": weights(), "swa": average()}, "optimizer": {"state": {}}},
        "state_dict.swa",
    ),
}


@pytest.mark.parametrize("read", SEVERAL)
def test_another_state_dict_of_a_file_is_said_and_can_be_chosen(read, tmp_path):
    content, key = SEVERAL[read]()
    path = file_of(tmp_path, content)
    if read:
        network = load_network(path, C, KEY)
        assert digest(network.model.state_dict()) == digest(weights())
        assert (
            f"{read!r} is read, {key!r} left out; to choose: --weights {key!r}" in network.notes[0]
        )
        assert "--teacher-weights" in network.notes[0]
    else:  # none under a usual name
        refused(path, "the state dicts 'student', 'averaged'", "--weights ")
    network = load_network(path, C, KEY, weights=key)
    assert digest(network.model.state_dict()) == digest(average())
    refused(path, "has no state dict 'emma'", repr(key), key="emma")


def test_an_average_of_parameters_alone_is_said_too(tmp_path):
    parameters = dict(build_model("convnet", C, "average").named_parameters())
    content = {"model": weights(), "shadow": {k: p.detach() for k, p in parameters.items()}}
    network = load_network(file_of(tmp_path, content), C, KEY)
    assert "'shadow' left out" in network.notes[0]


@pytest.mark.parametrize(
    "beside",
    [
        {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}},
        {"metric_sums": {"loss": torch.zeros(())}, "method": {"temperatures": torch.ones(2, C)}},
        {"losses": [torch.zeros(()), torch.ones(())], "mask": [torch.ones(C)]},
        {"callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}}},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_other_tensors_beside_the_weights_are_no_second_state_dict(beside, tmp_path):
    network = load_network(file_of(tmp_path, {"model": weights()} | beside), C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    assert changes(network) == ()


@pytest.mark.parametrize("key", ["ema", "ema.shadow_params"])
def test_averages_in_a_list_are_said_to_be_left_out(key, tmp_path):
    """They have no names, only an order."""
    value = [p.detach() for p in build_model("convnet", C, "average").parameters()]
    for part in reversed(key.split(".")):
        value = {part: value, "decay": 0.99} if "." in key else {part: value}
    network = load_network(file_of(tmp_path, {"model": weights()} | value), C, KEY)
    (note,) = changes(network)
    assert f"'{key}' left out: tensors of the same shapes in a list" in note


@pytest.mark.parametrize(
    "beside",
    [
        {"mean": torch.zeros(3), "std": torch.ones(3)},
        {"mu": [0.5] * 3, "sigma": [0.2] * 3},
        {"normalizer.mean": np.zeros(3)},
    ],
    ids=lambda beside: next(iter(beside)),
)
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"checkpoint": c}], ids=["", "wrapped"])
def test_a_normalisation_beside_the_weights_is_said_to_be_left_out(wrap, beside, tmp_path):
    network = load_network(file_of(tmp_path, wrap({"model": weights()} | beside)), C, KEY)
    (note,) = changes(network)
    assert f"{', '.join(map(repr, beside))} beside the weights left out" in note


def test_many_state_dicts_are_compared_in_bounded_time_and_listed_in_part(tmp_path):
    names = [f"model.net.module.a{number}.w" for number in range(3000)]
    zeros = torch.zeros(1)
    content = {f"k{n}": dict.fromkeys(names[n : n + 2], zeros) for n in range(2999)}
    few = dict.fromkeys(names[:4], zeros)  # like the first four
    many = dict.fromkeys(names, zeros)
    started = time.monotonic()
    assert not find_state_dict({"model": many} | content, tmp_path).notes
    (note,) = find_state_dict({"model": few} | content, tmp_path).notes
    assert "'k0', 'k1', 'k2', 'k3' left out" in note
    with pytest.raises(CheckpointError, match=r"'k19', \.\.\. \(2,999\)") as caught:
        find_state_dict(content, tmp_path)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 30  # where each was compared anew, it took minutes


def test_weights_are_chosen_only_from_a_file():
    refused("convnet", "no state dict 'ema'", kind=UsageError, key="ema")


def test_the_one_state_dict_of_a_file_is_read_under_any_key(tmp_path):
    path = file_of(tmp_path, {"student": weights(), "best_acc": torch.tensor(0.9)})
    assert digest(load_network(path, C, KEY).model.state_dict()) == digest(weights())
    assert digest(load_network(path, C, KEY, weights="student").model.state_dict()) == digest(
        weights()
    )


def test_the_counter_of_an_averaged_model_is_left_out_and_said(tmp_path):
    model = torch.optim.swa_utils.AveragedModel(build_model("convnet", C, "average"))
    network = load_network(file_of(tmp_path, model.state_dict()), C, KEY)
    assert digest(network.model.state_dict()) == digest(model.module.state_dict())
    assert "n_averaged left out" in network.notes[0]


def test_a_file_of_nested_wrappers_and_prefixes_is_read_in_bounded_time(tmp_path):
    content = state = {"module." * 20_000 + name: tensor for name, tensor in weights().items()}
    for _ in range(50):
        content = {"model": content}
    started = time.monotonic()
    refused(file_of(tmp_path, state), "unknown")
    refused(file_of(tmp_path, content), "not a named tensor")
    assert time.monotonic() - started < 10


def test_safetensors(tmp_path):
    path = tmp_path / "ein é.safetensors"
    save_file(weights(), path)
    network = load_network(str(path), C, KEY)
    assert digest(network.model.state_dict()) == digest(weights())
    path.write_bytes(path.read_bytes()[:-8])
    refused(str(path), "safetensors", "fetch or copy it again")
    path.write_text("<!DOCTYPE html><html>sign in</html>")
    refused(str(path), "HTML page")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    state = weights()
    state["3.weight"][0, 0, 0, 0] = value
    refused(file_of(tmp_path, state), "tensor 3.weight holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_not_read_as_weights(dtype, tmp_path):
    state = weights() | {"linear.bias": torch.ones(C, dtype=dtype)}
    refused(file_of(tmp_path, state), f"linear.bias is {dtype}, expected torch.float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_read_unless_they_become_infinite(dtype, tmp_path):
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights().items()}
    network = load_network(file_of(tmp_path, state), C, KEY)
    assert torch.equal(network.model.state_dict()["linear.bias"], state["linear.bias"].float())
    if dtype == torch.float64:
        state["linear.bias"][1] = 1e300
        refused(file_of(tmp_path, state), "linear.bias holds numbers too large for torch.float32")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {},
        {"epoch": 3},
        {3: torch.zeros(1)},
        {"model": [1]},
        {"model": {"a": 1}},
    ],
)
def test_content_that_is_no_state_dict(content, tmp_path):
    refused(file_of(tmp_path, content), "state_dict()")


def test_an_unknown_architecture(tmp_path):
    path = file_of(tmp_path, {"fc.weight": torch.zeros(3, 3)})
    refused(path, "its network is unknown", "--model package.module:factory", "--teacher-model")


def test_another_architecture_is_told_what_differs_and_what_is_near(tmp_path):
    state = weights(name="resnet18")
    del state["conv1.weight"]
    state["extra"] = torch.zeros(1)
    lacks = sorted(weights().keys() - state.keys())[:5]
    has = sorted(state.keys() - weights().keys())[:5]
    refused(
        file_of(tmp_path, state),
        f"missing {lacks}, unexpected {has}",
        "the nearest known network is resnet18",
        architecture="convnet",
    )


def test_another_number_of_classes(tmp_path):
    path = file_of(tmp_path, weights(classes=7))
    refused(path, "linear.weight is (7, 64), expected (3, 64)", "number of classes")


@pytest.mark.parametrize("spec", ["none.pt", "folder/none", "é ü.pth"])
def test_a_file_that_is_missing(spec):
    refused(spec, f"{spec}: no such file")


# --- Factories ---

FACTORIES = """
from torch import nn
def sized(classes): return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
class Net(nn.Sequential):
    def __init__(self, num_classes=5): super().__init__(nn.Linear(4, num_classes))
class Wrapped(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    def forward(self, x): return self.model(2 * x - 1)
class Normalised(nn.Sequential):
    def forward(self, x): return super().forward(2 * x - 1)
def normalised(classes):
    from absld.models.architectures import convnet
    network = convnet(classes)
    network.__class__ = Normalised
    return network
def text(): return "no module"
def greedy(a, b): return a
def after_pretrained(pretrained, num_classes=10): return sized(num_classes)
def of_weights(weights, **kwargs): return sized(weights)
def second_positional(depth, num_classes, /): return sized(depth)
def by_keyword(**kwargs): return sized(kwargs["num_classes"])
def by_keyword_only(*, weights=None, **kwargs): return pretrained(weights, **kwargs)
def pretrained(pretrained=False, **kwargs):
    if pretrained: raise RuntimeError("a download starts")
    return sized(kwargs["num_classes"])
def positional_only(classes, /, width=192): return nn.Sequential(nn.Flatten(), nn.Linear(width, classes))
def named_first(num_classes, /, width=192): return sized(num_classes)
def only_defaults(pretrained=False, classes=10): raise RuntimeError("called")
def rest(*args): raise RuntimeError("called")
class AtDepth(nn.Module):
    def __init__(self, model, head):
        super().__init__()
        self.model, self.head = model, head
    def forward(self, x): return self.head(self.model(x))
def at_depth(classes): return AtDepth(nn.Flatten(), AtDepth(nn.Linear(192, 8), nn.Linear(8, classes)))
class WithGroup(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(192, classes))
        self.sub_block1 = nn.Sequential(nn.Linear(2, 2))
        self.register_buffer("n_averaged", nn.Linear(1, 1).weight.detach()[0, 0])
        self.register_buffer("mean", nn.Linear(1, 3).bias.detach())
        self.register_buffer("std", nn.Linear(1, 3).bias.detach())
    def forward(self, x): return self[1](self[0](x))
def broken(classes): raise ValueError("not today")
number = 3
"""


TAKE_CLASSES = ["sized", "fixed", "Net", "by_keyword", "by_keyword_only", "pretrained"]
TAKE_CLASSES += ["positional_only", "named_first"]


@pytest.mark.parametrize("name", TAKE_CLASSES)
def test_a_factory_in_the_current_folder(name, tmp_path, monkeypatch):
    """The number of classes goes where it belongs; the weights are drawn from the key."""
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    before = torch.get_rng_state()
    network = load_network(f"{module}:{name}", C, KEY)
    again = load_network(f"{module}:{name}", C, KEY)
    other = load_network(f"{module}:{name}", C, (1, "test"))
    assert torch.equal(torch.get_rng_state(), before)
    assert network.architecture == f"{module}:{name}"
    assert next(iter(network.model.parameters())).shape[0] == C
    one, two, three = (digest(n.model.state_dict()) for n in (network, again, other))
    assert one == two != three


def test_a_factory_of_a_package():
    network = load_network("absld.models.architectures:convnet", C, KEY)
    assert digest(network.model.state_dict()) == digest(
        build_model("convnet", C, *KEY).state_dict()
    )


@pytest.mark.parametrize(
    "spec",
    [
        "no.such.module:net",
        "absld.models.architectures:no_such_net",
        "absld_no:net",
        ".models:convnet",
        "absld.config.settings:OWN",
    ],
)
def test_a_factory_that_is_not_there(spec):
    refused(spec, spec, "needed: package.module:", kind=UsageError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "returned str"),
        ("number", "number"),
        ("broken", "not today"),
        ("greedy", "takes (a, b): no place for the number of classes"),
        ("only_defaults", "takes (pretrained=False, classes=10): no place"),
        ("rest", "takes (*args): no place"),
        ("after_pretrained", "takes (pretrained, num_classes=10): no place"),
        ("of_weights", "takes (weights, **kwargs): no place"),
        ("second_positional", "takes (depth, num_classes, /): no place"),
    ],
)
def test_a_factory_that_makes_no_network(name, said, tmp_path, monkeypatch):
    """The user's fault, and said to be: never an error of another type."""
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    refused(f"{module}:{name}", f"{module}:{name}", said, kind=UsageError)


def test_a_file_for_a_factory(tmp_path, monkeypatch):
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    state = load_network(f"{module}:sized", C, KEY).model.state_dict()
    path = file_of(tmp_path, {"model": state, "architecture": f"{module}:sized"})
    network = load_network(path, C, (1, "test"), f"{module}:sized")
    assert digest(network.model.state_dict()) == digest(state)
    assert network.architecture == f"{module}:sized"


def test_a_file_for_a_factory_whose_own_names_begin_with_model(tmp_path, monkeypatch):
    """A wrapper that normalises is the commonest of factories; `model.` is no prefix there."""
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    state = load_network(f"{module}:Wrapped", C, KEY).model.state_dict()
    network = load_network(file_of(tmp_path, state), C, (1, "test"), f"{module}:Wrapped")
    assert digest(network.model.state_dict()) == digest(state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "net.", "student."])
@pytest.mark.parametrize("factory", ["Wrapped", "at_depth", "WithGroup"])
def test_the_names_of_a_known_target_decide(factory, prefix, tmp_path, monkeypatch):
    """Some begin as a prefix does, or are those of tensors that other files have for nothing."""
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    state = load_network(f"{module}:{factory}", C, KEY).model.state_dict()
    path = file_of(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    network = load_network(path, C, (1, "test"), f"{module}:{factory}")
    assert digest(network.model.state_dict()) == digest(state)
    assert len(network.notes) == bool(prefix)


def test_a_file_that_does_not_fit_its_factory_is_compared_at_the_nearest_prefix(
    tmp_path, monkeypatch
):
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    state = prefixed(load_network(f"{module}:at_depth", C, KEY).model.state_dict())
    del state["module.head.head.bias"]
    path = file_of(tmp_path, state)
    refused(path, "missing ['head.head.bias'], unexpected []", architecture=f"{module}:at_depth")


def test_torchvision_gets_the_number_of_classes_and_no_download(monkeypatch):
    def refuse(*given, **settings):
        raise AssertionError("a download starts")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    network = load_network("torchvision.models:squeezenet1_1", C, KEY)
    assert network.model(torch.zeros(1, 3, 32, 32)).shape == (1, C)


def test_a_factory_that_is_asked_for_is_not_replaced_by_a_known_network(tmp_path, monkeypatch):
    """Names and shapes are the convnet's, the function is another."""
    module = module_of(tmp_path, monkeypatch, FACTORIES)
    network = load_network(file_of(tmp_path, weights()), C, KEY, f"{module}:normalised")
    assert network.architecture == f"{module}:normalised"
    assert type(network.model).__name__ == "Normalised"


@pytest.mark.parametrize("architecture", ["", "convnet", "mine.nets:other"])
@pytest.mark.parametrize("state", [{"weight": torch.zeros(3, 3)}, weights()], ids=["odd", "known"])
def test_a_file_does_not_choose_code(state, architecture, tmp_path, monkeypatch):
    """Nor is its network guessed: a factory may compute otherwise with the names of a known one."""
    module = module_of(tmp_path, monkeypatch, "raise SystemExit('the file chose this code')")
    path = file_of(tmp_path, {"model": state, "architecture": f"{module}:net"})
    if ":" not in architecture:
        said = f"its network is '{module}:net', and no name in a file is imported"
        hint = f"if it is a {architecture}, save its state dict alone" if architecture else ""
        name = "package.module:factory" if architecture else f"{module}:net"
        refused(path, said, hint, f"type --model {name} ", architecture=architecture)
    else:  # what is typed is imported, and nothing else
        said = "No module named 'mine", f"looked for in {tmp_path} and the installed packages"
        refused(path, *said, kind=UsageError, architecture=architecture)
    assert module not in sys.modules
    with pytest.raises(UsageError, match="the file chose this code"):
        load_network(path, C, KEY, f"{module}:net")


@pytest.mark.parametrize("stated", ["os:abort", "os.path:abspath", "builtins:exit"])
def test_names_of_installed_code_in_a_file_are_not_imported(stated, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "import_object", lambda name: pytest.fail(name))
    refused(file_of(tmp_path, {"model": weights(), "architecture": stated}), f"--model {stated}")


@pytest.mark.parametrize("stated", ["resnet", "WRN-28-10", "os/abort", 3, ["os:abort"], None])
def test_what_others_mean_by_architecture_is_said_and_left_alone(stated, tmp_path):
    path = file_of(tmp_path, {"model": weights(), "architecture": stated})
    network = load_network(path, C, KEY)
    assert network.architecture == "convnet"
    said = [f"{path}: its architecture {stated!r} is not a known network"]
    assert changes(network) == tuple(said if isinstance(stated, str) else [])


def test_a_network_stated_anywhere_around_the_weights_counts(tmp_path):
    stated = {"state_dict": weights(), "architecture": "os:abort"}
    refused(file_of(tmp_path, {"checkpoint": stated}), "its network is 'os:abort'")


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ({"classes": ["b", "a", "c"]}, ("b", "a", "c")),
        ({"class_names": ("b", "a", "c")}, ("b", "a", "c")),
        ({"class_to_idx": {"a": 1, "b": 0, "c": 2}}, ("b", "a", "c")),
        ({"class_to_idx": {"a": np.int64(1), "b": np.int64(0)}}, ("b", "a")),
        ({"idx_to_class": {1: "a", 0: "b"}}, ("b", "a")),
        ({"classes": {0: "b", 1: "a"}}, ("b", "a")),
        ({"classes": np.array(["b", "a"])}, ("b", "a")),
        ({"classes": None}, ()),
        ({}, ()),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "wrap",
    [lambda state, rest: {"model": state} | rest, lambda *both: {"net": {"model": both[0]} | both[1]}],
    ids=["beside", "in a wrapper"],
)  # fmt: skip
def test_the_names_of_classes_that_a_file_states(wrap, content, classes, tmp_path):
    network = load_network(file_of(tmp_path, wrap(weights(), content)), C, KEY)
    assert network.classes == classes
    assert changes(network) == () and all(type(name) is str for name in classes)


@pytest.mark.parametrize(
    "content",
    [
        {"classes": 3},
        {"classes": []},
        {"classes": [0, 1, 2]},
        {"classes": np.array([["a", "b"]])},
        {"class_to_idx": {"a": [1]}},
        {"class_to_idx": {0: 1, 1: 0}},
        {"class_to_idx": {"a": 1, "b": 2}},
        {"class_to_idx": {"a": 0, "b": 0}},
        {"idx_to_class": {0: "a", 2: "b"}},
    ],
    ids=str,
)
def test_what_is_not_read_as_names_of_classes_is_said(content, tmp_path):
    network = load_network(file_of(tmp_path, {"model": weights()} | content), C, KEY)
    assert network.classes == ()
    (note,) = changes(network)
    assert f"{next(iter(content))!r} is not read" in note


def test_names_of_classes_that_differ_within_a_file_are_said(tmp_path):
    content = {"model": weights(), "classes": ["a", "b"], "class_to_idx": {"a": 1, "b": 0}}
    network = load_network(file_of(tmp_path, content), C, KEY)
    assert network.classes == ("a", "b")
    assert "read from 'classes', 'class_to_idx' has others" in changes(network)[0]


@pytest.mark.parametrize("shape", [[3, 32, 32], (1, 8, 8), [3, 32], [3, 32, "x"], 32, None])
def test_the_shape_of_the_images_that_a_file_states(shape, tmp_path):
    content = {"model": weights(), "image_shape": shape}
    read = load_network(file_of(tmp_path, content), C, KEY).image_shape
    assert read == (tuple(shape) if shape in ([3, 32, 32], (1, 8, 8)) else ())


def test_what_is_loaded_is_a_module_to_train():
    network = load_network("convnet", C, KEY)
    assert isinstance(network.model, nn.Module) and network.model.training
    assert all(p.requires_grad for p in network.model.parameters())
    assert absld.load_network is load_network
