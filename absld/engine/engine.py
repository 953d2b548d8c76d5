"""Device, precision and engine: how fast the same training is done.

Nothing here changes what is computed but for rounding, and each technique is a setting of its own,
off by default: docs/performance.md says what each is worth, and on which machine.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from absld.attack import Objective, TrainingAttack, frozen_eval, pgd
from absld.config.settings import TrainConfig
from absld.engine.batch_norm_folding import Folded
from absld.engine.cuda_graph import Recorded, tensors_of
from absld.engine.distributed import ALONE, Ranks
from absld.errors import UsageError

T = TypeVar("T", bound=nn.Module)


def resolve_device(name: str) -> torch.device:
    """The device `name`; "auto" is cuda where there is one, else the CPU. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"--device {name}: {error}", "--device cpu works everywhere") from error
    return device


# --- Precision ---


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Inside, float32 is multiplied in full (fp32, bf16), or in tf32, and cuDNN is repeatable.

    torch's own settings are as before afterwards.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined]  # set at run time
    before = matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
    try:
        matmul.fp32_precision = conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


class InPrecision(nn.Module):
    """A network whose forward computes in a precision, from float32 weights to float32 logits. A
    backward is in that of the code around it, but for bf16."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        # Weights are cast once a forward: there is nothing to cache, and a graph could not.
        half = torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )
        with arithmetic(self.precision), half:
            logits: Tensor = self.model(x)
        return logits.float() if self.precision == "bf16" else logits


def in_precision(model: nn.Module, precision: str, around: str | None = None) -> nn.Module:
    """The network to call for a precision: itself, or a wrapper. The weights are shared. around:
    the `arithmetic` in which it will be called, if not its own."""
    as_around = precision == (around or precision) != "bf16"
    return model if as_around else InPrecision(model, precision)


# --- Memory format ---


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(model: T, channels_last: bool) -> T:
    """The network itself, its weights in the memory format. Its state dict is as before."""
    return model.to(memory_format=torch.channels_last) if channels_last else model


# --- The engine ---


class Engine(nn.Module):
    """A student with two forwards: in train mode that of the training; in eval mode that of the
    attack, which may be of a folded copy, and in another precision. The weights are the student's.
    """

    def __init__(self, student: nn.Module, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.folded = Folded(student) if config.fold_batch_norm else None
        compiled: Callable[[nn.Module], nn.Module] = Compiled if config.compile else same
        self.trained = ranks.parallel(in_precision(compiled(student), config.precision))
        self.attacked = in_precision(
            compiled(self.folded or student), config.attack_precision or config.precision
        )

    def train(self, mode: bool = True) -> "Engine":
        super().train(mode)
        if self.folded and not mode:
            self.folded.rewrite()  # an optimiser's step may lie behind
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.trained(x) if self.training else self.attacked(x)
        return logits


def same(model: nn.Module) -> nn.Module:
    return model


class Compiled(nn.Module):
    """A network whose forward is compiled when it is first called. Raises UsageError where that
    cannot be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.call = torch.compile(model, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        try:
            logits: Tensor = self.call(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UsageError(f"--compile: {cause}", "leave out --compile") from error
        return logits


@dataclass(frozen=True)
class EngineAttack(TrainingAttack):
    """The training attack in its precision; as a CUDA graph, if that is wanted and can be."""

    precision: str = "fp32"
    cuda_graph: bool = False
    recorded: dict[Hashable, Recorded] = field(default_factory=dict, compare=False)

    def __call__(
        self, student: nn.Module, objective: Objective, x_nat: Tensor, noise: Tensor
    ) -> Tensor:
        with arithmetic(self.precision):
            tensors = tensors_of(objective)
            # What an objective holds besides tensors would stay that of the first batch.
            if self.cuda_graph and tensors is not None and isinstance(self.epsilon, float):
                return self.replayed(student, objective, x_nat, noise, *tensors)
            return super().__call__(student, objective, x_nat, noise)

    def replayed(self, student: nn.Module, objective: Objective, *given: Tensor) -> Tensor:
        """The attack by the graph for such tensors, recorded where there is none."""
        assert isinstance(objective, partial)
        function = objective.func

        def run(x_nat: Tensor, noise: Tensor, *tensors: Tensor) -> Tensor:
            return pgd(
                student,
                partial(function, *tensors),
                x_nat,
                noise,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
            )

        key = student, function, *(tensor.shape for tensor in given)
        with frozen_eval(student):
            if key not in self.recorded:
                self.recorded[key] = Recorded(run, given)
            return self.recorded[key](*given)


def training_attack(config: TrainConfig) -> EngineAttack:
    """The attack of a training, with its settings."""
    return EngineAttack(
        config.epsilon,
        config.epsilon * config.relative_step_size,
        config.attack_steps,
        precision=config.attack_precision or config.precision,
        cuda_graph=config.cuda_graph,
    )


def check_speed(config: TrainConfig, device: torch.device) -> None:
    """Raise UsageError for a technique that this device has not."""
    on_cuda = {"cuda_graph": config.cuda_graph, "sync_batch_norm": config.sync_batch_norm}
    if device.type != "cuda" and (wanted := [name for name, on in on_cuda.items() if on]):
        flag = f"--{wanted[0].replace('_', '-')}"
        raise UsageError(f"{flag} needs a CUDA device, not {device.type}", f"leave out {flag}")
