"""The networks and the attack of a training with its techniques in use."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from absld.attack import Objective, TrainingAttack, frozen_eval, pgd
from absld.config.settings import TrainConfig
from absld.engine.batch_norm_folding import FoldedNetwork
from absld.engine.cuda_graph import GraphedFunction, capture, partial_tensors
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.precision import float32_precision, with_precision
from absld.engine.techniques import Techniques
from absld.errors import UsageError


class Engine(nn.Module):
    """A student with two forwards, which share its weights.

    In train mode the forward is that of the training; in eval mode that of the attack, which may be
    of a folded copy and in another precision.
    """

    def __init__(
        self,
        student: nn.Module,
        techniques: Techniques,
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.folded = FoldedNetwork(student) if techniques.fold_batch_norm else None
        self.refresh = self.folded.refresh if self.folded else lambda: None
        if self.folded and techniques.cuda_graph:  # it takes ten small kernels a layer
            device = next(student.parameters()).device
            self.refresh = capture(self.folded.refresh, device)[0].replay
        # torch would compile a forward that all folded networks share for eight of them only.
        networks = student, self.folded.net if self.folded else student
        trained, attacked = map(Compiled, networks) if techniques.compile else networks
        trained = with_precision(trained, techniques.precision)
        self.train_forward = distributed.data_parallel(trained)
        self.attack_forward = with_precision(attacked, techniques.attack_precision)

    def train(self, mode: bool = True) -> "Engine":
        super().train(mode)
        if not mode:
            self.refresh()  # the optimiser may have moved the weights
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.train_forward(x) if self.training else self.attack_forward(x)
        return logits


class Compiled(nn.Module):
    """A network whose forward is compiled at its first call; UsageError if that fails."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.compiled = torch.compile(model, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        try:
            logits: Tensor = self.compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UsageError(f"the student cannot be compiled: {cause}", "--no-compile") from error
        return logits


@dataclass(frozen=True)
class EngineAttack(TrainingAttack):
    """The training attack in its precision, and as a CUDA graph where that is set and possible."""

    precision: str = "fp32"
    cuda_graph: bool = False
    graphs: dict[Hashable, GraphedFunction] = field(default_factory=dict, compare=False)

    def __call__(
        self, student: nn.Module, objective: Objective, x_nat: Tensor, noise: Tensor
    ) -> Tensor:
        with float32_precision(self.precision):
            tensors = partial_tensors(objective)
            # What an objective holds besides tensors would stay that of the first batch.
            if self.cuda_graph and tensors is not None and isinstance(self.epsilon, float):
                return self.replay(student, objective, x_nat, noise, *tensors)
            return super().__call__(student, objective, x_nat, noise)

    def replay(self, student: nn.Module, objective: Objective, *inputs: Tensor) -> Tensor:
        """Attack by the graph for inputs of these shapes, which is captured at the first call."""
        assert isinstance(objective, partial)
        function = objective.func

        def attack(x_nat: Tensor, noise: Tensor, *tensors: Tensor) -> Tensor:
            return pgd(
                student,
                partial(function, *tensors),
                x_nat,
                noise,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
                norm=self.norm,
            )

        budget = self.norm, self.epsilon, self.step_size, self.steps
        key = student, function, budget, *(tensor.shape for tensor in inputs)
        with frozen_eval(student):
            if key not in self.graphs:
                self.graphs[key] = GraphedFunction(attack, inputs)
            return self.graphs[key](*inputs)


def training_attack(config: TrainConfig, techniques: Techniques) -> EngineAttack:
    """Return the training attack of these settings."""
    return EngineAttack(
        config.epsilon,
        config.epsilon * config.relative_step_size,
        config.attack_steps,
        config.norm,
        precision=techniques.attack_precision,
        cuda_graph=techniques.cuda_graph,
    )
