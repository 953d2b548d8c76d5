"""Profiles of Hypothesis, one torch thread, checked signatures, what several files use."""

import os

import hypothesis
import jaxtyping
import pytest
import torch

# Before anything imports absld: its signatures are promises, which the tests hold it to.
jaxtyping.install_import_hook("absld", "typecheck.checked")

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, print_blob=True
)
# For tests that are to fail: how is not asked, so nothing is shrunk.
hypothesis.settings.register_profile(
    "mutants",
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev")
)

torch.set_num_threads(1)


class TorchRandom:
    """torch's global generator with the three names by which Hypothesis keeps a generator."""

    seed = staticmethod(torch.default_generator.manual_seed)
    getstate = staticmethod(torch.default_generator.get_state)
    setstate = staticmethod(torch.default_generator.set_state)


_random = TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_random)


@pytest.fixture(scope="session")
def single_thread() -> dict[str, str]:
    """The environment of a child process: one torch thread there, too."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings_of_torch():
    """Restore afterwards what the main of absld_min sets for its process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic
    yield
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic = before
