"""The steps of one training: networks, method, attack, optimiser and augmented images."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from absld.attack import TrainingAttack
from absld.config.fields import check_epsilon
from absld.config.settings import TrainConfig
from absld.data.augmentation import (
    Batch,
    Draw,
    Views,
    draws,
    held_out_batches,
    steps_per_epoch,
)
from absld.data.dataset import ImageSet
from absld.engine.cuda_graph import GraphedNetwork
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.engine import Engine, training_attack
from absld.engine.logit_cache import CachedTeacher, LogitCacheSettings
from absld.engine.precision import (
    float32_precision,
    memory_format,
    to_memory_format,
    with_precision,
)
from absld.engine.techniques import Techniques, choose_techniques, with_techniques
from absld.errors import DataError, UsageError
from absld.evaluation.validation import check_network, check_state, freeze, read_only
from absld.methods.base import Method
from absld.methods.registry import build_method
from absld.metrics import ClassMean
from absld.progress import Role
from absld.seeding import global_generator
from absld.shapes import is_dense


def train_step(
    method: Method,
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    attack: TrainingAttack,
    optimizer: torch.optim.Optimizer,
    check: Callable[[dict[str, Tensor]], None] = lambda metrics: None,
) -> dict[str, Tensor]:
    """Take one optimiser step on a batch: D1 to D5.

    Args:
        check: receives the metrics before the optimiser changes the weights, and may raise: a NaN
            would spread to all of them.

    Returns:
        The loss and its parts in nats, and the norm of the gradient.

    Raises:
        CheckpointError: a network writes into its input.
        UsageError: the loss does not depend on the student's parameters.
    """
    with read_only(batch.x_nat, "the student or the teacher"):
        loss, parts = method.step(student, teacher, batch, attack)
    if not loss.requires_grad:
        raise UsageError(
            "the loss does not depend on the student's parameters",
            "a forward without detach or no_grad",
        )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    metrics = {"loss": loss.detach(), **parts, "gradient": norm}
    check(metrics)
    optimizer.step()
    return metrics


def check_modes(device: torch.device) -> None:
    """Raise UsageError for modes of torch under which a training computes something else."""
    if torch.is_inference_mode_enabled():
        raise UsageError("fit needs gradients: torch.inference_mode is on", "call it outside")
    if torch.is_autocast_enabled(device.type):
        raise UsageError(
            "fit chooses its own precision: torch.autocast is on",
            "call it outside, with TrainConfig(precision='bf16')",
        )


def check_roles(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise UsageError unless the student has parameters to train, and the teacher others.

    Also under modes that `check_modes` refuses. CheckpointError for what `check_state` refuses.
    """
    check_state(student, "student")
    if teacher is not None:
        check_state(teacher, "teacher")
    parameters = list(student.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        cause, hint = "it has no parameters", "another network"
        if parameters:
            cause, hint = "its parameters are all frozen", "student.requires_grad_(True)"
        raise UsageError(f"the student cannot be trained: {cause}", hint)
    check_modes(parameters[0].device)
    if teacher is not None:
        refuse_shared(shared_tensors(student.named_parameters(), teacher), student is teacher)


def shared_tensors(
    named: Iterable[tuple[str, Tensor]], teacher: nn.Module | None
) -> dict[str, Tensor]:
    """Return the tensors, by name, whose storage is also one of the teacher's, whole or in part."""
    tensors = () if teacher is None else (*teacher.parameters(), *teacher.buffers())
    of_teacher = {storage_address(tensor) for tensor in tensors} - {0}
    return {name: tensor for name, tensor in named if storage_address(tensor) in of_teacher}


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 where there is none, as of a sparse one."""
    return tensor.untyped_storage().data_ptr() if is_dense(tensor) else 0


def refuse_shared(names: Collection[str], same: bool = False) -> None:
    """Raise UsageError if there are names of tensors that student and teacher share."""
    if names:
        also = f" and {len(names) - 1} more" if len(names) > 1 else ""
        share = "are the same network" if same else f"share {next(iter(names))}{also}"
        raise UsageError(f"student and teacher {share}", "copy.deepcopy one of them")


def freeze_teacher(teacher: nn.Module, techniques: Techniques) -> nn.Module:
    """Return the frozen teacher in its precision and memory format, as a CUDA graph if that is on.

    It is to be called inside `float32_precision(techniques.precision)`.
    """
    frozen = freeze(to_memory_format(teacher, techniques.channels_last))
    frozen = with_precision(
        frozen, techniques.teacher_precision, caller_precision=techniques.precision
    )
    return GraphedNetwork(frozen) if techniques.cuda_graph else frozen


class Stepper:
    """The steps of one training: networks, method, attack, optimiser and augmented images."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        train: ImageSet,
        config: TrainConfig,
        *,
        role: Role = "student",
        logit_cache: LogitCacheSettings | None = None,
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        self.role, self.distributed = role, distributed
        self.device = next(student.parameters()).device
        self.techniques = choose_techniques(config, self.device)
        self.config = config = with_techniques(config, self.techniques)
        self.count = steps_per_epoch(len(train), config.batch_size, config.max_steps)
        if self.count == 0:
            raise DataError(
                f"{len(train)} training images do not fill a batch of {config.batch_size}",
                "needed: a smaller --batch-size, or more images",
            )
        if config.batch_size % distributed.world_size:
            raise UsageError(
                f"{distributed.world_size} processes cannot share a batch of {config.batch_size} "
                "evenly",
                "another --batch-size",
            )
        check_epsilon(config.epsilon, config.norm, math.prod(train.image_shape))
        self.views = Views(train.to(self.device), config.padding)
        if config.sync_batch_norm:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        check_network(student, self.views.data, "student")
        self.student = to_memory_format(student, self.techniques.channels_last)
        self.engine = Engine(student, self.techniques, distributed)
        self.attack = training_attack(config, self.techniques)
        self.method = build_method(config, train.num_classes).to(self.device)
        self.method.all_reduce_mean_ = distributed.all_reduce_mean_
        self.teacher = self.prepare_teacher(teacher, logit_cache)
        # Which of them training changes, such as the statistics of a batch norm, a step shows.
        shared = shared_tensors(student.named_buffers(), teacher)
        self.shared = {name: (buffer, buffer.clone()) for name, buffer in shared.items()}
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    def prepare_teacher(
        self, teacher: nn.Module | None, logit_cache: LogitCacheSettings | None
    ) -> nn.Module | None:
        """Return the teacher to call, with its logit cache where there is one."""
        config = self.config
        if teacher is None:
            if self.method.needs_teacher:
                raise UsageError(f"{config.method} needs a teacher", "pass one, or method='trades'")
            return None
        teacher.to(self.device)
        check_network(teacher, self.views.data, "teacher")
        frozen = freeze_teacher(teacher, self.techniques)
        if logit_cache and self.method.caches_teacher:
            precision = self.techniques.teacher_precision
            with float32_precision(self.techniques.precision):
                return logit_cache.wrap(
                    frozen,
                    self.views,
                    flip=config.flip,
                    precision=precision,
                    batch_size=config.batch_size // self.distributed.world_size,
                )
        return frozen

    def key(self, epoch: int) -> tuple[int | str, ...]:
        """Return the key of all random numbers of an epoch."""
        return self.config.seed, self.role, epoch

    def draws(self, epoch: int, first_step: int = 0) -> Iterator[Draw]:
        """Draw the augmentations and attack starts of the batches of an epoch."""
        return draws(
            self.views,
            *self.key(epoch),
            flip=self.config.flip,
            steps=self.count,
            first_step=first_step,
            **self.attack_starts(),
        )

    def attack_starts(self) -> dict[str, Any]:
        """Return the size of a batch, and the distribution of the starts of the attack in it."""
        config = self.config
        radius = config.start_noise if config.start == "normal" else config.epsilon
        starts = {"start": config.start, "radius": radius, "norm": config.norm}
        return starts | {"batch_size": config.batch_size}

    def observe_validation(
        self, validation: ImageSet, epoch: int, on_batch: Callable[[int, int], None]
    ) -> None:
        """Show the method the held-out images, if it adapts to them; each process shows a part.

        on_batch: receives the number of batches done, and of all.
        """
        if not self.method.uses_validation:
            return
        key, total = (*self.key(epoch), "validation"), -(-len(validation) // self.config.batch_size)
        world_size, rank = self.distributed.world_size, self.distributed.rank

        def own_batches() -> Iterator[Batch]:
            every = held_out_batches(validation, *key, **self.attack_starts())
            for number, batch in enumerate(every):
                if number % world_size == rank:
                    yield batch
                # All processes report the same batches: one of them may have to stop all.
                on_batch(number + 1, total)

        self.method.observe_validation(self.engine, own_batches(), self.attack)

    def batch(self, draw: Draw) -> Batch:
        """Make this process' part of a batch."""
        world_size, rank = self.distributed.world_size, self.distributed.rank
        part = Draw(*(drawn.chunk(world_size)[rank] for drawn in draw))
        layout = memory_format(self.techniques.channels_last)
        x_nat, labels, noise, _ = self.views.batch(part)
        x_nat, noise = (x.contiguous(memory_format=layout) for x in (x_nat, noise))
        cached = isinstance(self.teacher, CachedTeacher)
        return Batch(x_nat, labels, noise, self.views.numbers(part) if cached else None)

    def step(
        self, draw: Draw, epoch: int, number: int, check: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Take step `number` (from 0) of an epoch; check: see `train_step`.

        Raises UsageError if the first one changes a buffer of the teacher.
        """
        # Nothing here draws from torch's global generators, but a student with dropout does.
        key = *self.key(epoch), number, "student", *self.distributed.key()
        with global_generator(*key, device=self.device):
            train_step(
                self.method,
                self.engine,
                self.teacher,
                self.batch(draw),
                self.attack,
                self.optimizer,
                check,
            )
        if self.shared:
            pairs, self.shared = self.shared.items(), {}
            refuse_shared([name for name, (now, before) in pairs if not torch.equal(now, before)])
        self.distributed.all_reduce_mean_(self.student.buffers())

    def class_means(self) -> list[ClassMean]:
        """Return the means by class that the method gathers over an epoch."""
        return [module for module in self.method.modules() if isinstance(module, ClassMean)]

    def sum_class_means(self) -> None:
        """Sum the gathered means over all processes, in each."""
        for mean in self.class_means():
            mean.sums = self.distributed.all_reduce_sum(mean.sums)
            mean.counts = self.distributed.all_reduce_sum(mean.counts)

    def accepts_epoch(self) -> bool:
        """Return whether the method lets the weights of this epoch enter their average."""
        self.sum_class_means()
        accepted = self.method.accepts_epoch()
        self.keep_class_means_on_main()  # they are summed again when the epoch ends
        return accepted

    def keep_class_means_on_main(self) -> None:
        """Keep the means, which are sums over all processes, in the main process only."""
        if not self.distributed.is_main:
            for mean in self.class_means():
                mean.reset()
