"""State dicts in files of weights, and the names of their tensors.

Files of others wrap them, put prefixes before the names, and have tensors more or fewer. Where the
network is known, its own names decide. Notes say what was changed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from absld.errors import CheckpointError
from absld.shapes import is_dense
from absld.storage.files import digest

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema")  # the first one is read
MOST_LEVELS = 5  # of wrappers, and of prefixes
MOST_LISTED = 20
CLASSES = ("classes", "class_names", "class_to_idx", "idx_to_class")  # class_to_idx: torchvision's
# The shortcuts of published CIFAR ResNets, and of torchvision's blocks, which ours are made of.
SHORTCUT, DOWNSAMPLE = ".shortcut.", ".downsample."
UNUSED = "sub_block1."  # in the published TRADES teacher: a group that no forward uses
AVERAGED = "n_averaged"  # a counter of torch's AveragedModel
COUNTER = ".num_batches_tracked"  # of batch norms; files by old versions of torch have none
# The normalisation before the first layer in some networks, such as RobustBench's; "0.": in a
# nn.Sequential, whose network is "1.".
MEAN = re.compile(r"(normali[sz]er?\.|0\.)?(mu|mean)")
STD = re.compile(r"(normali[sz]er?\.|0\.)?(sigma|std)")
APART = re.compile(f"{AVERAGED}|{MEAN.pattern}|{STD.pattern}")  # may stand outside a prefix
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool)

Names = dict[str, str]
"""Names of tensors, each with its name in the file."""


# --- The state dict in a file ---


class StateDict(NamedTuple):
    """A state dict of a file, the mappings around it, the nearest first, and notes."""

    tensors: dict[str, Tensor]
    around: tuple[Mapping[Any, Any], ...]
    notes: list[str]


def find_state_dict(content: Any, path: Path, key: str = "") -> StateDict:
    """Return the state dict in a file's content, and notes on what is left out.

    key: the keys that lead to it, with dots between; empty: the first of WRAPPERS.

    Raises CheckpointError for anything but finite plain tensors, for a wrong digest, if the key is
    not there, and without one if there are several state dicts, none of them under WRAPPERS.
    """
    found = state_dicts(content)
    if not found:
        raise CheckpointError(
            f"{path}: holds {type(content).__name__}, not a named tensor",
            "needed: state_dict(), bare or under 'model'",
        )
    if key and key not in found:
        raise CheckpointError(f"{path}: has no state dict {key!r}", f"there are: {listed(found)}")
    ranks = {name: wrapper_rank(name) for name in found}
    default = min(found, key=lambda name: ranks[name])
    chosen = key or default
    if not key and len(found) > 1 and len(WRAPPERS) in ranks[chosen]:
        raise CheckpointError(
            f"{path}: holds the state dicts {listed(found)}", f"choose one: {flag(chosen)}"
        )
    *around, state = found[chosen]
    check_tensors(state, path)
    stated = content.get("sha256")
    if isinstance(stated, str) and chosen == default and stated != digest(state):
        raise CheckpointError(
            f"{path}: its tensors have changed since their SHA-256 was taken",
            "copy it again from where it came from",
        )
    own = bare_names(state)
    others = [n for n, (*_, other) in found.items() if n != chosen and alike(own, other)]
    notes = []
    if others:
        notes.append(f"{chosen!r} is read, {listed(others)} left out; to choose: {flag(others[0])}")
    if lists := list(lists_alike(content, state)):
        notes.append(f"{listed(lists)} left out: tensors of the same shapes in a list")
    if beside := [k for outer in around for k in outer if isinstance(k, str) and of_pixels(k)]:
        notes.append(f"{listed(beside)} beside the weights left out: the pixels are in [0,1]")
    return StateDict(dict(state), tuple(reversed(around)), notes)


def flag(key: str) -> str:
    return f"--weights {key!r} (--against-weights, --teacher-weights, --student-weights)"


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, the first ones of many."""
    names = list(names)
    more = f", ... ({len(names):,})" if len(names) > MOST_LISTED else ""
    return ", ".join(map(repr, names[:MOST_LISTED])) + more


def state_dicts(
    content: Any, path: tuple[str, ...] = (), around: tuple[Mapping[Any, Any], ...] = ()
) -> dict[str, tuple[Mapping[Any, Any], ...]]:
    """Return the mappings that hold tensors, by the keys that lead to them, with dots between.

    Each comes with the mappings around it, from the outermost one to itself.
    """
    if not isinstance(content, Mapping) or len(path) > MOST_LEVELS:
        return {}
    found: dict[str, tuple[Mapping[Any, Any], ...]] = {}
    for name, value in content.items():
        if isinstance(name, str):
            found |= state_dicts(value, (*path, name), (*around, content))
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    wrapper = found and content.keys() & set(WRAPPERS)  # a mean may stand beside the weights
    if tensors and (not found or (2 * tensors > len(content) and not wrapper)):
        found = {".".join(path): (*around, content)}
    return found


