"""Networks from a name, a file of weights, a run directory or a factory.

State dicts of others come wrapped and with prefixes; notes say what was stripped or left out.
"""

import functools
import inspect
import os
import re
from collections.abc import Mapping, Set
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
# The normalisation before the first layer in some networks, such as RobustBench's.
MEAN = re.compile(r"(normali[sz]er?\.)?(mu|mean)")
STD = re.compile(r"(normali[sz]er?\.)?(sigma|std)")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool)


class Network(NamedTuple):
    """A network, its architecture (a name or package.module:factory), and notes on its loading."""

    model: nn.Module
    architecture: str
    notes: tuple[str, ...] = ()


def load_network(target: str, num_classes: int, key: Key, architecture: str = "") -> Network:
    """Load the network that `target` means.

    Args:
        target: a name of `absld.models.architectures.MODELS`; `package.module:factory`, also of the
            current folder; a run directory; or a file of weights.
        num_classes: number of logits.
        key: of the initial weights, where `target` brings none.
        architecture: the network of a file or run, if it is a factory, or if the file states none
            and its names and shapes are not those of a known network.

    Raises:
        UsageError: `target` means nothing, or its factory fails.
        CheckpointError: a file cannot be loaded, or does not fit the network.
    """
    if target in MODELS:
        return Network(build_model(target, num_classes, *key), target)
    if os.path.isdir(target):
        return load_weights(RunDirectory(target).best, num_classes, key, architecture)
    if os.path.exists(target):
        return load_weights(Path(target), num_classes, key, architecture)
    if re.fullmatch(r"[\w.]+:\w+", target):
        return Network(build_from_factory(target, num_classes, key), target)
    if target.endswith((".pt", ".pth", ".pkl", ".tar", ".bin")) or os.sep in target:
        raise CheckpointError(f"{target}: no such file", "check the path")
    raise UsageError(
        f"{target!r} is not a known network, a file or a run directory",
        f"there are: {', '.join(MODELS)}, files, run directories, and package.module:factory",
    )


def build_from_factory(target: str, num_classes: int, key: Key) -> nn.Module:
    """Build the network of `package.module:factory`.

    num_classes is passed by name if the factory has such a parameter, else as the first argument if
    it takes any.
    """
    factory = import_object(target)
    try:
        parameters = inspect.signature(factory).parameters
        by_name = {"num_classes": num_classes} if "num_classes" in parameters else {}
        first = (num_classes,) if parameters and not by_name else ()
        model = seeded(lambda: factory(*first, **by_name), key)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        raise UsageError(
            f"{target}: {type(error).__name__}: {error}", "needed: package.module:factory"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} returned {type(model).__name__}", "needed: an nn.Module")
    return model


def load_weights(path: Path, num_classes: int, key: Key, architecture: str) -> Network:
    """Load the network of a file of weights. Raises CheckpointError."""
    content = load(path)
    raw, notes = find_state_dict(content, path)
    state, changes = strip_prefixes(raw)
    normalisation = pop_normalisation(state)
    stated = content.get("architecture") if isinstance(content, Mapping) else None
    if architecture and architecture not in MODELS:
        name = architecture  # a factory is chosen on purpose, and names its tensors as it likes
    elif isinstance(stated, str) and stated in MODELS:
        name = stated  # a known network; a factory would be code of the file's choice
    else:
        name = recognise_architecture(state) or architecture
    if not name:
        raise CheckpointError(
            f"{path}: its network is {stated or 'unknown'}",
            f"known are {', '.join(MODELS)}; for others pass package.module:factory",
        )
    model = load_network(name, num_classes, key).model
    own = model.state_dict()
    if own.keys() == raw.keys():  # names of a factory's tensors may look like prefixes
        state, changes, normalisation = raw, [], None
    changes += adapt_names(state, own.keys())
    load_state(model, state, path)
    if normalisation:
        model = Normalised(model, *normalisation)
        changes.append("its normalisation of the pixels is put before the network")
    return Network(model, name, tuple(f"{path}: {note}" for note in [*notes, *changes]))


