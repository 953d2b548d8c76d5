"""What a run ran on."""

import subprocess
from types import SimpleNamespace

import torch

from absld.storage.environment import commit, environment


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path):
    """Not of a repository that it is installed in, which does not know it."""
    package = tmp_path / "absld"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit(package) is None
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    assert commit(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    assert commit(package) == git(tmp_path, "rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert commit(package) == git(tmp_path, "rev-parse", "HEAD") + "+"


def test_no_git_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_environment_is_plain_values():
    found = environment(torch.device("cpu"))
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert "cuda" not in found and "cudnn" not in found
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu (") and found["threads"] == torch.get_num_threads()


def test_the_environment_of_a_gpu_has_its_libraries(monkeypatch):
    gpu = SimpleNamespace(name="A GPU", major=8, minor=6, total_memory=10 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = environment(torch.device("cuda:1"))
    assert found["device"] == "cuda:1 (A GPU)" and "instructions" not in found
    assert (found["capability"], found["memory_mib"]) == ("8.6", 10240)
    assert (found["cuda"], found["cudnn"]) == ("13.0", 91900)
    # As the schema of evaluation.json wants it.
    assert all(value is None or type(value) in (str, int) for value in found.values())
