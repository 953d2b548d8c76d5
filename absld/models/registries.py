"""Networks of other libraries by name: `timm:NAME` and `torchvision:NAME`.

The names are looked up in the libraries' own registries: they may stand in files, for nothing that
they mean is imported or read. Weights are downloaded only where `pretrained` is asked for.
"""

import re
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from absld.config.imports import REGISTRIES, import_extra
from absld.errors import AbsldError, Stopped, UsageError
from absld.models.layers import Normalised, for_channels

OF_TIMM, OF_TORCHVISION = REGISTRIES
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std, for torchvision's weights
# Arguments of torchvision's builders that no signature shows, by the beginning of their names.
SIZED = {"vit_": "image_size", "maxvit_": "input_size"}
ONE_HEAD = ("googlenet", "inception_v3")  # else they return several logits in train mode


def build_from_registry(
    target: str, num_classes: int, image_shape: tuple[int, int, int], *, pretrained: bool = False
) -> tuple[nn.Module, list[str]]:
    """Build the network that `target` names, and notes on its pretrained weights.

    pretrained: load the weights that the library has for it, and put their normalisation of the
    pixels before it. Raises UsageError.
    """
    build = timm_network if target.startswith(OF_TIMM) else torchvision_network
    name = target.partition(":")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults of weights, which are not used
            return build(name, num_classes, image_shape, pretrained)
    except (AbsldError, Stopped):
        raise
    except Exception as error:  # whatever the library raises
        hint = f"it is to take images of {'x'.join(map(str, image_shape))}"
        if pretrained:
            hint = "leave out --pretrained, which downloads weights, to train from random ones; or --image-size N"
        raise UsageError(f"{target}: {type(error).__name__}: {error}", hint) from error


def check_pretrained(targets: Sequence[str]) -> None:
    """Raise UsageError if no network is one that pretrained weights can be asked for."""
    if not any(target.startswith(REGISTRIES) for target in targets):
        raise UsageError(
            f"there are no pretrained weights for {' and '.join(dict.fromkeys(targets))}",
            "--pretrained is for timm:NAME and torchvision:NAME",
        )


def timm_network(
    name: str, num_classes: int, image_shape: tuple[int, int, int], pretrained: bool
) -> tuple[nn.Module, list[str]]:
    """Build a network of timm; see `build_from_registry`."""
    timm = import_extra("timm", "timm", f"{OF_TIMM}{name}")
    architecture, _, tag = name.partition(".")
    # Not timm's own parser, which also takes a place on a hub or in a folder.
    if not re.fullmatch(r"[\w.]+", name) or not timm.is_model(architecture):
        raise unknown(OF_TIMM, name, timm.list_models())
    if tag and name not in (with_weights := timm.list_pretrained(f"{architecture}.*")):
        raise unknown(OF_TIMM, name, with_weights, near=0.0)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    channels, *size = image_shape
    sized: dict[str, Any] = {}
    if config and config.fixed_input_size:
        sized["img_size"] = tuple(size)
    net: Any = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **sized
    )
    if not pretrained:
        return net, []
    described = f"timm's weights {net.pretrained_cfg['architecture']}.{net.pretrained_cfg['tag']}"
    of_pixels = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    return normalised(net, of_pixels, channels), [
        f"{OF_TIMM}{name}: {described}, with a new last layer; {describe_pixels(channels)}"
    ]


def torchvision_network(
    name: str, num_classes: int, image_shape: tuple[int, int, int], pretrained: bool
) -> tuple[nn.Module, list[str]]:
    """Build a network of torchvision; see `build_from_registry`."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown(OF_TORCHVISION, name, known)
    channels, *size = image_shape
    options: dict[str, Any] = {"aux_logits": False} if name in ONE_HEAD else {}
    for begin, option in SIZED.items():
        if name.startswith(begin):
            if size[0] != size[1]:
                raise ValueError("its images must be square")
            options[option] = size[0] if option == "image_size" else tuple(size)
    if not pretrained:
        net = models.get_model(name, weights=None, num_classes=num_classes, **options)
        take_channels(net, channels)
        return net, []
    weights = models.get_model_weights(name).DEFAULT
    net = models.get_model(name, weights=weights, **options)
    replace_head(net, len(weights.meta["categories"]), num_classes)
    take_channels(net, channels)
    return normalised(net, IMAGENET, channels), [
        f"{OF_TORCHVISION}{name}: torchvision's weights {weights}, with a new last layer for "
        f"{num_classes} classes; {describe_pixels(channels)}"
    ]


def unknown(registry: str, name: str, known: Sequence[str], near: float = 0.6) -> UsageError:
    """Return the error for a name that is not in a registry, with known names that are near.

    near: the least similarity, from 0 to 1.
    """
    library = registry.rstrip(":")
    alike = [registry + other for other in get_close_matches(name, known, n=3, cutoff=near)]
    hint = f"needed: a network for images that {library} lists, not a place on a hub or a disk"
    if alike:
        hint = f"did you mean {' or '.join(alike)}?"
    return UsageError(f"{library} has no network {name!r}", hint)


def take_channels(net: nn.Module, channels: int) -> None:
    """Replace the first convolution if the images are not RGB.

    It gets the sum of its weights over the channels, shared out among the new ones: a grey image
    then gives what its RGB copy gave.
    """
    if channels == 3:
        return
    conv = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels != 3 or conv.groups != 1:
        raise ValueError(f"its first convolution takes {conv.in_channels} channels, not 3")
    weight = conv.weight.detach().sum(1, keepdim=True) / channels
    conv.weight = nn.Parameter(weight.repeat(1, channels, 1, 1))
    conv.in_channels = channels


def replace_head(net: nn.Module, classes: int, num_classes: int) -> None:
    """Replace the last layer that gives `classes` values by a new one. Raises ValueError."""
    heads = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == classes
    ]
    if not heads:
        raise ValueError("its last layer is not a linear one")
    name, head = heads[-1]
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(head.in_features, num_classes)
    else:
        new = nn.Conv2d(head.in_channels, num_classes, 1)
    net.set_submodule(name, new)


def normalised(
    net: nn.Module, of_pixels: tuple[Sequence[float], Sequence[float]], channels: int
) -> Normalised:
    """Put a normalisation before a network; of images that are not RGB its average."""
    mean, std = (torch.tensor(values) for values in of_pixels)
    return Normalised(net, *(for_channels(values, channels) for values in (mean, std)))


def describe_pixels(channels: int) -> str:
    of_grey = "" if channels == 3 else ", averaged over the channels,"
    return f"their normalisation of the pixels{of_grey} is put before the network"
