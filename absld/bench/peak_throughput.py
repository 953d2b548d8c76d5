"""Peak throughput of this machine: a large matrix product, and a 3x3 convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from absld.bench.timing import Timer
from absld.engine.precision import float32_precision

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MIN_SECONDS = 0.2  # for each kernel, in each round
CHANNELS, SIDE = 256, 16  # of the convolution: the middle of a ResNet


class PeakThroughput:
    """Operations a second in one precision, by kernel: `best` holds the maximum over all rounds.

    It is measured again in each round, because a machine's speed drifts.
    """

    def __init__(self, device: torch.device, precision: str, batch_size: int) -> None:
        self.timer, self.precision = Timer(device), precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        size = MATRIX_SIZE["cuda" if device.type == "cuda" else "cpu"]
        a = torch.randn(size, size, device=device, dtype=dtype)
        # Channels last, which is never the slower format here.
        x = torch.randn(batch_size, CHANNELS, SIDE, SIDE, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device, dtype=dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        self.kernels: dict[str, tuple[Callable[[], object], float]] = {
            "matmul": (lambda: a @ a, 2.0 * size**3),
            "conv3x3": (
                lambda: F.conv2d(x, w, padding=1),
                2.0 * batch_size * SIDE**2 * 9 * CHANNELS**2,
            ),
        }
        self.best = dict.fromkeys(self.kernels, 0.0)

    def measure(self) -> None:
        """Run each kernel for MIN_SECONDS or longer."""
        with float32_precision(self.precision), torch.no_grad():
            for name, (kernel, operations) in self.kernels.items():
                spent = 0.0
                while spent < MIN_SECONDS:
                    seconds = self.timer.time(kernel)
                    spent += seconds
                    self.best[name] = max(self.best[name], operations / seconds)
