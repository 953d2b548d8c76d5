"""Networks from a name, a library's registry, a file of weights, a run directory or a factory.

State dicts of others come wrapped and with prefixes; notes say what was stripped or left out.
"""

import contextlib
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from absld.config.imports import HUB, REGISTRIES, import_object, names_code
from absld.errors import CheckpointError, Stopped, UsageError
from absld.models.architectures import (
    KNOWN,
    SMALL_RGB,
    Shape,
    build_exactly,
    find_model,
    name_for,
    seeded,
)
from absld.models.fitting import check_fit, load_state
from absld.models.hub import fetch
from absld.models.layers import Normalised
from absld.models.recognition import describe_nearest, has_shapes_of, recognise_architecture
from absld.models.registries import build_from_registry
from absld.models.state_dicts import (
    complete,
    find_state_dict,
    read_names,
    stated_classes,
    stated_image_shape,
)
from absld.progress import SILENT, Observer
from absld.seeding import Key
from absld.storage.checkpoint import load
from absld.storage.run_directory import RunDirectory

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMES_ALONE = "which tell nothing of activations, their order, or the scale of the pixels"
CHANNELS = ("in_channels", "in_chans", "num_channels")  # parameters of factories
SIZES = ("img_size", "image_size")


class Network(NamedTuple):
    """A network that was loaded, and what its file or run states about it.

    Attributes:
        model: from images in [0,1] to logits (N,C).
        architecture: a name, or package.module:factory.
        notes: on its loading, in lines.
        classes: their names in the order of the logits, where they are stated.
        image_shape: (channels, height, width) of the training images, where it is stated.
        hub: where a file from a hub comes from.
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
    *,
    image_shape: Shape = SMALL_RGB,
    pretrained: bool = False,
    observer: Observer = SILENT,
) -> Network:
    """Load the network that `target` means.

    Args:
        target: a known name (see `absld.models.architectures`); `timm:NAME`, `torchvision:NAME`;
            `package.module:factory`, also of the current folder; a run directory; a file of
            weights; or one on the Hugging Face Hub, `hf:owner/name[@revision][/file]`, which is
            downloaded unless it is in the cache.
        num_classes: number of logits.
        key: of the initial weights, where `target` brings none.
        architecture: the network of a file or run, if it is a factory or of a library, or if the
            file states none and its names and shapes are not those of a known network, or of
            several. A name of code that a file states is not imported.
        weights: key of the state dict in a file, if it has several.
        image_shape: channels, height and width of the images.
        pretrained: download the weights that timm or torchvision has for a network of theirs.
        observer: of a download.

    Raises:
        UsageError: `target` means nothing, or its factory fails.
        CheckpointError: a file cannot be loaded, or does not fit the network.
    """
    name = name_for(target, image_shape)
    named = is_named(name)
    if not named and os.path.exists(target):
        of_run = os.path.isdir(target)
        path = RunDirectory(target).best if of_run else Path(target)
        if of_run and not path.exists():
            raise CheckpointError(
                f"{path}: no such file", "needed: a run directory in which an epoch is finished"
            )
        content = load(path, sealed=of_run)
        return load_weights(content, path, num_classes, key, architecture, weights, image_shape)
    if target.startswith(HUB):
        found = fetch(target, observer)
        path = Path(str(found.name))  # for messages
        network = load_weights(
            load(found.path), path, num_classes, key, architecture, weights, image_shape
        )
        return network._replace(notes=(*found.notes, *network.notes), hub=found.origin)
    if named or names_code(target):
        if weights:
            raise UsageError(
                f"{target} is not a file: it has no state dict {weights!r}",
                "leave out the flag that names it, or give the file",
            )
        model, notes = build_network(name, num_classes, key, image_shape, pretrained)
        return Network(model, name, tuple(notes))
    raise unknown_target(target)


def brings_weights(target: str, image_shape: Shape) -> bool:
    """Return whether `load_network` loads trained weights of `target`: a file, a run or of a hub.

    Those that timm or torchvision has for a network of theirs do not count.
    """
    file = not is_named(name_for(target, image_shape)) and os.path.exists(target)
    return file or target.startswith(HUB)


def unknown_target(target: str) -> UsageError | CheckpointError:
    """Build the error for a text that names no network."""
    if target.endswith((".pt", ".pth", ".pkl", ".tar", ".bin")) or os.sep in target:
        return CheckpointError(f"{target}: no such file", "check the path")
    return UsageError(
        f"{target!r} is not a known network, a file or a run directory",
        f"there are: {', '.join(KNOWN)}, timm:NAME, torchvision:NAME, files, run directories, "
        "hf:owner/name, and package.module:factory",
    )


def is_named(name: str) -> bool:
    """Return whether a text names a network that is built without somebody's code or weights."""
    return name.startswith(REGISTRIES) or find_model(name) is not None


def build_network(
    name: str, num_classes: int, key: Key, image_shape: Shape, pretrained: bool = False
) -> tuple[nn.Module, list[str]]:
    """Build the network of exactly this name, a library's or `package.module:factory`, and notes.

    Raises UsageError.
    """
    if name.startswith(REGISTRIES):
        return seeded(
            lambda: build_from_registry(name, num_classes, image_shape, pretrained=pretrained), key
        )
    if names_code(name):
        return build_from_factory(name, num_classes, key, image_shape), []
    return build_exactly(name, num_classes, image_shape[0], key), []


