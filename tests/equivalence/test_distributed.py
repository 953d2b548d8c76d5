"""Several processes that train together compute what one would; stopped, they go on."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import CONFIG, train
from two_processes import METHODS, results

from absld.engine.distributed import ALONE, Ranks, is_cuda, launched
from absld.errors import UsageError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
HERE = Path(__file__).parent


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
    """What two processes found."""
    file = tmp_path_factory.mktemp("ranks") / "found"
    child = launch([HERE / "two_processes.py", file], single_thread)
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert "Warning" not in said
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return results()


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_what_one_does(method, both, alone):
    """With frozen batch norm, to rounding: weights, temperatures, losses; and the same images
    right. Sums of class risks are in float32."""
    torch.testing.assert_close(both[0][method], alone[method], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        both[0][method]["weights"], alone[method]["weights"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_have_the_same_result(method, both):
    torch.testing.assert_close(both[0][method], both[1][method], rtol=0, atol=0)


def test_temperatures_moved(alone):
    """Or their being equal would say nothing."""
    assert (alone["absld"]["per_class"][-1]["temperature_adv"] != 1).any()


# --- The command line ---

FLAGS = ["--epochs", "12", "--teacher-epochs", "1", "--allow-weak-teacher", "--device", "cpu"]


def command(*flags):
    return ["-m", "absld", "train", *FLAGS, *flags]


def digests(text):
    return re.findall(r"^\w+ sha256: \w{64}$", text, re.MULTILINE)


@pytest.mark.slow
def test_stopped_and_resumed_they_end_as_if_never_touched(tmp_path, single_thread):
    """torchrun passes SIGTERM on; both processes stop at one step, and one of them saves."""
    whole = launch(command("--out", tmp_path / "whole"), single_thread)
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    assert said.count("seed 0, device cpu") == 1 and len(digests(said)) == 2
    out = tmp_path / "stopped"
    child = launch(command("--out", out), single_thread)
    while not list(out.glob("digits-absld-*/last.pt")):  # after the student's first epoch
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    stopped, _ = child.communicate(timeout=300)
    (run,) = out.glob("digits-absld-*")
    assert child.returncode != 0 and (run / "STATUS").read_text() == "interrupted\n", stopped
    assert "stopped by signal 15\n--resume continues this run" in stopped
    again = launch(command("--out", out, "--resume"), single_thread)
    resumed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, resumed
    assert digests(resumed) == digests(said)


# --- Alone ---


def test_alone_nothing_is_sent_about():
    tensor = torch.ones(2)
    assert ALONE.total(tensor) is tensor and ALONE.greatest(3, tensor.device) == 3
    assert ALONE.first and ALONE.key() == () and ALONE.device("cuda") == "cuda"
    ALONE.mean_([tensor])
    ALONE.wait()
    assert ALONE.parallel(torch.nn.Identity()).training
    with launched("cpu") as ranks:
        assert ranks is ALONE


def test_each_process_has_a_device_and_numbers_of_its_own(monkeypatch):
    second = Ranks(3, 4, local=1)
    assert second.device("cuda") == "cuda:1" and second.device("cpu") == "cpu"
    assert second.key() != Ranks(2, 4).key() != () == Ranks(0, 4).key()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert second.device("auto") == "cuda:1" and is_cuda("auto")


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="3 processes cannot share a batch of 4"):
        train(CONFIG, ranks=Ranks(0, 3))
