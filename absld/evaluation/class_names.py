"""Names of classes: those that a network was trained on, and those of the images."""

from collections.abc import Sequence

from absld.config.settings import ClassOrder
from absld.data.dataset import ImageSet
from absld.errors import CheckpointError
from absld.models.loading import Network

MOST = 20  # names in a message


def check_class_names(network: Network, data: ImageSet, name: str, order: ClassOrder) -> Network:
    """Return the network, with a note if its classes are read by position.

    Raises CheckpointError if it states other classes than those of `data`, or another order of
    them, and `order` is "by-name": its logits would be read as those of other classes.
    """
    if network.classes in ((), data.classes):
        return network
    of_network, of_data = list_difference(network.classes, data.classes)
    if order == "by-name":
        raise CheckpointError(
            f"{name}: its classes are {of_network}; those of the data are {of_data}",
            "needed: the same classes in the same order, or --class-order by-position",
        )
    note = f"{name}: its classes {of_network} are read by position as {of_data}"
    return network._replace(notes=(*network.notes, note))


def list_difference(a: Sequence[str], b: Sequence[str]) -> tuple[str, str]:
    """Return two lists of names as text; of long ones only the first names that differ."""
    if max(len(a), len(b)) <= MOST:
        return str(list(a)), str(list(b))
    places = [k for k in range(max(len(a), len(b))) if a[k : k + 1] != b[k : k + 1]]
    texts = (", ".join(f"{k}: {x[k]!r}" for k in places[:MOST] if k < len(x)) for x in (a, b))
    first, second = (f"[{text}, ...] ({len(x)})" for text, x in zip(texts, (a, b), strict=True))
    return first, second
