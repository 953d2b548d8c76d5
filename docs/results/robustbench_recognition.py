"""Count RobustBench's CIFAR-10 L-infinity entries whose architecture `absld` recognises.

    python docs/results/robustbench_recognition.py

Needs no weights and no network: for each entry the names and shapes of its published state dict are
written down here, as RobustBench 1.1.1 builds it, and recognised. Prints the table of
robustbench-recognition.md.
"""

from collections import Counter

import torch

from absld.models.recognition import recognise_architecture

Shapes = dict[str, tuple[int, ...]]
C = 10


def norm(at: str, width: int) -> Shapes:
    ends = ("weight", "bias", "running_mean", "running_var")
    return {f"{at}.{end}": (width,) for end in ends} | {f"{at}.num_batches_tracked": ()}


def linear(at: str, width: int) -> Shapes:
    return {f"{at}.weight": (C, width), f"{at}.bias": (C,)}


def wide_group(at: str, blocks: int, width_in: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for block in range(blocks):
        here, before = f"{at}.layer.{block}", width if block else width_in
        shapes |= norm(f"{here}.bn1", before) | norm(f"{here}.bn2", width)
        shapes |= {f"{here}.conv1.weight": (width, before, 3, 3)}
        shapes |= {f"{here}.conv2.weight": (width, width, 3, 3)}
        if before != width:
            shapes[f"{here}.convShortcut.weight"] = (width, before, 1, 1)
    return shapes


def wide(depth: int, widening: int, *, unused: bool = False, pixels: bool = False) -> Shapes:
    """Return the names of WideResNet. unused: with TRADES' sub_block1. pixels: with mu and sigma."""
    widths = [16, *(16 * widening * 2**k for k in range(3))]
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3)}
    for k in range(3):
        shapes |= wide_group(f"block{k + 1}", (depth - 4) // 6, widths[k], widths[k + 1])
    if unused:
        shapes |= wide_group("sub_block1", (depth - 4) // 6, widths[0], widths[1])
    if pixels:
        shapes |= dict.fromkeys(("mu", "sigma"), (1, 3, 1, 1))
    return shapes | norm("bn1", widths[3]) | linear("fc", widths[3])


def dm_wide(depth: int, widening: int) -> Shapes:
    """Return the names of DMWideResNet."""
    widths = [16, *(16 * widening * 2**k for k in range(3))]
    shapes: Shapes = dict.fromkeys(("mean", "std"), (3, 1, 1))
    shapes |= {"init_conv.weight": (16, 3, 3, 3)}
    for k in range(3):
        for block in range((depth - 4) // 6):
            here, before, width = f"layer.{k}.block.{block}", widths[k + (block > 0)], widths[k + 1]
            shapes |= norm(f"{here}.batchnorm_0", before) | norm(f"{here}.batchnorm_1", width)
            shapes |= {f"{here}.conv_0.weight": (width, before, 3, 3)}
            shapes |= {f"{here}.conv_1.weight": (width, width, 3, 3)}
            if before != width:
                shapes[f"{here}.shortcut.weight"] = (width, before, 1, 1)
    return shapes | norm("batchnorm", widths[3]) | linear("logits", widths[3])


def dm_preact() -> Shapes:
    """Return the names of DMPreActResNet-18."""
    widths = (64, 64, 128, 256, 512)
    shapes: Shapes = dict.fromkeys(("mean", "std"), (3, 1, 1))
    shapes |= {"conv_2d.weight": (64, 3, 3, 3)}
    for k in range(4):
        for block in range(2):
            here, before, width = f"layer_{k}.{block}", widths[k + block], widths[k + 1]
            shapes |= norm(f"{here}.batchnorm_0", before) | norm(f"{here}.batchnorm_1", width)
            shapes |= {f"{here}.conv_2d_1.weight": (width, before, 3, 3)}
            shapes |= {f"{here}.conv_2d_2.weight": (width, width, 3, 3)}
            if before != width:
                shapes[f"{here}.shortcut.weight"] = (width, before, 3, 3)
    return shapes | norm("batchnorm", 512) | linear("logits", 512)


def preact(*, pixels: bool) -> Shapes:
    """Return the names of PreActResNet-18 without its last norm."""
    widths = (64, 64, 128, 256, 512)
    shapes: Shapes = {"conv1.weight": (64, 3, 3, 3)}
    for k in range(4):
        for block in range(2):
            here, before, width = f"layer{k + 1}.{block}", widths[k + block], widths[k + 1]
            shapes |= norm(f"{here}.bn1", before) | norm(f"{here}.bn2", width)
            shapes |= {f"{here}.conv1.weight": (width, before, 3, 3)}
            shapes |= {f"{here}.conv2.weight": (width, width, 3, 3)}
            if before != width:
                shapes[f"{here}.shortcut.0.weight"] = (width, before, 1, 1)
    if pixels:
        shapes |= dict.fromkeys(("mu", "sigma"), (1, 3, 1, 1))
    return shapes | linear("linear", 512)


def resnet(depths: tuple[int, ...], kernels: tuple[int, ...], *, pixels: bool = False) -> Shapes:
    """Return the names of a CIFAR ResNet; kernels: of the convolutions of a block."""
    shapes, before = {"conv1.weight": (64, 3, 3, 3)} | norm("bn1", 64), 64
    for k, depth in enumerate(depths):
        width = 64 * 2**k
        wide = width * (4 if len(kernels) == 3 else 1)
        for block in range(depth):
            here, inner = f"layer{k + 1}.{block}", before
            for number, size in enumerate(kernels, 1):
                out = wide if number == len(kernels) else width
                shapes[f"{here}.conv{number}.weight"] = (out, inner, size, size)
                shapes |= norm(f"{here}.bn{number}", out)
                inner = out
            if before != wide or (k and not block):
                shapes |= {f"{here}.shortcut.0.weight": (wide, before, 1, 1)}
                shapes |= norm(f"{here}.shortcut.1", wide)
            before = wide
    if pixels:
        shapes |= dict.fromkeys(("mu", "sigma"), (1, 3, 1, 1))
    return shapes | linear("linear", before)


def resnet18() -> Shapes:
    return resnet((2, 2, 2, 2), (3, 3))


DEEPMIND = "Swish or SiLU"
# Each entry with its names and shapes, or with the reason that they are not those of one network
# here; and a remark.
ENTRIES: dict[str, tuple[Shapes | str, str]] = {
    "Addepalli2021Towards_RN18": (resnet18(), ""),
    "Addepalli2021Towards_WRN34": (wide(34, 10, unused=True), ""),
    "Addepalli2022Efficient_RN18": (resnet18(), ""),
    "Addepalli2022Efficient_WRN_34_10": (wide(34, 10), ""),
    "Amini2024MeanSparse_Ra_WRN_70_16": ("RaWideResNet with sparsification after each norm", ""),
    "Amini2024MeanSparse_S-WRN-94-16": ("DMWideResNet with sparsification after each norm", ""),
    "Andriushchenko2020Understanding": (preact(pixels=False), ""),
    "Bai2023Improving_edm": ("a mixture of two networks and a third that mixes them", ""),
    "Bai2024MixedNUTS": ("a mixture of two networks", ""),
    "Bartoldson2024Adversarial_WRN-82-8": (dm_wide(82, 8), DEEPMIND),
    "Bartoldson2024Adversarial_WRN-94-16": (dm_wide(94, 16), DEEPMIND),
    "Carmon2019Unlabeled": (wide(28, 10, unused=True), ""),
    "Chen2020Adversarial": ("an ensemble of three pre-activation ResNet-50", ""),
    "Chen2020Efficient": (wide(34, 10, unused=True, pixels=True), ""),
    "Chen2021LTD_WRN34_10": (wide(34, 10), ""),
    "Chen2021LTD_WRN34_20": (wide(34, 20), ""),
    "Chen2024Data_WRN_34_10": (wide(34, 10), ""),
    "Chen2024Data_WRN_34_20": (wide(34, 20), ""),
    "Cui2020Learnable_34_10": (wide(34, 10, unused=True), ""),
    "Cui2020Learnable_34_20": (wide(34, 20, unused=True), ""),
    "Cui2023Decoupled_WRN-28-10": (dm_wide(28, 10), DEEPMIND),
    "Cui2023Decoupled_WRN-34-10": (wide(34, 10), ""),
    "Dai2021Parameterizing": ("WideResNet-28-10 with a learned activation", ""),
    "Debenedetti2022Light_XCiT-L12": ("XCiT", ""),
    "Debenedetti2022Light_XCiT-M12": ("XCiT", ""),
    "Debenedetti2022Light_XCiT-S12": ("XCiT", ""),
    "Ding2020MMA": (wide(28, 4), "computes otherwise: each image is standardised"),
    "Engstrom2019Robustness": (resnet((3, 4, 6, 3), (1, 3, 1), pixels=True), ""),
    "Gowal2020Uncovering_28_10_extra": (dm_wide(28, 10), DEEPMIND),
    "Gowal2020Uncovering_34_20": (dm_wide(34, 20), DEEPMIND),
    "Gowal2020Uncovering_70_16": (dm_wide(70, 16), DEEPMIND),
    "Gowal2020Uncovering_70_16_extra": (dm_wide(70, 16), DEEPMIND),
    "Gowal2021Improving_28_10_ddpm_100m": (dm_wide(28, 10), DEEPMIND),
    "Gowal2021Improving_70_16_ddpm_100m": (dm_wide(70, 16), DEEPMIND),
    "Gowal2021Improving_R18_ddpm_100m": (dm_preact(), DEEPMIND),
    "Hendrycks2019Using": (wide(28, 10), "computes otherwise: takes pixels in [-1,1]"),
    "Huang2020Self": (wide(34, 10, unused=True), ""),
    "Huang2021Exploring": ("WideResNet with a width of its own in each group", ""),
    "Huang2021Exploring_ema": ("WideResNet with a width of its own in each group", ""),
    "Huang2022Revisiting_WRN-A4": (
        "WideResNet with depths and widths of its own in each group",
        "",
    ),
    "Jia2022LAS-AT_34_10": (wide(34, 10), ""),
    "Jia2022LAS-AT_70_16": (wide(70, 16), ""),
    "Kang2021Stable": ("DMWideResNet with a differential equation before its last layer", ""),
    "Pang2020Boosting": ("WideResNet-34-20 with normalised weights in its last layer", ""),
    "Pang2022Robustness_WRN28_10": (dm_wide(28, 10), DEEPMIND),
    "Pang2022Robustness_WRN70_16": (dm_wide(70, 16), DEEPMIND),
    "Peng2023Robust": ("RaWideResNet, with squeeze and excitation", ""),
    "Rade2021Helper_R18_ddpm": (dm_preact(), DEEPMIND),
    "Rade2021Helper_R18_extra": (dm_preact(), DEEPMIND),
    "Rade2021Helper_ddpm": (dm_wide(28, 10), DEEPMIND),
    "Rade2021Helper_extra": (dm_wide(34, 10), DEEPMIND),
    "Rebuffi2021Fixing_106_16_cutmix_ddpm": (dm_wide(106, 16), DEEPMIND),
    "Rebuffi2021Fixing_28_10_cutmix_ddpm": (dm_wide(28, 10), DEEPMIND),
    "Rebuffi2021Fixing_70_16_cutmix_ddpm": (dm_wide(70, 16), DEEPMIND),
    "Rebuffi2021Fixing_70_16_cutmix_extra": (dm_wide(70, 16), DEEPMIND),
    "Rebuffi2021Fixing_R18_ddpm": (dm_preact(), DEEPMIND),
    "Rice2020Overfitting": (wide(34, 20, pixels=True), ""),
    "Sehwag2020Hydra": (wide(28, 10, unused=True), ""),
    "Sehwag2021Proxy": (wide(34, 10), ""),
    "Sehwag2021Proxy_R18": (resnet18(), ""),
    "Sehwag2021Proxy_ResNest152": ("ResNeSt-152", ""),
    "Sitawarin2020Improving": (wide(34, 10, unused=True), ""),
    "Sridhar2021Robust": (wide(28, 10, unused=True), ""),
    "Sridhar2021Robust_34_15": (wide(34, 15, unused=True), ""),
    "Standard": (wide(28, 10), "not a robust network"),
    "Wang2020Improving": (wide(28, 10, unused=True), ""),
    "Wang2023Better_WRN-28-10": (dm_wide(28, 10), DEEPMIND),
    "Wang2023Better_WRN-70-16": (dm_wide(70, 16), DEEPMIND),
    "Wong2020Fast": (preact(pixels=True), ""),
    "Wu2020Adversarial": (wide(34, 10), ""),
    "Wu2020Adversarial_extra": (wide(28, 10, unused=True), ""),
    "Xu2023Exploring_WRN-28-10": (dm_wide(28, 10), DEEPMIND),
    "Zhang2019Theoretically": (wide(34, 10, unused=True), ""),
    "Zhang2019You": (wide(34, 10, unused=True), ""),
    "Zhang2020Attacks": (wide(34, 10, unused=True), ""),
    "Zhang2020Geometry": (wide(28, 10, unused=True), ""),
}


def recognised(shapes: Shapes) -> str | None:
    """Return the architecture of names and shapes, without memory."""
    return recognise_architecture(
        {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    )


def count() -> tuple[dict[str, str | None], Counter[str]]:
    """Return the architecture of each entry, and how many entries each architecture has."""
    found = {
        entry: None if isinstance(shapes, str) else recognised(shapes)
        for entry, (shapes, _) in ENTRIES.items()
    }
    return found, Counter(name for name in found.values() if name)


def main() -> None:
    found, architectures = count()
    print(f"{architectures.total()} of {len(ENTRIES)} entries are recognised.\n")
    print("| architecture | entries |\n|---|---|")
    for name, number in architectures.most_common():
        print(f"| `{name}` | {number} |")
    print("\n| entry | recognised as | remark |\n|---|---|---|")
    for entry, (shapes, remark) in ENTRIES.items():
        name = f"`{found[entry]}`" if found[entry] else "no"
        print(f"| {entry} | {name} | {shapes if isinstance(shapes, str) else remark} |")


if __name__ == "__main__":
    main()
