"""Measure loading and training on images in memory and in a memory-mapped file.

Makes a folder of JPEG images in scratch space. Each row is a process of its own.
Usage: python docs/results/image_sets.py [IMAGES [SIDE]]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 10
MEASURE = """
import json, sys, time
import pooch, PIL.JpegImagePlugin, sklearn.model_selection, torch, torchvision.transforms.v2
from torch import nn
import absld
from absld.data.placement import Placement

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

folder, side, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
layers = nn.Conv2d(3, 16, 16, stride=16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
before, start = memory("VmHWM"), time.perf_counter()
data = absld.load_data("folder", folder, side, placement=Placement(where))
data.train.digest()
figures = {"load": time.perf_counter() - start, "load_memory": memory("VmHWM") - before}
config = absld.TrainConfig(method="sat", epochs=1, batch_size=32, attack_steps=1)
(report,) = absld.fit(network, None, data.train, data.validation, config)
figures |= {"epoch": report.seconds, "weights": absld.digest(network.state_dict()),
            "memory": memory("VmHWM") - before, "private": memory("RssAnon")}
print(json.dumps(figures))
"""


def make_images(folder: Path, images: int, side: int) -> None:
    """Write smooth noise as JPEG files; every tenth is a test image."""
    import numpy as np
    from PIL import Image

    for number in range(images):
        part = "test" if number % 10 == 9 else "train"
        of_class = folder / part / f"class {number // 10 % CLASSES}"
        of_class.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        grid = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
        image.save(of_class / f"{number:06}.jpg", quality=90)


def measure(folder: Path, side: int, where: str) -> dict[str, float]:
    """Return the figures of a process that loads the images, and trains for an epoch."""
    command = [sys.executable, "-c", MEASURE, str(folder / "images"), str(side), where]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ABSLD_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    given = [int(text) for text in sys.argv[1:]]
    images, side = [*given, *(20_000, 224)[len(given) :]]
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        make_images(folder / "images", images, side)
        size = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
        print(
            f"{images:,} images of {side}x{side}: {size / 2**20:,.0f} MiB of files, "
            f"{images * side * side * 3 / 2**20:,.0f} MiB decoded; "
            f"made in {time.perf_counter() - start:.0f} s\n\n"
            "| images | loading, s | its peak, MiB | epoch, s | peak, MiB | private, MiB |\n"
            "|---|---|---|---|---|---|",
            flush=True,
        )
        weights = set()
        rows = {
            "mapped, decoded": "no",
            "mapped, from the file": "no",
            "in memory, from the file": "yes",
        }
        for row, where in rows.items():
            found = measure(folder, side, where)
            weights.add(found["weights"])
            print(
                f"| {row} | {found['load']:.1f} | {found['load_memory']:.0f} | {found['epoch']:.1f} | "
                f"{found['memory']:,.0f} | {found['private']:,.0f} |",
                flush=True,
            )
        print(f"\n{len(weights)} different weights after the epoch")


if __name__ == "__main__":
    main()
