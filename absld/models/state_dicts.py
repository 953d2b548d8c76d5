"""State dicts in files of weights, and the names of their tensors.

Files of others wrap them, put prefixes before the names, and have tensors more or fewer. Where the
network is known, its own names decide. Notes say what was changed.
"""

import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from absld.errors import CheckpointError
from absld.storage.files import digest

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema")  # the first one is read
PREFIXES = {"module", "model", "net", "_orig_mod"}
MOST_LEVELS = 5  # of wrappers, and of prefixes
# The shortcuts of published CIFAR ResNets, and of torchvision's blocks, which ours are made of.
SHORTCUT, DOWNSAMPLE = ".shortcut.", ".downsample."
UNUSED = "sub_block1."  # in the published TRADES teacher: a group that no forward uses
AVERAGED = "n_averaged"  # a counter of torch's AveragedModel
COUNTER = ".num_batches_tracked"  # of batch norms; files by old versions of torch have none
# The normalisation before the first layer in some networks, such as RobustBench's.
MEAN = re.compile(r"(normali[sz]er?\.)?(mu|mean)")
STD = re.compile(r"(normali[sz]er?\.)?(sigma|std)")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool)

Names = dict[str, str]
"""Names of tensors, each with its name in the file."""


# --- The state dict in a file ---


def find_state_dict(content: Any, path: Path, key: str = "") -> tuple[dict[str, Tensor], list[str]]:
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
    chosen = key or min(found, key=lambda name: ranks[name])
    if not key and len(found) > 1 and len(WRAPPERS) in ranks[chosen]:
        raise CheckpointError(
            f"{path}: holds the state dicts {listed(found)}", f"choose one: {flag(chosen)}"
        )
    state = found[chosen]
    check_tensors(state, path)
    stated = content.get("sha256")
    if stated is not None and not key and stated != digest(state):
        raise CheckpointError(
            f"{path}: its tensors have changed since their SHA-256 was taken",
            "copy it again from where it came from",
        )
    others = [name for name in found if name != chosen and alike(state, found[name])]
    notes = []
    if others:
        notes.append(f"{chosen!r} is read, {listed(others)} left out; to choose: {flag(others[0])}")
    return dict(state), notes


def flag(key: str) -> str:
    return f"--weights {key!r} (for a teacher: --teacher-weights)"


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def state_dicts(content: Any, path: tuple[str, ...] = ()) -> dict[str, Mapping[Any, Any]]:
    """Return the mappings that hold tensors, by the keys that lead to them, with dots between."""
    if not isinstance(content, Mapping) or len(path) > MOST_LEVELS:
        return {}
    found: dict[str, Mapping[Any, Any]] = {}
    for name, value in content.items():
        if isinstance(name, str):
            found |= state_dicts(value, (*path, name))
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    wrapper = found and content.keys() & set(WRAPPERS)  # a mean may stand beside the weights
    if tensors and (not found or (2 * tensors > len(content) and not wrapper)):
        found = {".".join(path): content}
    return found


def wrapper_rank(key: str) -> tuple[int, ...]:
    """Return the places of a key's parts among WRAPPERS; those that are not there come last."""
    parts = key.split(".") if key else []
    return tuple(WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts)


