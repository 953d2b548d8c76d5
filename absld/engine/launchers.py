"""The ranks that torchrun, srun and mpirun give to a process, in environment variables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from absld.errors import UsageError


class Launcher(NamedTuple):
    """Environment variables of a process: rank, number of processes, and both on its machine."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    Launcher(  # Open MPI
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """The ranks of a process that was started with others; None is unknown."""

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


def find_launch(variables: Mapping[str, str]) -> Launch:
    """Return the ranks that the first launcher in LAUNCHERS gave, in environment variables.

    RANK and WORLD_SIZE go before all others: with 0 and 1, a process trains alone. Ranks on the
    machine may be another's: a script often sets only the first two. Raises UsageError, also where
    there is a rank alone or a number of processes alone.
    """
    # A batch script of Slurm has the variables of a task, but is one process.
    in_script = "SLURM_JOB_ID" in variables and "SLURM_STEP_ID" not in variables
    launchers = LAUNCHERS[:-1] if in_script else LAUNCHERS

    def first(names: Iterable[str]) -> int | None:
        return next((number_in(variables, name) for name in names if name in variables), None)

    halves: list[str] = []
    for launcher in launchers:
        rank, world_size = first([launcher.rank]), first([launcher.world_size])
        if rank is None or world_size is None:
            halves += [name for name in launcher[:2] if name in variables]
            continue
        if not 0 <= rank < world_size:
            raise UsageError(
                f"{launcher.rank} is {rank}, {launcher.world_size} is {world_size}",
                launch_hint(world_size),
            )
        local_rank = first(launcher.local_rank for launcher in launchers)
        local_world_size = first(launcher.local_world_size for launcher in launchers)
        return Launch(rank, world_size, local_rank, local_world_size)
    if halves:
        raise UsageError(
            f"{halves[0]} is {variables[halves[0]]}, but no launcher gave both a rank and a number "
            "of processes",
            launch_hint(2),
        )
    return Launch(0, 1, 0, 1)


def number_in(variables: Mapping[str, str], name: str) -> int:
    """Return the number in a variable; of Slurm's 2(x3),1 that of this machine.

    Raises UsageError.
    """
    try:
        if not name.endswith("TASKS_PER_NODE"):
            return int(variables[name])
        machine, end = int(variables["SLURM_NODEID"]), 0
        for part in variables[name].split(","):
            count, _, times = part.rstrip(")").partition("(x")
            end += int(times or 1)
            if 0 <= machine < end:
                return int(count)
        raise ValueError("fewer machines than this one's number")
    except (ValueError, KeyError):
        raise UsageError(
            f"{name} is {variables[name]!r}, not a number of processes", launch_hint(2)
        ) from None


def launch_hint(processes: int) -> str:
    """Return the ways to start processes that train together, or alone."""
    return (
        f"torchrun --nproc-per-node {processes} -m absld train ..., or set MASTER_ADDR and "
        "MASTER_PORT; with RANK=0 WORLD_SIZE=1 each trains alone"
    )
