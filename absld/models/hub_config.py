"""The config.json that this package writes beside the weights in a repository of a hub."""

from pathlib import Path
from typing import Any

from absld.storage.json_files import read_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "absld-network-1"
NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 64}
SCHEMA = {
    # Of somebody else's config.json nothing is asked: its "architecture" has another meaning.
    "if": {"properties": {"format": {"const": FORMAT}}, "required": ["format"], "type": "object"},
    "then": {
        "required": ["architecture", "classes", "image_shape", "normalisation", "sha256"],
        "properties": {
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
            "normalisation": {
                "type": ["object", "null"],
                "required": ["mean", "std"],
                "properties": {"mean": NUMBERS, "std": NUMBERS},
            },
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        },
    },
}
SEE_DOCS = "needed: a repository by `absld push`, see docs/publishing.md"


def read_config(path: Path) -> dict[str, Any] | None:
    """Read a config.json; None if it is not one of this package.

    Raises CheckpointError, with the field, if it is damaged.
    """
    config: Any = read_json(path, SCHEMA, SEE_DOCS)
    ours = isinstance(config, dict) and config.get("format") == FORMAT
    return config if ours else None