def find_state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in a file's content, and a note if another one is left out.

    Raises CheckpointError for anything but finite plain tensors, and for a wrong digest.
    """
    stated = content.get("sha256") if isinstance(content, Mapping) else None
    notes = []
    for _ in WRAPPERS:  # bounded: a file may wrap itself
        if not isinstance(content, Mapping):
            break
        wrappers = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not wrappers:
            break
        first, *others = wrappers
        if others:
            notes.append(f"{first!r} is read, {', '.join(map(repr, others))} left out")
        content = content[first]
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
        if not is_plain(tensor):
            raise CheckpointError(
                f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}",
                "needed: plain tensors of real numbers, as float32",
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity", "train it anew")
    return dict(content), notes


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, in memory, and of an ordinary type."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return dense and tensor.dtype in DTYPES


def strip_prefixes(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict without prefixes of wrappers and without unused tensors, and notes."""
    notes = []
    kept = {name: tensor for name, tensor in raw.items() if UNUSED not in name}
    if unused := len(raw) - len(kept):
        notes.append(f"{unused} tensors {UNUSED}* left out: no forward uses them")
    state = {PREFIXES.sub("", name): tensor for name, tensor in kept.items()}
    if len(state) < len(kept):  # two would have the same name, so they are not prefixes
        state = kept
    if renamed := sorted(kept.keys() - state.keys()):
        notes.append(f"{len(renamed)} tensors without their prefix, such as {renamed[0]}")
    return state, notes


def pop_normalisation(state: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Remove mean and deviation of three channels from a state dict that has both."""
    names = [
        next((name for name in state if kind.fullmatch(name) and state[name].numel() == 3), "")
        for kind in (MEAN, STD)
    ]
    return (state.pop(names[0]), state.pop(names[1])) if all(names) else None


def adapt_names(state: dict[str, Tensor], own: Set[str]) -> list[str]:
    """Rename shortcuts and add counters of batch norms, to match the names `own`; return notes."""
    notes = []
    shortcuts = [name for name in state if SHORTCUT in name and torchvision_name(name) in own]
    if shortcuts and not state.keys() & set(map(torchvision_name, shortcuts)):
        renamed = {torchvision_name(name): tensor for name, tensor in state.items()}
        state.clear()
        state.update(renamed)
        notes.append(f"{len(shortcuts)} tensors of shortcuts, which torchvision calls downsample")
    missing = own - state.keys()
    if missing and all(name.endswith(COUNTER) for name in missing):
        state |= dict.fromkeys(missing, torch.tensor(0))
        notes.append(f"{len(missing)} counters of batch norms are not in it, and set to 0")
    return notes


def recognise_architecture(state: Mapping[str, Tensor]) -> str | None:
    """Return the known network with these names and shapes, but for the number of classes.

    Shortcuts may have the names of published CIFAR ResNets.
    """
    named = {key: tensor.shape[1:] for key, tensor in state.items() if not key.endswith(COUNTER)}
    renamed = {torchvision_name(key): shape for key, shape in named.items()}
    if len(renamed) < len(named):  # a file with both names is of another network
        renamed = named
    for name in MODELS:
        shapes = state_shapes(name).items()
        own = {key: shape[1:] for key, shape in shapes if not key.endswith(COUNTER)}
        if own in (named, renamed):
            return name
    return None


def torchvision_name(name: str) -> str:
    """Return the name of a tensor where shortcuts are named as in torchvision."""
    return name.replace(SHORTCUT, DOWNSAMPLE)


@functools.cache
def state_shapes(name: str) -> dict[str, torch.Size]:
    """Return the shapes of a known network's state dict, for two classes."""
    with torch.device("meta"):  # no memory, no arithmetic
        return {key: tensor.shape for key, tensor in MODELS[name](2).state_dict().items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`. Raises CheckpointError with the first names or shapes at fault."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        nearest = max(MODELS, key=lambda name: len(state_shapes(name).keys() & state.keys()))
        raise CheckpointError(
            f"{path}: lacks {missing[:5]}, has besides {unexpected[:5]}",
            f"nearest known network: {nearest}; give its name by --model (--teacher-model for a "
            "teacher)",
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(state[name].shape)}, needed is {tuple(tensor.shape)}",
                "the number of classes, or the network, is another",
            )
    model.load_state_dict(state)
