"""Profiles of Hypothesis, one torch thread, checked signatures, fixtures of several files."""

import os
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch
from helpers import typecheck

# Before anything imports absld: signatures are checked in all tests where there are tensors.
CHECKED = (
    "attack loss metrics temperature trainer stepper data engine evaluation methods models bench "
    "seeding storage.files runs.parity runs.adversarial_images"
)
jaxtyping.install_import_hook(
    [f"absld.{name}" for name in CHECKED.split()],
    f"{typecheck.__name__}.{typecheck.checked.__name__}",
)

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
# For tests that are to fail: nothing is shrunk.
hypothesis.settings.register_profile(
    "mutants",
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev")
)

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """Not the user's. A fixture: a forked child, which runs tests, too, runs nothing at its exit."""
    with tempfile.TemporaryDirectory(prefix="absld-test-cache-") as folder:
        os.environ["ABSLD_CACHE"] = folder
        yield


class TorchRandom:
    """torch's global generator with the three names by which Hypothesis keeps a generator."""

    seed = staticmethod(torch.default_generator.manual_seed)
    getstate = staticmethod(torch.default_generator.get_state)
    setstate = staticmethod(torch.default_generator.set_state)


_random = TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_random)


@pytest.fixture(scope="session")
def single_thread() -> dict[str, str]:
    """The environment of a child process with one torch thread."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings_of_torch():
    """Restore afterwards what the main of absld_min sets for its process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic
    yield
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic = before


@pytest.fixture
def double_precision():
    """Make torch's default float64: sets of floating images have the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few_digits_in_an_empty_folder(tmp_path, monkeypatch):
    """Change to an empty folder; let every command read only a few of the digits."""
    from helpers.program import use_few_digits

    folder = tmp_path / "an empty folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    use_few_digits(monkeypatch)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A file of weights, so that a run does not have to train a teacher."""
    from absld.models.architectures import build_model
    from absld.storage.checkpoint import save

    path = tmp_path_factory.mktemp("a teacher") / "tëacher é.pt"
    save({"model": build_model("convnet", 10, "teacher").state_dict()}, path)
    return str(path)


@pytest.fixture(scope="session")
def trades_run(tmp_path_factory, worker_id):
    """A run of TRADES on the digits, somewhat robust: once for all workers of pytest, so not to be
    written to."""
    from filelock import FileLock
    from helpers.program import main

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "trained by trades"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            flags = ["--method", "trades", "--epochs", "12", "--device", "cpu"]
            assert main("train", *flags, "--out", folder) == 0
    (run,) = folder.glob("digits-trades-*")
    return run


@pytest.fixture
def trained_on_digits(trades_run):
    """A convnet that is somewhat robust on the digits, in eval mode."""
    from absld.models.loading import load_network

    return load_network(str(trades_run), 10, ()).model.eval()
