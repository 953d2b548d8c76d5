"""Names of classes and shapes of images: those that a network was trained on, and the data's."""

import re
from collections.abc import Sequence

from absld.config.datasets import ClassOrder
from absld.data.dataset import ImageSet
from absld.errors import CheckpointError
from absld.models.loading import Network

MOST = 20  # names in a message
WORDNET_ID = re.compile(r"n[0-9]{8}(?= |$)")  # a class of ImageNet, whatever words follow it


def check_class_names(network: Network, data: ImageSet, name: str, order: ClassOrder) -> Network:
    """Return the network, with a note if its classes are read by position.

    Raises CheckpointError if it states other classes than those of `data`, or another order of
    them, and `order` is "by-name": its logits would be read as those of other classes.
    """
    if not network.classes or identify(network.classes) == identify(data.classes):
        return network
    of_network, of_data = list_difference(network.classes, data.classes)
    if order == "by-name":
        raise CheckpointError(
            f"{name}: its classes are {of_network}; those of the data are {of_data}",
            "needed: the same classes in the same order, or --class-order by-position",
        )
    note = f"{name}: its classes {of_network} are read by position as {of_data}"
    return network._replace(notes=(*network.notes, note))


def identify(classes: Sequence[str]) -> list[str]:
    """Return what tells classes apart: the WordNet id where a name begins with one, else the name."""
    found = [WORDNET_ID.match(name) for name in classes]
    return [match[0] if match else name for match, name in zip(found, classes, strict=True)]


def check_image_shape(
    network: Network, data: ImageSet, name: str, *, refuse: bool = False
) -> Network:
    """Return the network, with a note if it was trained on images of another shape.

    Raises CheckpointError instead if `refuse`: the size of the images was not chosen.
    """
    trained, given = ("x".join(map(str, s)) for s in (network.image_shape, data.image_shape))
    if trained in ("", given):
        return network
    note = f"{name}: trained on images of {trained}; those of the data are {given}"
    if refuse:
        raise CheckpointError(
            note, f"--image-size {network.image_shape[1]}, or type the size that you mean"
        )
    return network._replace(notes=(*network.notes, note))


def list_difference(a: Sequence[str], b: Sequence[str]) -> tuple[str, str]:
    """Return two lists of names as text; of long ones only the first names that differ."""
    if max(len(a), len(b)) <= MOST:
        return str(list(a)), str(list(b))
    places = [k for k in range(max(len(a), len(b))) if a[k : k + 1] != b[k : k + 1]]
    texts = (", ".join(f"{k}: {x[k]!r}" for k in places[:MOST] if k < len(x)) for x in (a, b))
    first, second = (f"[{text}, ...] ({len(x)})" for text, x in zip(texts, (a, b), strict=True))
    return first, second
