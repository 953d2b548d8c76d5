"""Files of the format safetensors, and the description of a network that they can hold.

The description is a JSON document, the text `absld` of the file's metadata. Nothing that it names is
imported.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

import absld
from absld.errors import CheckpointError
from absld.storage.files import digest, raw_bytes, replacing, write_text
from absld.storage.json_files import parse_json
from absld.storage.opening import COPY_AGAIN, file_size, make_folder
from absld.storage.pickles import RefusedContentError

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # as hubs name them
KEY = "absld"  # of the description, in the metadata of a file
FORMAT = "absld-network-1"
MOST_LISTED = 2**22  # bytes of the header, which lists the tensors; 20,000 take 3 MB
MOST_TENSORS = 20_000
SCHEMA = {
    "type": "object",
    "required": ["format", "architecture", "classes", "image_shape", "sha256"],
    "properties": {
        "format": {"const": FORMAT},
        "architecture": {"type": "string", "minLength": 1, "maxLength": 200},
        "classes": {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 2,
            "maxItems": 100_000,  # the last layer is made for them
        },
        "image_shape": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1},
            "minItems": 3,
            "maxItems": 3,
        },
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
}


def describe_weights(
    architecture: str,
    classes: Sequence[str],
    image_shape: Sequence[int],
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Describe a network in plain values, under the keys of a checkpoint.

    image_shape: (channels, height, width). state: its state dict.
    """
    return {
        "format": FORMAT,
        "architecture": architecture,
        "classes": list(classes),
        "image_shape": list(image_shape),
        "sha256": digest(state),
        "absld": absld.__version__,
    }


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file with these tensors, and texts beside them."""
    from safetensors.torch import save

    # The format has neither strides nor storages that two tensors share.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content: bytes = save(own, dict(metadata))  # several texts are in no fixed order
    return content


DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}  # those of a `Column`


class Column(NamedTuple):
    """A tensor that is written in parts: those of its first dimension."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def write_columns(
    file: IO[bytes], columns: Mapping[str, Column], metadata: Mapping[str, str]
) -> None:
    """Write a file of tensors of which only a part is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, column in columns.items():
        start, end = end, end + column.dtype.itemsize * math.prod(column.shape)
        header[name] = {
            "dtype": DTYPES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for column in columns.values():
        for part in column.parts:
            file.write(raw_bytes(part))


def write_network(
    folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write weights with their description into a folder, and a config.json for readers."""
    make_folder(folder)
    with replacing(folder / WEIGHTS) as file:
        file.write(safetensors_bytes(state, {KEY: json.dumps(description)}))
    write_text(folder / CONFIG, json.dumps(description, indent=1) + "\n")


def read_safetensors(file: IO[bytes], path: Path) -> dict[str, Any]:
    """Read the tensors; under `model`, beside their description, where the file holds one.

    Raises CheckpointError if the description is damaged, and others for a damaged file.
    """
    with opened_safetensors(file, path) as content:
        metadata = content.metadata() or {}
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    if KEY not in metadata:
        return tensors
    try:
        return {**parse_json(metadata[KEY].encode(), SCHEMA), "model": tensors}
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its description of the network: {error}", COPY_AGAIN
        ) from error


@contextlib.contextmanager
def opened_safetensors(file: IO[bytes], path: Path) -> Iterator[Any]:
    """Open an open file by the library, once its header is known to be there and not huge.

    path: of the file. Raises RefusedContentError, ValueError, and what the library raises.
    """
    from safetensors import safe_open

    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MOST_LISTED))
    if length > file_size(file) or not header.startswith(b"{"):  # before the whole is read
        raise ValueError("its header is not there")
    if len(header) < length or header.count(b"{") > MOST_TENSORS:  # one for each tensor
        raise RefusedContentError(
            f"a header of {length:,} bytes, or more than {MOST_TENSORS:,} tensors"
        )
    opened = Path(f"/dev/fd/{file.fileno()}")  # the file that was looked at; not on Windows
    with safe_open(opened if opened.exists() else path, framework="pt") as content:
        yield content
