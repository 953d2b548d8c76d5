"""The formats of `absld export`: the content of a file, and the network that it holds.

Each takes pixels in [0,1], float32 (N,channels,H,W) for any N, and gives logits (N,C).
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from absld.config.evaluation_settings import ExportFormat
from absld.config.imports import names_code
from absld.errors import CheckpointError, Stopped, UsageError
from absld.models.loading import load_network
from absld.storage.environment import version
from absld.storage.safetensors_files import KEY, safetensors_bytes
from absld.text import clip

Forward = Callable[[Tensor], Tensor]
"""Images (N,channels,H,W) -> logits (N,C), on the CPU."""

SUFFIXES: dict[ExportFormat, str] = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "safetensors": ".safetensors",
}
MOST_ONNX = 2**31 - 2**24  # bytes of weights: a protobuf has less than 2 GiB
ANY_BATCH = (
    "needed: a forward of tensors, x.shape[0] for the size of the batch, no branch on their values;"
    " or --format safetensors"
)


def check_packages(file_format: ExportFormat) -> None:
    """Raise UsageError if a package that writes the format is not installed."""
    needed = ("onnx", "onnxscript") if file_format == "onnx" else ()
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--format onnx needs the package {package}", "pip install 'absld[onnx]'"
            )


def missing_runtime(file_format: ExportFormat) -> str:
    """Return why a file cannot be evaluated here, and how it could; "" if it can."""
    if file_format == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime"
    return ""


def runtime_of(file_format: ExportFormat) -> str:
    """Return the package that evaluates a file, with its version."""
    package = "onnxruntime" if file_format == "onnx" else "torch"
    return f"{package} {version(package)}"


# --- Writing ---


def encode(
    network: nn.Module, description: Mapping[str, Any], file_format: ExportFormat, name: str
) -> bytes:
    """Return the content of a file with a network, which is in eval mode on the CPU.

    description: by `describe_weights`; the file holds it. name: of the network, in errors.

    Raises CheckpointError or UsageError if the format cannot hold the network.
    """
    state = network.state_dict()
    texts = {KEY: json.dumps(description)}
    if file_format == "safetensors":
        return safetensors_bytes(state, texts)
    size = sum(tensor.nbytes for tensor in state.values())
    if file_format == "onnx" and size > MOST_ONNX:
        raise UsageError(
            f"{name}: {size:,} bytes of weights, and a file of ONNX holds less than 2 GiB",
            "needed: --format torch-export or safetensors",
        )
    program = trace(network, description["image_shape"], name)
    try:
        with quiet():
            return to_onnx(program, texts) if file_format == "onnx" else to_pt2(program, texts)
    except Exception as error:  # an operator that the format has not
        raise CheckpointError(
            f"{name}: cannot be written as {file_format}: {in_short(error)}",
            "needed: another --format; see --debug",
        ) from error


def trace(
    network: nn.Module, image_shape: Sequence[int], name: str
) -> torch.export.ExportedProgram:
    """Trace a network for any number of images. Raises CheckpointError if it cannot be traced."""
    example = torch.zeros(2, *image_shape)
    batch = torch.export.Dim("batch")
    errors: list[BaseException] = []
    for strict in (False, True):  # the second one reads bytecode: it knows len(x), but less else
        try:
            with quiet():
                program = torch.export.export(
                    giving_float32(network, example),
                    (example,),
                    dynamic_shapes=({0: batch},),
                    strict=strict,
                )
        except Stopped:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's network raises
            errors.append(error)
        else:
            return without_traces(program)
    raise CheckpointError(
        f"{name}: torch.export cannot trace it: {in_short(errors[0])}", ANY_BATCH
    ) from errors[0]


def giving_float32(network: nn.Module, example: Tensor) -> nn.Module:
    """Return a network whose logits are float32: itself, or one with a cast at its end."""
    with torch.no_grad():
        dtype = network(example).dtype
    return network if dtype == torch.float32 else nn.Sequential(network, ToFloat32()).eval()


class ToFloat32(nn.Module):
    """Logits (N,C) of any precision to float32."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.float()


def without_traces(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove the lines of code, with paths of this machine, that a program keeps of its making."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    return program


def to_pt2(program: torch.export.ExportedProgram, texts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=texts)
    return buffer.getvalue()


def to_onnx(program: torch.export.ExportedProgram, texts: Mapping[str, str]) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        external_data=False,
        verbose=False,
    )
    proto = cast(Any, exported).model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # how it was made
    for key, text in texts.items():
        proto.metadata_props.add(key=key, value=text)
    content: bytes = proto.SerializeToString()
    return content


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporters, whose graphs, advice and warnings of their own code say nothing."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(disabled)


def in_short(error: BaseException) -> str:
    """Return the kind and the first line of an error: torch's have a page."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {clip(first.strip(), 160)}"


# --- Reading what was written ---


def decode(
    content: bytes, path: Path, description: Mapping[str, Any], file_format: ExportFormat
) -> Forward:
    """Return the network that a file holds.

    content: of the file `path`, written by this process: torch.export reads pickles.
    description: of which only a factory that the user typed is used.
    """
    if file_format == "onnx":
        return open_onnx(content)
    if file_format == "torch-export":
        with quiet():
            module = torch.export.load(io.BytesIO(content)).module()
        return cast(Forward, module)
    architecture, num_classes = description["architecture"], len(description["classes"])
    typed = architecture if names_code(architecture) else ""
    channels, height, width = description["image_shape"]
    shape = (channels, height, width)
    return load_network(str(path), num_classes, ("export",), typed, image_shape=shape).model.eval()


def open_onnx(content: bytes) -> Forward:
    """Return the network of an ONNX file, evaluated by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return forward
