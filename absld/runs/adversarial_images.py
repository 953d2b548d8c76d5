"""Adversarial images of a network in a file, on which other runtimes are compared without gradients."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from absld.attack import geometry
from absld.data.dataset import ImageSet, pixels, stratified
from absld.errors import CheckpointError
from absld.evaluation.attacks import AttackBatch, parse_attack
from absld.evaluation.surrogates import Images, surrogates
from absld.norms import Norm
from absld.progress import AttackProgress, Observer
from absld.runs.parity import RELATIVE_TOLERANCE, device_of, network_logits
from absld.storage.checkpoint import load
from absld.storage.files import replacing
from absld.storage.safetensors_files import safetensors_bytes

ATTACK = "pgd20"
DEFAULT_COUNT = 1000
ROUNDING = 1e-6  # of pixels, in the check of the ball


def images_to_attack(
    data: ImageSet, examples: int | None, epsilon: float, norm: Norm, seed: int
) -> AttackBatch:
    """Return `examples` images, stratified by class, in one batch on the CPU."""
    count = examples or DEFAULT_COUNT
    index = stratified(data.labels, data.num_classes, count, "examples", seed)
    return AttackBatch(
        pixels(data.rows(index)), data.labels[index], index, epsilon, seed, norm=norm
    )


def stored_adversarial(
    model: nn.Module, clean: AttackBatch, batch_size: int, path: Path, observer: Observer
) -> Images:
    """Return adversarial images of a network, on the CPU: those of the file, else make the file.

    model: in eval mode, on the device of the attack. clean: all images to attack, on the CPU.
    path: named by all that decides the images.

    Raises CheckpointError for a file of anything but images in the ball around the clean ones, with
    their labels and numbers, and the logits that the network gives.
    """
    if path.exists():
        observer.note(f"adversarial images, made before: {path}")
        return read_adversarial(path, model, clean, batch_size)
    x_adv, logits = attack_network(model, clean, batch_size, observer)
    tensors = {"images": x_adv, "labels": clean.labels, "index": clean.index, "logits": logits}
    texts = {"attack": ATTACK, "norm": clean.norm, "epsilon": json.dumps(clean.epsilon)}
    texts |= {"seed": json.dumps(clean.seed)}
    with replacing(path) as file:
        file.write(safetensors_bytes(tensors, texts))
    return x_adv


def attack_network(
    model: nn.Module, clean: AttackBatch, batch_size: int, observer: Observer
) -> tuple[Images, Float[Tensor, "n c"]]:
    """Attack a network in batches; return the images and their logits, on the CPU."""
    attack, total, parts = parse_attack(ATTACK, norm=clean.norm), len(clean.labels), []
    project = geometry(clean.norm).project
    device = device_of(model)
    observer.begin_evaluation()
    with torch.no_grad():
        attacked = surrogates(model, clean.x_nat[:batch_size].to(device))[0]
        for chosen in torch.split(torch.arange(total), batch_size):
            batch = AttackBatch(
                x_nat=clean.x_nat[chosen].to(device),
                labels=clean.labels[chosen].to(device),
                index=clean.index[chosen],
                epsilon=clean.epsilon,
                seed=clean.seed,
                norm=clean.norm,
            )
            x_adv = project(attack.perturb(attacked, batch), batch.x_nat, batch.epsilon)
            parts.append((x_adv.cpu(), model(x_adv).float().cpu()))
            done = int(chosen[-1]) + 1
            observer.attack_batch(AttackProgress(ATTACK, done, total, (done, total)))
    x_adv, logits = map(torch.cat, zip(*parts, strict=True))
    return x_adv, logits


def read_adversarial(path: Path, model: nn.Module, clean: AttackBatch, batch_size: int) -> Images:
    """Read adversarial images of these images and network. Raises CheckpointError for others."""
    hint = "remove it: it is made anew"
    try:
        content = load(path)
    except CheckpointError as error:
        raise CheckpointError(str(error), hint) from error
    x_adv, x_nat = content.get("images"), clean.x_nat
    if not isinstance(x_adv, Tensor) or (x_adv.dtype, x_adv.shape) != (x_nat.dtype, x_nat.shape):
        raise CheckpointError(f"{path}: holds no images {tuple(x_nat.shape)}", hint)
    moved = (geometry(clean.norm).project(x_adv, x_nat, clean.epsilon) - x_adv).abs().max()
    if not moved <= ROUNDING:  # NaN is not
        raise CheckpointError(f"{path}: its images are not in the ball around the clean ones", hint)
    for name, ours in (("labels", clean.labels), ("index", clean.index)):
        found = content.get(name)
        if not isinstance(found, Tensor) or not torch.equal(found, ours):
            raise CheckpointError(f"{path}: its {name} are not those of the clean images", hint)
    expected, logits = network_logits(model, torch.split(x_adv, batch_size)), content.get("logits")
    tolerance = RELATIVE_TOLERANCE * expected.abs().max()
    if not (
        isinstance(logits, Tensor)
        and (logits.dtype, logits.shape) == (expected.dtype, expected.shape)
        and (logits - expected).abs().max() <= tolerance  # NaN is not
    ):
        raise CheckpointError(f"{path}: its logits are not those of the network", hint)
    return x_adv
