"""A classifier that is loaded from a hub and saved for it."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from absld.config.imports import names_code
from absld.errors import CheckpointError, UsageError
from absld.models.fitting import load_state
from absld.models.loading import load_weights
from absld.models.state_dicts import find_state_dict
from absld.storage.checkpoint import load
from absld.storage.safetensors_files import FORMAT, WEIGHTS, describe_weights, write_network
from absld.text import page_of

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ImportError as error:
    raise UsageError(
        f"absld.Classifier needs the package huggingface_hub: {error}", "pip install 'absld[hub]'"
    ) from error


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="absld",
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2312.05508",
    tags=["adversarial-robustness"],
):
    """A network with the names of its classes and the shape of its images.

    It maps pixels (N,C,H,W) in [0,1] to logits (N,K). `Classifier.from_pretrained("owner/name")`
    loads what `absld push` wrote; `save_pretrained` and `push_to_hub` are huggingface_hub's, and
    write no figures into the card.
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: str,
        classes: Sequence[str],
        image_shape: Sequence[int],
    ) -> None:
        """Put a network together with its description.

        Args:
            network: pixels in [0,1] to logits, its normalisation included.
            architecture: a name that `absld.load_network` knows; any other text if there is none.
            classes: their names in the order of the logits.
            image_shape: (channels, height, width) of the training images.
        """
        super().__init__()
        self.network, self.architecture = network, architecture
        self.classes, self.image_shape = tuple(classes), tuple(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def _save_pretrained(self, save_directory: Path) -> None:
        state = self.network.state_dict()
        described = describe_weights(self.architecture, self.classes, self.image_shape, state)
        write_network(save_directory, described, state)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        model: nn.Module | None = None,
        **described: object,
    ) -> "Classifier":
        """Load a folder or a repository. Only safetensors are read, and no code is imported.

        model: the network, if its architecture is not one that is known by its name.
        described: what the mixin has read from config.json; the file of the weights counts.
        """
        if unknown := described.keys() - {"network", "architecture", "classes", "image_shape"}:
            raise TypeError(f"from_pretrained has no argument {min(unknown)!r}")
        path = Path(model_id, WEIGHTS)
        if not os.path.isdir(model_id):
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        content = load(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{model_id}: its {WEIGHTS} describes no network",
                f"needed: a repository by `absld push`, see {page_of('publishing')}",
            )
        architecture, classes = content["architecture"], content["classes"]
        channels, height, width = content["image_shape"]
        shape = (channels, height, width)
        if model is not None:
            load_state(model, find_state_dict(content, path).tensors, path)
        elif names_code(architecture):
            raise CheckpointError(
                f"{model_id}: its network is {architecture!r}, and no name in a file is imported",
                "if you trust that code, make the network by it: from_pretrained(..., model=...)",
            )
        else:
            model, architecture, *_ = load_weights(
                content, path, len(classes), ("pretrained",), image_shape=shape
            )
        return cls(model, architecture, classes, shape).eval()
