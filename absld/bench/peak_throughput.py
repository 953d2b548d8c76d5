"""What this machine can compute at best: a large matrix product, and a 3x3 convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from absld.bench.timing import Stopwatch
from absld.engine.precision import arithmetic

SIZE = {"cpu": 2048, "cuda": 8192}
LEAST = 0.2  # seconds of each, in each round
WIDTH, SIDE = 256, 16  # channels in and out, and the image's side: the middle of a ResNet


class Ceilings:
    """Measured again in each round, for a machine's speed drifts; the best of all rounds counts."""

    def __init__(self, device: torch.device, precision: str, batch_size: int) -> None:
        self.watch, self.precision = Stopwatch(device), precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        size = SIZE["cuda" if device.type == "cuda" else "cpu"]
        a = torch.randn(size, size, device=device, dtype=dtype)
        # Channels last, which is never the slower layout here.
        x = torch.randn(batch_size, WIDTH, SIDE, SIDE, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randn(WIDTH, WIDTH, 3, 3, device=device, dtype=dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        self.work: dict[str, tuple[Callable[[], object], float]] = {
            "matmul": (lambda: a @ a, 2.0 * size**3),
            "conv3x3": (
                lambda: F.conv2d(x, w, padding=1),
                2.0 * batch_size * SIDE**2 * 9 * WIDTH**2,
            ),
        }
        self.best = dict.fromkeys(self.work, 0.0)

    def measure(self) -> None:
        """Run each for LEAST seconds or longer."""
        with arithmetic(self.precision), torch.no_grad():
            for name, (work, operations) in self.work.items():
                spent = 0.0
                while spent < LEAST:
                    seconds = self.watch.time(work)
                    spent += seconds
                    self.best[name] = max(self.best[name], operations / seconds)
