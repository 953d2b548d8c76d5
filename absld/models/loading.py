"""Networks from a name, a file of weights, a run directory or a factory.

State dicts of others come wrapped and with prefixes; notes say what was stripped or left out.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from absld.config.files import HUB
from absld.config.imports import import_object, names_code
from absld.errors import CheckpointError, Stopped, UsageError
from absld.models.architectures import MODELS, Normalised, build_model, seeded
from absld.models.hub import fetch
from absld.models.state_dicts import find_state_dict, read_names, stated_classes, stated_image_shape
from absld.progress import SILENT, Observer
from absld.seeding import Key
from absld.storage.checkpoint import load
from absld.storage.run_directory import RunDirectory

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMES_ALONE = "which tell nothing of activations, their order, or the scale of the pixels"


class Network(NamedTuple):
    """A network, its architecture (a name or package.module:factory), and notes on its loading.

    classes: their names in the order of the logits, and image_shape: (channels, height, width) of
    the training images, where a file or run states them. hub: where a file from a hub comes from.
    """

    model: nn.Module
    architecture: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, ...] = ()
    hub: Mapping[str, str] | None = None


def load_network(
    target: str,
    num_classes: int,
    key: Key,
    architecture: str = "",
    weights: str = "",
    observer: Observer = SILENT,
) -> Network:
    """Load the network that `target` means.

    Args:
        target: a name of `absld.models.architectures.MODELS`; `package.module:factory`, also of the
            current folder; a run directory; a file of weights; or one on the Hugging Face Hub,
            hf:owner/name[@revision][/file], which is downloaded unless it is in the cache.
        num_classes: number of logits.
        key: of the initial weights, where `target` brings none.
        architecture: the network of a file or run, if it is a factory, or if the file states none
            and its names and shapes are not those of a known network. A name that a file states
            is not imported.
        weights: key of the state dict in a file, if it has several.
        observer: of a download.

    Raises:
        UsageError: `target` means nothing, or its factory fails.
        CheckpointError: a file cannot be loaded, or does not fit the network.
    """
    if target not in MODELS and os.path.exists(target):
        of_run = os.path.isdir(target)
        path = RunDirectory(target).best if of_run else Path(target)
        content = load(path, sealed=of_run)
        return load_weights(content, path, num_classes, key, architecture, weights)
    if target.startswith(HUB):
        found = fetch(target, observer)
        path = Path(str(found.name))  # for messages
        network = load_weights(found.read(), path, num_classes, key, architecture, weights)
        return network._replace(notes=(*found.notes, *network.notes), hub=found.origin)
    if target in MODELS or names_code(target):
        if weights:
            raise UsageError(
                f"{target} is not a file: it has no state dict {weights!r}",
                "leave out the flag that names it, or give the file",
            )
        return Network(build_network(target, num_classes, key), target)
    if target.endswith((".pt", ".pth", ".pkl", ".tar", ".bin")) or os.sep in target:
        raise CheckpointError(f"{target}: no such file", "check the path")
    raise UsageError(
        f"{target!r} is not a known network, a file or a run directory",
        f"there are: {', '.join(MODELS)}, files, run directories, hf:owner/name, and "
        "package.module:factory",
    )


def build_network(name: str, num_classes: int, key: Key) -> nn.Module:
    """Build the network of a known name or of `package.module:factory`. Raises UsageError."""
    if names_code(name) and name not in MODELS:
        return build_from_factory(name, num_classes, key)
    return build_model(name, num_classes, *key)


def build_from_factory(target: str, num_classes: int, key: Key) -> nn.Module:
    """Build the network of `package.module:factory`. Raises UsageError."""
    factory = import_object(target)
    try:
        call = bind_classes(factory, num_classes)
        model = seeded(lambda: factory(*call.args, **call.kwargs), key) if call else None
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        raise UsageError(
            f"{target}: {type(error).__name__}: {error}", "needed: package.module:factory"
        ) from error
    if call is None:
        raise UsageError(
            f"{target} takes {inspect.signature(factory)}: no place for the number of classes",
            "needed: a parameter num_classes, a first one without default, or none at all",
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} returned {type(model).__name__}", "needed: an nn.Module")
    return model


def bind_classes(factory: Any, num_classes: int) -> inspect.BoundArguments | None:
    """Return the arguments of a factory: the number of classes where it belongs, or nothing.

    It goes by name into num_classes or **kwargs. Only where there is neither, it goes into a first
    parameter without default: a first one with a default may be `pretrained`, and a number there
    would start a download. All others keep their defaults. None if it has no place.
    """
    signature = inspect.signature(factory)
    parameters = list(signature.parameters.values())
    if not parameters:
        return signature.bind()
    first = parameters[0]
    takes_name = [p for p in parameters if p.name == "num_classes" or p.kind is p.VAR_KEYWORD]
    with contextlib.suppress(TypeError):
        required = first.default is first.empty and first.kind in POSITIONAL
        if required and takes_name in ([], [first]):
            return signature.bind(num_classes)
        return signature.bind(num_classes=num_classes)
    return None


def load_weights(
    content: Any, path: Path, num_classes: int, key: Key, architecture: str, weights: str = ""
) -> Network:
    """Load the network of the content of a file of weights. Raises CheckpointError."""
    raw, around, left_out = find_state_dict(content, path, weights)
    name, how = choose_architecture(around, raw, path, architecture)
    model = build_network(name, num_classes, key)
    reading = read_names(raw, model.state_dict().keys())
    load_state(model, reading.state, path)
    if reading.normalisation:
        model = Normalised(model, *reading.normalisation)
    classes, of_classes = stated_classes(around)
    notes = [f"{path}: {note}" for note in (*left_out, *reading.notes, *how, *of_classes)]
    return Network(model, name, tuple(notes), classes, stated_image_shape(around))


def choose_architecture(
    around: Iterable[Mapping[Any, Any]], raw: Mapping[str, Tensor], path: Path, architecture: str
) -> tuple[str, list[str]]:
    """Return the architecture of a file, and notes if only names and shapes tell it.

    Raises CheckpointError if it is unknown, or if the file names code, which `architecture` does
    not: nothing that a file names is imported, and its network is not guessed instead.
    """
    texts = (outer.get("architecture") for outer in around)
    stated = next((text for text in texts if isinstance(text, str)), "")
    if architecture and architecture not in MODELS:
        return architecture, []  # a factory, chosen on purpose: it names its tensors as it likes
    if stated in MODELS:
        return stated, []
    if names_code(stated):
        raise refuse_named_code(str(path), stated, architecture)
    notes = [f"its architecture {stated[:60]!r} is not a known network"] if stated else []
    if name := recognise_architecture(raw):
        return name, [*notes, f"recognised as {name} by names and shapes, {NAMES_ALONE}"]
    if not architecture:
        raise CheckpointError(
            f"{path}: its network is unknown; {describe_nearest(raw) or 'no known one is near'}",
            f"known are {', '.join(MODELS)}; for others {type_model('package.module:factory')}",
        )
    return architecture, notes


def describe_nearest(raw: Mapping[str, Tensor], fitting: int = 0) -> str:
    """Describe the known network that shares most names with a file.

    Returns "" if it does not share more than `fitting` names.
    """
    states = {name: read_names(raw, state_shapes(name).keys()).state for name in MODELS}
    shared = {name: len(state_shapes(name).keys() & state.keys()) for name, state in states.items()}
    nearest = max(MODELS, key=lambda name: shared[name])
    if shared[nearest] <= fitting:
        return ""
    own, state = state_shapes(nearest).keys(), states[nearest].keys()
    missing, unexpected = sorted(own - state)[:5], sorted(state - own)[:5]
    return f"the nearest known network is {nearest} (missing {missing}, unexpected {unexpected})"


def type_model(name: str) -> str:
    """Return a hint: the flags that name a network."""
    return (
        f"type --model {name} (--teacher-model for a teacher, --against-model after --against; a "
        "student's file must be of a known network)"
    )


def refuse_named_code(target: str, name: str, instead: str = "") -> CheckpointError:
    """Build the error for a file or run that names code as its network.

    instead: the known network that the user named.
    """
    return CheckpointError(
        f"{target}: its network is {name!r}, and no name in a file is imported",
        f"if it is a {instead}, save its state dict alone; else "
        f"{type_model('package.module:factory')}"
        if instead
        else f"if you trust that code, {type_model(name)}",
    )


def recognise_architecture(raw: Mapping[str, Tensor]) -> str | None:
    """Return the known network with these names and shapes, but for the number of classes."""
    for name in MODELS:
        shapes = state_shapes(name)
        state = read_names(raw, shapes.keys()).state
        if state.keys() == shapes.keys() and all(
            state[key].shape[1:] == shape[1:] for key, shape in shapes.items()
        ):
            return name
    return None


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
        raise CheckpointError(
            f"{path}: missing {missing[:5]}, unexpected {unexpected[:5]}",
            describe_nearest(state, len(own.keys() & state.keys()))
            or "the file is damaged, or of another network",
        )
    for name, tensor in own.items():
        given = state[name]
        if tensor.shape != given.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(given.shape)}, needed is {tuple(tensor.shape)}",
                "the number of classes, or the network, is another",
            )
        if tensor.is_floating_point() and not given.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {given.dtype}, needed is {tensor.dtype}",
                "export the weights as floating-point numbers, not quantised",
            )
    model.load_state_dict(state)
    for name, tensor in own.items():  # which are the network's, filled now
        if tensor.dtype != state[name].dtype and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds numbers too large for {tensor.dtype}", "train it anew"
            )
