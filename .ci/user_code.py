"""Use absld as installed; mypy --strict knows the types of its names, though they load lazily.

python user_code.py ENVIRONMENT
"""

import sys
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

import absld
import absld_min  # type: ignore[import-untyped]  # no single module can be marked as typed

installed = Path(sys.argv[1]).resolve()
for module in (absld, absld_min):
    assert module.__file__ and installed in Path(module.__file__).resolve().parents, module

logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
temperature = absld.ClassTemperature(num_classes=3)
soft_adv, soft_nat = temperature.soft_labels(logits, labels)
loss = assert_type(absld.absld_loss(logits, logits, soft_adv, soft_nat), Tensor)
config = assert_type(absld.TrainConfig(method="trades"), absld.TrainConfig)
assert_type(config.epochs, int)
assert_type(absld.__version__, str)
error: absld.AbsldError = absld.UsageError("a cause", "a hint")
print(f"absld {absld.__version__}: loss {loss.item():.3f}")