def wrapper_rank(key: str) -> tuple[int, ...]:
    """Return the places of a key's parts among WRAPPERS; those that are not there come last."""
    parts = key.split(".") if key else []
    return tuple(WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts)


def bare_names(state: Mapping[Any, Any]) -> Set[str]:
    """Return the names of a state dict without their prefixes."""
    return prefix_levels(map(str, state))[-1].keys()


def alike(own: Set[str], other: Mapping[Any, Any]) -> bool:
    """Return whether a state dict shares names with another, as those of one network do.

    Averages of weights may have other prefixes, and no buffers.
    """
    return 4 * len(own & bare_names(other)) >= len(own)


def lists_alike(
    content: Any, state: Mapping[Any, Tensor], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the keys of lists of tensors like those of a state dict, such as averages of them."""
    if isinstance(content, Mapping) and len(path) <= MOST_LEVELS:
        for name, value in content.items():
            yield from lists_alike(value, state, (*path, str(name)))
    elif isinstance(content, (list, tuple)) and 4 * len(content) >= len(state):
        shapes = {tensor.shape for tensor in state.values()}
        if content and all(isinstance(t, Tensor) and t.shape in shapes for t in content):
            yield ".".join(path)


def check_tensors(state: Mapping[Any, Any], path: Path) -> None:
    """Raise CheckpointError for anything but finite plain tensors with names."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is {type(value).__name__}, not a named tensor",
                "needed: state_dict(), bare or under 'model'",
            )
        if not is_dense(value) or value.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} is {value.dtype}, {value.layout}",
                "needed: plain tensors of real numbers, as float32",
            )
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity", "train it anew")


# --- The names of the tensors ---


class Reading(NamedTuple):
    """A state dict with names of the network, a normalisation of pixels before it, and notes."""

    state: dict[str, Tensor]
    normalisation: tuple[Tensor, Tensor] | None
    notes: list[str]


def prefix_levels(names: Iterable[str]) -> list[Names]:
    """Return the names as they are, then with one prefix less at a time.

    A prefix is what all names begin with, but for a normalisation and a counter of averages. Two
    names never become one.
    """
    levels = [{name: name for name in names}]
    while len(levels) <= MOST_LEVELS:
        parts = {n: n.partition(".") for n in levels[-1] if not APART.fullmatch(n)}
        if len({prefix for prefix, _, _ in parts.values()}) != 1:
            break
        less = {(parts[n][2] if n in parts else n): given for n, given in levels[-1].items()}
        if "" in less or len(less) < len(levels[-1]):
            break
        levels.append(less)
    return levels


def of_pixels(name: str) -> bool:
    """Return whether a name is that of a normalisation of the pixels."""
    return bool(MEAN.fullmatch(name) or STD.fullmatch(name))


def adapt(names: Names, raw: Mapping[str, Tensor], own: Set[str]) -> Reading:
    """Change the names of a state dict towards the names `own`, which stay as they are.

    Leaves out unused tensors, takes a normalisation out, renames shortcuts, adds counters.
    """
    notes, names = [], dict(names)
    foreign = [name for name in names if name not in own]
    if unused := [name for name in foreign if UNUSED in name]:
        notes.append(f"left out {len(unused)} tensors {UNUSED}*, which no forward uses")
    if AVERAGED in foreign:
        notes.append(f"{AVERAGED} left out: a counter of averaged weights")
        unused.append(AVERAGED)
    for name in unused:
        del names[name]
    ends = [
        next((n for n in foreign if kind.fullmatch(n) and is_of_channels(raw[names[n]])), "")
        for kind in (MEAN, STD)
    ]
    normalisation = None
    if all(ends) and {"mean", "std"} <= own - names.keys():  # the network normalises, itself
        names |= {new: names.pop(end) for new, end in zip(("mean", "std"), ends, strict=True)}
    elif all(ends):
        normalisation = raw[names.pop(ends[0])], raw[names.pop(ends[1])]
    if stripped := sorted((i, n) for n, i in names.items() if i.endswith(f".{n}")):
        notes.append(f"prefixes removed from {len(stripped)} names, such as {stripped[0][0]}")
    shortcuts = [name for name in foreign if SHORTCUT in name and torchvision_name(name) in own]
    if shortcuts and not names.keys() & set(map(torchvision_name, shortcuts)):
        names |= {torchvision_name(name): names.pop(name) for name in shortcuts}
        notes.append(f"{len(shortcuts)} tensors of shortcuts, which torchvision calls downsample")
    state = {name: raw[in_file] for name, in_file in names.items()}
    missing = {name for name in own - state.keys() if not of_pixels(name)}
    if missing and all(name.endswith(COUNTER) for name in missing):
        state |= dict.fromkeys(missing, torch.tensor(0))
        notes.append(f"{len(missing)} counters of batch norms are not in it, and set to 0")
    if normalisation:
        notes.append("its normalisation of the pixels is put before the network")
    elif stripped and not any(map(of_pixels, names)):
        notes += describe_first_layer(stripped[0][0].removesuffix(stripped[0][1]))
    return Reading(state, normalisation, notes)


