"""Whether a state dict fits a network, by names, shapes and types; and loading it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from absld.errors import CheckpointError
from absld.models.recognition import describe_nearest


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError with the first names or shapes of `state` that are not a network's."""
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
                f"{path}: {name} is {tuple(given.shape)}, expected {tuple(tensor.shape)}",
                "the number of classes or channels, or the network, is different",
            )
        if tensor.is_floating_point() and not given.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {given.dtype}, expected {tensor.dtype}",
                "export the weights as floating-point numbers, not quantised",
            )


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`. Raises CheckpointError with the first names or shapes at fault."""
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict(state)
    for name, tensor in own.items():  # which are the network's, filled now
        if tensor.dtype != state[name].dtype and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds numbers too large for {tensor.dtype}", "train it anew"
            )
