"""A network from what a user has: a name, a file of weights, a run directory, or a factory.

Other people's state dicts come wrapped and prefixed; what is stripped or left out is said.
"""

import functools
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from absld.config.imports import import_object
from absld.errors import CheckpointError, Stopped, UsageError
from absld.models.architectures import MODELS, Normalised, build_model, seeded
from absld.seeding import Key
from absld.storage.checkpoint import load
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema")
PREFIXES = re.compile(r"^((module|model|net|_orig_mod)\.)+")
# The shortcuts of published CIFAR ResNets, and of torchvision's blocks, which ours are made of.
SHORTCUT, DOWNSAMPLE = ".shortcut.", ".downsample."
UNUSED = "sub_block1."  # in the published TRADES teacher: a group that no forward uses
COUNTER = ".num_batches_tracked"  # of batch norms; files by old versions of torch have none
# The normalisation that some carry before their first layer, as RobustBench's do.
MEAN = re.compile(r"(normali[sz]er?\.)?(mu|mean)")
STD = re.compile(r"(normali[sz]er?\.)?(sigma|std)")


class Network(NamedTuple):
    """A network, its architecture (a name or package.module:factory), and what was done to it."""

    model: nn.Module
    architecture: str
    notes: tuple[str, ...] = ()


def load_network(spec: str, num_classes: int, key: Key, architecture: str = "") -> Network:
    """The network that `spec` means, with initial weights from `key` where it brings none.

    spec: a name of `absld.models.architectures.MODELS`; `package.module:factory`, which is looked for in the
    current folder, too; a run directory; or a file of weights. The network of a file or a run is
    `architecture` if that is a factory; else the known one that the file states, or that its names
    and shapes tell; else `architecture`. Raises UsageError or CheckpointError.
    """
    if spec in MODELS:
        return Network(build_model(spec, num_classes, *key), spec)
    if os.path.isdir(spec):
        return from_file(RunDirectory(spec).best, num_classes, key, architecture)
    if os.path.exists(spec):
        return from_file(Path(spec), num_classes, key, architecture)
    if re.fullmatch(r"[\w.]+:\w+", spec):
        return Network(from_factory(spec, num_classes, key), spec)
    if spec.endswith((".pt", ".pth", ".pkl", ".tar", ".bin")) or os.sep in spec:
        raise CheckpointError(f"{spec}: no such file", "check the path")
    raise UsageError(
        f"{spec!r} is no network, file or run",
        f"there are: {', '.join(MODELS)}, files, run directories, and package.module:factory",
    )