def alike(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    """Return whether two state dicts share names, as those of one network do.

    Averages of weights may have other prefixes, and no buffers.
    """
    of_a, of_b = (prefix_levels(map(str, state))[-1].keys() for state in (a, b))
    return 4 * len(of_a & of_b) >= len(of_a)


def check_tensors(state: Mapping[Any, Any], path: Path) -> None:
    """Raise CheckpointError for anything but finite plain tensors with names."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is {type(value).__name__}, not a named tensor",
                "needed: state_dict(), bare or under 'model'",
            )
        if not is_plain(value):
            raise CheckpointError(
                f"{path}: tensor {name} is {value.dtype}, {value.layout}",
                "needed: plain tensors of real numbers, as float32",
            )
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity", "train it anew")


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, in memory, and of an ordinary type."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return dense and tensor.dtype in DTYPES


# --- The names of the tensors ---


class Reading(NamedTuple):
    """A state dict with names of the network, a normalisation of pixels before it, and notes."""

    state: dict[str, Tensor]
    normalisation: tuple[Tensor, Tensor] | None
    notes: list[str]


def prefix_levels(names: Iterable[str]) -> list[Names]:
    """Return the names as they are, then with one prefix less at a time.

    A prefix is what all names begin with, or one of PREFIXES. Two names never become one.
    """
    levels = [{name: name for name in names}]
    while len(levels) <= MOST_LEVELS:
        first = {name.partition(".")[0] for name in levels[-1]}
        prefixes = first if len(first) == 1 else first & PREFIXES
        less = {}
        for name, in_file in levels[-1].items():
            prefix, _, rest = name.partition(".")
            less[rest if rest and prefix in prefixes else name] = in_file
        if less.keys() == levels[-1].keys() or len(less) < len(levels[-1]):
            break
        levels.append(less)
    return levels


def adapt(names: Names, raw: Mapping[str, Tensor], own: Set[str]) -> Reading:
    """Change the names of a state dict towards the names `own`, which stay as they are.

    Leaves out unused tensors, takes a normalisation out, renames shortcuts, adds counters.
    """
    notes, names = [], dict(names)
    foreign = [name for name in names if name not in own]
    if unused := [name for name in foreign if UNUSED in name]:
        notes.append(f"{len(unused)} tensors {UNUSED}* left out: no forward uses them")
    if AVERAGED in foreign:
        notes.append(f"{AVERAGED} left out: a counter of averaged weights")
        unused.append(AVERAGED)
    for name in unused:
        del names[name]
    ends = [
        next((n for n in foreign if kind.fullmatch(n) and raw[names[n]].numel() == 3), "")
        for kind in (MEAN, STD)
    ]
    normalisation = None
    if all(ends):
        normalisation = raw[names.pop(ends[0])], raw[names.pop(ends[1])]
    if stripped := sorted(in_file for name, in_file in names.items() if name != in_file):
        notes.append(f"{len(stripped)} tensors without their prefix, such as {stripped[0]}")
    shortcuts = [name for name in foreign if SHORTCUT in name and torchvision_name(name) in own]
    if shortcuts and not names.keys() & set(map(torchvision_name, shortcuts)):
        names |= {torchvision_name(name): names.pop(name) for name in shortcuts}
        notes.append(f"{len(shortcuts)} tensors of shortcuts, which torchvision calls downsample")
    state = {name: raw[in_file] for name, in_file in names.items()}
    missing = own - state.keys()
    if missing and all(name.endswith(COUNTER) for name in missing):
        state |= dict.fromkeys(missing, torch.tensor(0))
        notes.append(f"{len(missing)} counters of batch norms are not in it, and set to 0")
    if normalisation:
        notes.append("its normalisation of the pixels is put before the network")
    return Reading(state, normalisation, notes)


def torchvision_name(name: str) -> str:
    """Return the name of a tensor where shortcuts are named as in torchvision."""
    return name.replace(SHORTCUT, DOWNSAMPLE)


def read_names(raw: Mapping[str, Tensor], own: Set[str]) -> Reading:
    """Return the first reading of a state dict with exactly the names `own`, else the nearest."""
    readings = [adapt(names, raw, own) for names in prefix_levels(raw)]
    fitting = (reading for reading in readings if reading.state.keys() == own)
    return next(fitting, max(readings, key=lambda reading: len(reading.state.keys() & own)))


def stated_classes(content: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the names of classes that a file states, in order; empty if it states none."""
    numbers = content.get("class_to_idx")  # torchvision's ImageFolder has it
    by_number: Any = ()
    if isinstance(numbers, Mapping) and all(isinstance(n, int) for n in numbers.values()):
        by_number = sorted(numbers, key=numbers.__getitem__)
    for names in (content.get("classes"), content.get("class_names"), by_number):
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return tuple(names)
    return ()
