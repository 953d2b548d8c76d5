"""Files of the format safetensors."""

from collections.abc import Mapping

from torch import Tensor


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file with these tensors, and texts beside them."""
    from safetensors.torch import save

    # The format has neither strides nor storages that two tensors share.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content: bytes = save(own, {"format": "pt", **metadata})
    return content
