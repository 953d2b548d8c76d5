"""The files of a network in a repository of a hub: model.safetensors and config.json.

The keys of config.json are those of a checkpoint, so its network is loaded as that of one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from absld.models.hub_config import CONFIG, FORMAT, WEIGHTS
from absld.models.loading import Network, load_state, load_weights
from absld.models.state_dicts import find_state_dict
from absld.storage.checkpoint import load
from absld.storage.environment import version
from absld.storage.files import digest, replacing, write_text
from absld.storage.opening import make_folder
from absld.storage.safetensors_files import safetensors_bytes


def network_config(
    architecture: str,
    classes: Sequence[str],
    image_shape: Sequence[int],
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Describe a network in plain values, those of config.json.

    image_shape: (channels, height, width) of the training images. state: its state dict, in which
    `mean` and `std` beside `net.*` are its normalisation of the pixels.
    """
    others = state.keys() - {"mean", "std"}
    normalised = len(others) == len(state) - 2 and all(n.startswith("net.") for n in others)
    return {
        "format": FORMAT,
        "architecture": architecture,
        "classes": list(classes),
        "image_shape": list(image_shape),
        "normalisation": {name: state[name].flatten().tolist() for name in ("mean", "std")}
        if normalised
        else None,
        "sha256": digest(state),
        "absld": version("absld"),
    }


def write_network(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the weights and the description of a network into a folder."""
    make_folder(folder)
    with replacing(folder / WEIGHTS) as file:
        file.write(safetensors_bytes(state, {}))
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def read_network(
    config: Mapping[str, Any], weights: Path, model: nn.Module | None = None
) -> Network:
    """Load the network that a config.json describes.

    model: a network of the user's own for these weights; without it, the architecture must be one
    that is known by its name. Raises CheckpointError.
    """
    content = {**config, "model": load(weights)}
    if model is None:
        return load_weights(content, weights, len(config["classes"]), ("pretrained",), "")
    load_state(model, find_state_dict(content, weights).tensors, weights)
    classes, shape = tuple(config["classes"]), tuple(config["image_shape"])
    return Network(model, config["architecture"], (), classes, shape)
