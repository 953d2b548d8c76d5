"""Several processes that train together compute what one would; interrupted, they resume."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small_training import CONFIG, train
from helpers.two_processes import METHODS, results

from absld.engine import distributed as module
from absld.engine.distributed import (
    SINGLE_PROCESS,
    Distributed,
    check_devices,
    init_distributed,
    parse_device,
)
from absld.engine.launchers import Launch, find_launch
from absld.errors import AbsldError, UsageError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TESTS = Path(__file__).parents[1]


def launch(arguments, single_thread, **settings):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        env=single_thread,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory, single_thread):
    """The results of two processes."""
    file = tmp_path_factory.mktemp("distributed") / "results"
    child = launch(["-m", "helpers.two_processes", file], single_thread, cwd=TESTS)
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    assert "Warning" not in output
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return results()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_two_processes_compute_what_one_does(method, both, alone):
    """With frozen batch norm, up to rounding: weights, temperatures, losses; exactly: accuracies.
    Sums of class risks are in float32."""
    torch.testing.assert_close(both[0][method], alone[method], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        both[0][method]["weights"], alone[method]["weights"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_both_processes_have_the_same_result(method, both):
    torch.testing.assert_close(both[0][method], both[1][method], rtol=0, atol=0)


@pytest.mark.slow
def test_both_processes_reduce_flags_and_report_an_error_of_one(both):
    for found in both:
        assert found["max"] == 11 and found["error"] == "the network gives NaN or infinity"


def test_temperatures_moved(alone):
    """Otherwise their equality would prove nothing."""
    assert (alone["absld"]["per_class"][-1]["temperature_adv"] != 1).any()


# --- The command line ---

FLAGS = ["--epochs", "12", "--teacher-epochs", "1", "--allow-weak-teacher", "--device", "cpu"]


def command(*flags):
    return ["-m", "absld", "train", *FLAGS, *flags]


def digests(text):
    return re.findall(r"^\w+ sha256: \w{64}$", text, re.MULTILINE)


@pytest.mark.slow
def test_interrupted_and_resumed_processes_end_with_the_same_weights(tmp_path, single_thread):
    """torchrun passes SIGTERM on; both processes stop at one step, and one of them saves."""
    whole = launch(command("--out", tmp_path / "whole"), single_thread)
    expected, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, expected
    assert expected.count("seed 0, device cpu") == 1 and len(digests(expected)) == 2
    out = tmp_path / "stopped"
    child = launch(command("--out", out), single_thread)
    while not list(out.glob("digits-absld-*/last.pt")):  # after the student's first epoch
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    stopped, _ = child.communicate(timeout=300)
    (run,) = out.glob("digits-absld-*")
    assert child.returncode != 0 and (run / "STATUS").read_text() == "interrupted\n", stopped
    assert "Continue with the same command and --resume." in stopped
    again = launch(command("--out", out, "--resume"), single_thread)
    resumed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, resumed
    assert digests(resumed) == digests(expected)


# --- A single process ---


def test_a_single_process_does_not_communicate():
    alone, tensor = SINGLE_PROCESS, torch.ones(2)
    assert alone.all_reduce_sum(tensor) is tensor and alone.all_reduce_max(3) == 3
    assert alone.is_main and alone.key() == () and alone.device("cuda") == "cuda"
    alone.all_reduce_mean_([tensor])
    alone.barrier()
    assert alone.data_parallel(torch.nn.Identity()).training
    with init_distributed("cpu") as distributed:
        assert distributed is SINGLE_PROCESS


def test_each_process_has_a_device_and_numbers_of_its_own(monkeypatch):
    second = Distributed(3, 4, local_rank=1)
    assert second.device("cuda") == "cuda:1" and second.device("cpu") == "cpu"
    assert second.device("cuda:0") == "cuda:0"  # the only process of its machine
    assert second.key() != Distributed(2, 4).key() != () == Distributed(0, 4).key()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert second.device("auto") == "cuda:1"


# --- Devices of processes under torchrun ---


@pytest.mark.parametrize(
    ("name", "processes", "gpus"),
    [("cpu", 8, 0), ("cuda", 2, 2), ("cuda", 1, 1), ("cuda:0", 1, 1), ("cuda:1", 1, 2)],
)
def test_processes_with_a_device_each_are_accepted(name, processes, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_devices(parse_device(name), processes)


@pytest.mark.parametrize(
    ("name", "processes", "gpus", "cause", "hint"),
    [
        ("cuda:0", 2, 2, "--device cuda:0: 2 processes would share it", "--device cuda: each"),
        ("cuda:1", 3, 4, "--device cuda:1: 3 processes would share it", "--device cuda: each"),
        ("cuda", 3, 2, "3 processes need a GPU each, and this machine has 2", "--nproc-per-node"),
        ("cuda", 2, 0, "2 processes need a GPU each, and this machine has 0", "--device cpu"),
    ],
)
def test_processes_that_would_share_a_gpu_are_refused(
    name, processes, gpus, cause, hint, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=cause) as caught:
        check_devices(parse_device(name), processes)
    assert hint in caught.value.hint


TORCHRUN_VARIABLES = {
    **{"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.fixture
def torchrun(monkeypatch):
    """Stand for torchrun, two GPUs and their processes; return what is called."""
    calls = []

    def record(owner, name):
        monkeypatch.setattr(
            owner, name, lambda *given, **named: calls.append((name, *given, *named.values()))
        )

    for name, value in TORCHRUN_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "resolve_device", torch.device)
    record(torch.cuda, "set_device")
    record(torch.distributed, "init_process_group")
    record(torch.distributed, "destroy_process_group")
    return calls


def test_processes_on_gpus_reduce_flags_among_their_cpus(torchrun):
    with init_distributed("cuda") as second:
        assert second == Distributed(5, 6, local_rank=1)
    assert torchrun[:2] == [
        ("set_device", torch.device("cuda:1")),
        ("init_process_group", "cpu:gloo,cuda:nccl", 5, 6),
    ]
    assert torchrun[-1] == ("destroy_process_group",)


def test_the_only_process_of_a_machine_keeps_the_gpu_that_it_was_given(torchrun, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with init_distributed("cuda:1") as only:
        assert only.device("cuda:1") == "cuda:1"
    assert torchrun[0] == ("set_device", torch.device("cuda:1"))


def test_processes_on_cpus_have_one_group(torchrun):
    with init_distributed("cpu"):
        pass
    assert torchrun[0] == ("init_process_group", "gloo", 5, 6)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_device_that_torch_does_not_know_is_refused_before_processes_join(name, torchrun):
    with pytest.raises(UsageError, match=f"--device {name}: "), init_distributed(name):
        pass
    assert torchrun == []


# --- Launchers ---

SLURM = {"SLURM_PROCID": "4", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
SLURM |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
ALONE = Launch(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, ALONE),
        (TORCHRUN_VARIABLES, Launch(5, 6, 1, 2)),
        (SLURM | TORCHRUN_VARIABLES, Launch(5, 6, 1, 2)),
        (SLURM, Launch(4, 7, 1, 3)),
        (SLURM | {"WORLD_SIZE": "7"}, Launch(4, 7, 1, 3)),
        (SLURM | {"RANK": "4", "WORLD_SIZE": "7"}, Launch(4, 7, 1, 3)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Launch(1, 2, None, None)),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"}, ALONE),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Launch(0, 1, 1, 3)),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 1, 3)),
        (SLURM | OPEN_MPI, Launch(3, 4, 1, 3)),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Launch(3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch(1, 2, 1, 2),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2, None, None)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x9999999999)"}, Launch(4, 7, 1, 3)),
    ],
)
def test_ranks_are_those_that_the_launcher_gave(variables, found):
    assert find_launch(variables) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "x"}, {"WORLD_SIZE": ""}, {"RANK": "6"}, {"RANK": "-1"}, {"LOCAL_RANK": "first"},
        {"RANK": "0", "WORLD_SIZE": "0"}, {"SLURM_STEP_TASKS_PER_NODE": "2(y3)"},
    ],
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused_by_the_name_of_the_variable(changes):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_NODEID": "0"} | changes
    with pytest.raises(UsageError, match=next(iter(changes))) as caught:
        find_launch(variables)
    assert "torchrun --nproc-per-node" in caught.value.hint


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "PMI_RANK", "SLURM_NTASKS"])
def test_a_rank_or_a_number_of_processes_alone_is_refused(name):
    """The others would train beside this one, each unaware of all others."""
    with pytest.raises(UsageError, match=f"^{name} is 1, but no launcher gave both") as caught:
        find_launch({name: "1"})
    assert "with RANK=0 WORLD_SIZE=1 each trains alone" in caught.value.hint


@pytest.mark.parametrize("machine", ["3", "-1"])
def test_a_machine_that_slurm_does_not_count_is_refused(machine):
    with pytest.raises(UsageError, match="SLURM_STEP_TASKS_PER_NODE"):
        find_launch(SLURM | {"SLURM_NODEID": machine})


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_processes_that_cannot_find_each_other_are_refused(missing, torchrun, monkeypatch):
    monkeypatch.delenv(missing)
    cause = f"started as one of 6 processes, without {missing}$"
    with pytest.raises(UsageError, match=cause) as caught, init_distributed("cpu"):
        pass
    assert "torchrun --nproc-per-node 6 -m absld train" in caught.value.hint and not torchrun


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_without_a_rank_on_the_machine_only_cpus_are_shared(missing, torchrun, monkeypatch):
    monkeypatch.delenv(missing)
    with pytest.raises(UsageError, match="process's GPU is unknown"), init_distributed("cuda"):
        pass
    assert torchrun == []
    with init_distributed("cpu") as distributed:
        assert distributed.rank == 5


def test_an_address_that_cannot_be_used_is_named(torchrun, monkeypatch):
    def refuse(*given, **named):
        raise torch.distributed.DistNetworkError("Connection refused")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    cause = "6 processes cannot join at 127.0.0.1:29500: Connection refused"
    with pytest.raises(UsageError, match=cause), init_distributed("cpu"):
        pass


GONE = [
    RuntimeError("[/src/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
]


@pytest.mark.parametrize("error", GONE)
def test_a_process_that_is_gone_is_named_by_the_others(error, torchrun):
    """Whichever communication fails."""
    cause = "another of the 6 processes is gone: "
    with pytest.raises(AbsldError, match=cause) as caught, init_distributed("cpu"):
        raise error
    assert caught.value.hint == "--resume continues this run"
    assert torchrun[-1] == ("destroy_process_group",)


def test_other_errors_of_a_process_stay_as_they_are(torchrun):
    with pytest.raises(RuntimeError, match="shapes differ"), init_distributed("cpu"):
        raise RuntimeError("shapes differ")


def srun(arguments, single_thread):
    """Start two processes as srun does, which leaves each alone when another ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ours = single_thread | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=ours | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_a_process_whose_neighbour_is_killed_says_so_and_can_be_resumed(tmp_path, single_thread):
    flags = command("--out", str(tmp_path))
    children = srun(flags, single_thread)
    while not list(tmp_path.glob("digits-absld-*/last.pt")):
        assert children[0].poll() is None, children[0].communicate()
        time.sleep(0.01)
    children[1].kill()
    _, said = children[0].communicate(timeout=300)
    children[1].communicate()
    assert children[0].returncode == 1
    *_, cause, hint = said.splitlines()
    assert cause.startswith("error: another of the 2 processes is gone: ")
    assert hint == "--resume continues this run"
    again = launch([*flags, "--resume"], single_thread)
    resumed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, resumed


@pytest.mark.slow
def test_processes_of_srun_compute_what_those_of_torchrun_do(tmp_path, single_thread):
    flags = command("--epochs", "2", "--out")
    children = srun([*flags, str(tmp_path / "srun")], single_thread)
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0] and outputs[1] == ""
    theirs = launch([*flags, tmp_path / "torchrun"], single_thread)
    assert digests(theirs.communicate(timeout=300)[0]) == digests(outputs[0]) != []


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="3 processes cannot share a batch of 4"):
        train(CONFIG, distributed=Distributed(0, 3))