def build_from_factory(target: str, num_classes: int, key: Key, image_shape: Shape) -> nn.Module:
    """Build the network of `package.module:factory`. Raises UsageError."""
    factory = import_object(target)
    try:
        call = bind_arguments(factory, num_classes, image_shape)
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


def bind_arguments(
    factory: Any, num_classes: int, image_shape: Shape
) -> inspect.BoundArguments | None:
    """Return the arguments of a factory: the number of classes where it belongs, or nothing.

    It goes by name into num_classes or **kwargs. Only where there is neither, it goes into a first
    parameter without default: a first one with a default may be `pretrained`, and a number there
    would start a download. The channels and the size of the images go into parameters of the names
    CHANNELS and SIZES; those for channels keep a default where the images are RGB. All others keep
    their defaults. None if the number has no place.
    """
    signature = inspect.signature(factory)
    parameters = list(signature.parameters.values())
    of_images = arguments_of_images(parameters, image_shape)
    parameters = [p for p in parameters if p.name not in of_images]
    if not parameters:
        return signature.bind(**of_images)
    first = parameters[0]
    takes_name = [p for p in parameters if p.name == "num_classes" or p.kind is p.VAR_KEYWORD]
    with contextlib.suppress(TypeError):
        required = first.default is first.empty and first.kind in POSITIONAL
        if required and takes_name in ([], [first]):
            if first.kind is first.POSITIONAL_ONLY:
                return signature.bind(num_classes, **of_images)
            return signature.bind(**{first.name: num_classes}, **of_images)
        return signature.bind(num_classes=num_classes, **of_images)
    return None


def arguments_of_images(
    parameters: Iterable[inspect.Parameter], image_shape: Shape
) -> dict[str, Any]:
    """Return the arguments of a factory that say which images its network is for."""
    channels, height, width = image_shape
    size = height if height == width else (height, width)
    values: dict[str, Any] = dict.fromkeys(CHANNELS, channels) | dict.fromkeys(SIZES, size)
    return {
        p.name: values[p.name]
        for p in parameters
        if p.name in values
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.default is p.empty or p.name in SIZES or channels != 3)
    }


def load_weights(
    content: Any,
    path: Path,
    num_classes: int,
    key: Key,
    architecture: str = "",
    weights: str = "",
    image_shape: Shape = SMALL_RGB,
) -> Network:
    """Load the network of the content of a file of weights. Raises CheckpointError."""
    raw, around, left_out = find_state_dict(content, path, weights)
    stated = stated_image_shape(around)
    if len(stated) == 3:  # some networks have weights of the size of their images
        image_shape = (image_shape[0], *stated[1:])
    name, how = choose_architecture(around, raw, path, architecture, image_shape)
    # A file can name a network much larger than it: no memory is taken yet.
    own = state_without_memory(name, num_classes, key, image_shape) if is_named(name) else None
    if own:
        check_fit(own, complete(read_names(raw, own.keys()), own).state, path)
    model, _ = build_network(name, num_classes, key, image_shape)
    own = model.state_dict()
    reading = complete(read_names(raw, own.keys()), own)
    load_state(model, reading.state, path)
    if reading.normalisation:
        model = Normalised(model, *reading.normalisation)
    classes, of_classes = stated_classes(around)
    notes = [f"{path}: {note}" for note in (*left_out, *reading.notes, *how, *of_classes)]
    return Network(model, name, tuple(notes), classes, stated)


def choose_architecture(
    around: Iterable[Mapping[Any, Any]],
    raw: Mapping[str, Tensor],
    path: Path,
    architecture: str,
    image_shape: Shape,
) -> tuple[str, list[str]]:
    """Return the architecture of a file, and notes if only names and shapes tell it.

    Raises CheckpointError if it is unknown, or if the file names code, which `architecture` does
    not: nothing that a file names is imported, and its network is not guessed instead.
    """
    texts = (outer.get("architecture") for outer in around)
    stated = next((text for text in texts if isinstance(text, str)), "")
    typed = name_for(architecture, image_shape)
    if architecture and not find_model(typed):
        return architecture, []  # a factory, chosen on purpose: it names its tensors as it likes
    if is_named(stated):
        return stated, []
    if names_code(stated):
        raise refuse_named_code(str(path), stated, architecture)
    notes = [f"its architecture {stated[:60]!r} is not a known network"] if stated else []
    if architecture and has_shapes_of(typed, raw):  # of several with these names
        name: str | None = typed
    else:
        name = recognise_architecture(raw)
    if name:
        return name, [*notes, f"recognised as {name} by names and shapes, {NAMES_ALONE}"]
    if not architecture:
        raise CheckpointError(
            f"{path}: its network is unknown; {describe_nearest(raw) or 'no known one is near'}",
            f"{type_model('package.module:factory, the function that builds it')}; known are "
            f"{', '.join(KNOWN)}",
        )
    return typed, notes


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


def state_without_memory(
    name: str, num_classes: int, key: Key, image_shape: Shape
) -> dict[str, Tensor] | None:
    """Return names and shapes of a network's weights, as a state dict on the meta device.

    None for the networks of torchvision that read numbers while they are built, the RegNets.
    """
    try:
        with torch.device("meta"):
            return build_network(name, num_classes, key, image_shape)[0].state_dict()
    except UsageError as error:
        if isinstance(error.__cause__, NotImplementedError):
            return None
        raise