def describe_first_layer(prefix: str) -> list[str]:
    """Describe in a line what a prefix says of layers without tensors before a network."""
    if not re.search(r"(^|\.)[1-9]\d*\.$", prefix):
        return []
    return [
        f"a nn.Sequential has no tensors before {prefix!r}: if it normalises the pixels there, its "
        "network needs a factory"
    ]


def is_of_channels(tensor: Tensor) -> bool:
    """Return whether a tensor may be a value of each channel of grey or RGB images."""
    return tensor.numel() in (1, 3) and tensor.is_floating_point()


def torchvision_name(name: str) -> str:
    """Return the name of a tensor where shortcuts are named as in torchvision."""
    return name.replace(SHORTCUT, DOWNSAMPLE)


def read_names(raw: Mapping[str, Tensor], own: Set[str]) -> Reading:
    """Return the first reading of a state dict with exactly the names `own`, else the nearest."""
    readings = [adapt(names, raw, own) for names in prefix_levels(raw)]
    fitting = (reading for reading in readings if fits(reading.state, own))
    return next(fitting, max(readings, key=lambda reading: len(reading.state.keys() & own)))


def fits(state: Mapping[str, Tensor], own: Set[str]) -> bool:
    """Return whether a state dict has the names `own`; their normalisation may be missing."""
    return state.keys() <= own and all(map(of_pixels, own - state.keys()))


def complete(reading: Reading, own: Mapping[str, Tensor]) -> Reading:
    """Give the normalisation that a network has itself its shape, or the network's own values."""
    state, notes = dict(reading.state), list(reading.notes)
    for name, tensor in own.items():
        if of_pixels(name) and name not in state:
            state[name] = tensor
            notes.append(f"{name!r} of the pixels is not in it: the network's own is kept")
        elif of_pixels(name) and state[name].numel() == tensor.numel():
            state[name] = state[name].reshape(tensor.shape)
    return Reading(state, reading.normalisation, notes)


# --- What is stated around a state dict: names of classes, the shape of the images ---


def stated_classes(around: Iterable[Mapping[Any, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of classes stated around a state dict, in order, and notes.

    The first ones count; there may be none. Notes say what is not read.
    """
    stated = [(key, outer[key]) for outer in around for key in CLASSES if key in outer]
    read = [(key, names) for key, value in stated if (names := in_order(value))]
    notes = [
        f"{key!r} is not read: names of classes are a list, or numbered from 0"
        for key, value in stated
        if value is not None and not in_order(value)
    ]
    if not read:
        return (), notes
    first, classes = read[0]
    notes += [f"classes are read from {first!r}, {k!r} has others" for k, n in read if n != classes]
    return classes, notes


def in_order(names: Any) -> tuple[str, ...]:
    """Return names that are listed or numbered from 0, in order; empty for anything else."""
    if isinstance(names, np.ndarray):
        names = names.tolist()
    if isinstance(names, Mapping):
        pairs = [(a, b) if isinstance(b, str) else (b, a) for a, b in names.items()]
        if not all(isinstance(n, (int, np.integer)) for n, _ in pairs):
            return ()
        pairs.sort()
        if [n for n, _ in pairs] != list(range(len(pairs))):
            return ()
        names = [name for _, name in pairs]
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        return ()
    return tuple(map(str, names))


def stated_image_shape(around: Iterable[Mapping[Any, Any]]) -> tuple[int, ...]:
    """Return the shape of the training images stated around a state dict; empty if there is none."""
    for outer in around:
        shape = outer.get("image_shape")
        if isinstance(shape, (list, tuple)) and len(shape) == 3:
            valid = all(type(length) is int and length > 0 for length in shape)
            return tuple(shape) if valid else ()
    return ()