def from_factory(spec: str, num_classes: int, key: Key) -> nn.Module:
    """What `package.module:factory` returns, called with num_classes if it takes an argument: by
    name if one is called so, else as the first."""
    factory = import_object(spec)
    try:
        takes = inspect.signature(factory).parameters
        by_name = {"num_classes": num_classes} if "num_classes" in takes else {}
        first = (num_classes,) if takes and not by_name else ()
        model = seeded(lambda: factory(*first, **by_name), key)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        raise UsageError(
            f"{spec}: {type(error).__name__}: {error}", "needed: package.module:factory"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned {type(model).__name__}", "needed: an nn.Module")
    return model


def from_file(path: Path, num_classes: int, key: Key, architecture: str) -> Network:
    content = load(path)
    raw, found = find_state_dict(content, path)
    state, notes = stripped(raw)
    normalisation = taken(state)
    stated = content.get("architecture") if isinstance(content, Mapping) else None
    if architecture and architecture not in MODELS:
        name = architecture  # a factory is asked for by name, and has its own idea of its tensors
    elif isinstance(stated, str) and stated in MODELS:
        name = stated  # a known network; a factory would be code of the file's choice
    else:
        name = recognise(state) or architecture
    if not name:
        raise CheckpointError(
            f"{path}: its network is {stated or 'unknown'}",
            f"known are {', '.join(MODELS)}; for others pass package.module:factory",
        )
    model = load_network(name, num_classes, key).model
    if model.state_dict().keys() == raw.keys():  # a factory's own names may look like prefixes
        state, notes, normalisation = raw, [], None
    own = model.state_dict()
    shortcuts = [key for key in state if SHORTCUT in key and as_torchvision(key) in own]
    if shortcuts and not state.keys() & set(map(as_torchvision, shortcuts)):
        state = {as_torchvision(key): tensor for key, tensor in state.items()}
        notes.append(f"{len(shortcuts)} tensors of shortcuts, which torchvision calls downsample")
    counters = own.keys() - state.keys()
    if counters and all(name.endswith(COUNTER) for name in counters):
        state |= dict.fromkeys(counters, torch.tensor(0))
        notes.append(f"{len(counters)} counters of batch norms are not in it, and set to 0")
    load_state(model, state, path)
    if normalisation:
        model = Normalised(model, *normalisation)
        notes.append("its normalisation of the pixels is put before the network")
    return Network(model, name, tuple(f"{path}: {note}" for note in [*found, *notes]))


def find_state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file's content, out of its wrappers, and a note on those that have more
    than one. Raises CheckpointError."""
    stated = content.get("sha256") if isinstance(content, Mapping) else None
    notes = []
    for _ in WRAPPERS:  # a file that wraps itself has no end
        if not isinstance(content, Mapping):
            break
        inner = [w for w in WRAPPERS if isinstance(content.get(w), Mapping)]
        if not inner:
            break
        if others := inner[1:]:
            notes.append(f"{inner[0]!r} is read, {', '.join(map(repr, others))} left out")
        content = content[inner[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: holds {type(content).__name__}, not a state dict", "needed: state_dict()"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is {type(value).__name__}, not a named tensor",
                "needed: state_dict(), bare or under 'model'",
            )
    if stated is not None and stated != digest(content):
        raise CheckpointError(
            f"{path}: its tensors have changed since their SHA-256 was taken",
            "copy it again from where it came from",
        )
    for name, tensor in content.items():
        if not ordinary(tensor):
            raise CheckpointError(
                f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}",
                "needed: plain tensors of real numbers, as float32",
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity", "train it anew")
    return dict(content), notes


def ordinary(tensor: Tensor) -> bool:
    """Is it a plain tensor of real numbers, such as networks here are made of?"""
    real = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return plain and (real or tensor.dtype in (torch.int64, torch.int32, torch.uint8, torch.bool))


def stripped(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict without the prefixes of wrappers and without tensors that no network uses, and
    notes on what was done."""
    notes = []
    unused = [name for name in raw if UNUSED in name]
    if unused:
        notes.append(f"{len(unused)} tensors {UNUSED}* left out: no forward uses them")
    kept = {name: tensor for name, tensor in raw.items() if name not in unused}
    state = {PREFIXES.sub("", name): tensor for name, tensor in kept.items()}
    if len(state) < len(kept):  # two would have one name: they are no prefixes
        state = kept
    if renamed := sorted(kept.keys() - state.keys()):
        notes.append(f"{len(renamed)} tensors without their prefix, such as {renamed[0]}")
    return state, notes


def taken(state: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of three channels, taken out of a state dict that has both."""
    names = [
        next((name for name in state if kind.fullmatch(name) and state[name].numel() == 3), "")
        for kind in (MEAN, STD)
    ]
    return (state.pop(names[0]), state.pop(names[1])) if all(names) else None


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """The known network whose tensors have these names, or those of a published ResNet, and these
    shapes but for the classes."""
    named = {key: tensor.shape[1:] for key, tensor in state.items() if not key.endswith(COUNTER)}
    renamed = {as_torchvision(key): shape for key, shape in named.items()}
    if len(renamed) < len(named):  # a file with both names is of another network
        renamed = named
    for name in MODELS:
        own = {key: shape[1:] for key, shape in shapes(name).items() if not key.endswith(COUNTER)}
        if own in (named, renamed):
            return name
    return None


def as_torchvision(name: str) -> str:
    """The name of a tensor where shortcuts are named as in torchvision."""
    return name.replace(SHORTCUT, DOWNSAMPLE)


@functools.cache
def shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):  # no memory, no arithmetic
        return {key: tensor.shape for key, tensor in MODELS[name](2).state_dict().items()}


def nearest(state: Mapping[str, Tensor]) -> str:
    """The known network that shares most names with a state dict."""
    return max(MODELS, key=lambda name: len(shapes(name).keys() & state.keys()))


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`. Raises CheckpointError with the first names or shapes at fault."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: lacks {missing[:5]}, has besides {unexpected[:5]}",
            f"nearest known network: {nearest(state)}; its name is for --model, of a teacher for --teacher-model",
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(state[name].shape)}, needed is {tuple(tensor.shape)}",
                "the number of classes, or the network, is another",
            )
    model.load_state_dict(state)
