"""Several processes that train together compute what one would; interrupted, they resume."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small_training import CONFIG, train
from helpers.two_processes import METHODS, results

from absld.engine.distributed import SINGLE_PROCESS, Distributed, init_distributed, is_cuda
from absld.errors import UsageError

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
    assert alone.all_reduce_sum(tensor) is tensor and alone.all_reduce_max(3, tensor.device) == 3
    assert alone.is_main and alone.key() == () and alone.device("cuda") == "cuda"
    alone.all_reduce_mean_([tensor])
    alone.barrier()
    assert alone.data_parallel(torch.nn.Identity()).training
    with init_distributed("cpu") as distributed:
        assert distributed is SINGLE_PROCESS


def test_each_process_has_a_device_and_numbers_of_its_own(monkeypatch):
    second = Distributed(3, 4, local_rank=1)
    assert second.device("cuda") == "cuda:1" and second.device("cpu") == "cpu"
    assert second.key() != Distributed(2, 4).key() != () == Distributed(0, 4).key()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert second.device("auto") == "cuda:1" and is_cuda("auto")


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="3 processes cannot share a batch of 4"):
        train(CONFIG, distributed=Distributed(0, 3))
