"""Device, precision and engine: how fast the same training is done.

Nothing here changes what is computed but for rounding, and each technique is a setting of its own,
off by default: docs/performance.md says what each is worth, and on which machine.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from absld.attack import Objective, TrainingAttack, frozen_eval, pgd
from absld.config.settings import TrainConfig
from absld.engine.batch_norm_folding import Folded
from absld.engine.cuda_graph import Recorded, tensors_of
from absld.engine.distributed import ALONE, Ranks
from absld.engine.precision import arithmetic, in_precision
from absld.errors import UsageError

# --- Precision ---


# --- Memory format ---


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
