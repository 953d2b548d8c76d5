"""Compare robust accuracy under `absld evaluate` and under other libraries' attacks.

    pip install foolbox torchattacks adversarial-robustness-toolbox 'absld[autoattack]'
    absld train && python docs/results/attack_agreement.py RUN
    absld train --norm l2 && python docs/results/attack_agreement.py RUN

Prints a table of attack-agreement.md for a run on the digits, in its norm, on all its test images.
"""

import sys
from pathlib import Path

import eagerpy
import foolbox
import numpy as np
import torch
import torchattacks
from art.attacks.evasion import CarliniLInfMethod, ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn

import absld
from absld.attack import margin, margins
from absld.config.files import read_run_config
from absld.evaluation.attacks import parse_attack
from absld.evaluation.intervals import wilson

FOOLBOX = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}
TORCHATTACKS = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}
ART_NORM = {"linf": np.inf, "l2": 2}


class Margin:
    """The objective of CW-inf, as the loss of foolbox's PGD."""

    def get_loss_fn(self, model, labels):
        def loss(x):
            return eagerpy.astensor(margin(labels.raw)(model(x).raw))

        return loss


class MarginLoss(nn.Module):
    """The objective of CW-inf for ART, which passes one-hot labels."""

    reduction = "sum"

    def forward(self, logits, labels):
        labels = labels if labels.ndim == 1 else labels.argmax(1)
        return margin(labels)(logits)


def art_classifier(model, loss):
    return PyTorchClassifier(model, loss, (3, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu")


def by_art(attack, x, labels):
    return torch.from_numpy(attack.generate(x.numpy(), labels.numpy()))


def attacks(model, x, labels, named, epsilon, norm):
    """Yield attack, library and adversarial images of all images."""
    by_foolbox = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    for ours in named:
        on_margin = ours.objective == "margin"
        bases = (Margin, FOOLBOX[norm]) if on_margin else (FOOLBOX[norm],)
        step, start = ours.step_size * epsilon, ours.uniform_start
        foolbox_pgd = type("PGD", bases, {})(
            abs_stepsize=step, steps=ours.steps, random_start=start
        )
        yield ours.name, "foolbox", foolbox_pgd(by_foolbox, x, labels, epsilons=epsilon)[1]
        if not on_margin:
            torchattacks_pgd = TORCHATTACKS[norm](model, epsilon, step, ours.steps, start)
            yield ours.name, "torchattacks", torchattacks_pgd(x, labels)
        art_pgd = ProjectedGradientDescentPyTorch(
            art_classifier(model, MarginLoss() if on_margin else nn.CrossEntropyLoss()),
            norm=ART_NORM[norm],
            eps=epsilon,
            eps_step=step,
            max_iter=ours.steps,
            num_random_init=int(start),
            batch_size=len(x),
            verbose=False,
        )
        yield ours.name, "ART", by_art(art_pgd, x, labels)
    if norm == "linf":
        art_cw = CarliniLInfMethod(
            art_classifier(model, nn.CrossEntropyLoss()), batch_size=len(x), verbose=False
        )
        x_adv = by_art(art_cw, x, labels)  # a small perturbation, in a ball of no fixed size
        in_ball = (x_adv - x).abs().amax((1, 2, 3)) <= epsilon
        yield "ART's CW-inf", "ART", torch.where(in_ball.view(-1, 1, 1, 1), x_adv, x)


def main(run):
    torch.manual_seed(0)
    np.random.seed(0)  # ART's starts
    config = read_run_config(Path(run) / "config.toml")
    budget = {"epsilon": config.epsilon, "norm": config.norm}
    order = {"linf": torch.inf, "l2": 2}[config.norm]
    named = [parse_attack(name, norm=config.norm) for name in ("pgd20", "pgd20-sat", "cw30")]
    data = absld.load_data("digits", "").test
    model = absld.load_network(run, 10, ("agreement",)).model.eval().requires_grad_(False)
    x, labels = data.images / 255, data.labels
    clean = model(x).argmax(1) == labels
    print("| attack | by | robust accuracy | 95 % interval |\n|---|---|---|---|")

    def row(attack, by, correct):
        figure = wilson(int(correct.sum()), len(correct))
        print(f"| {attack} | {by} | {figure.value:.1%} | {figure.low:.1%} to {figure.high:.1%} |")

    ours = absld.evaluate(model, data, **budget, attacks=named, each=True)
    for k, name in enumerate(ours.attacks):
        row(name, "absld", ours.correct[k])
    for attack, by, x_adv in attacks(model, x, labels, named, **budget):
        distance = (x_adv - x).flatten(1).norm(order, dim=1)
        assert distance.max() <= config.epsilon + 1e-5 and x_adv.min() >= 0 and x_adv.max() <= 1
        row(attack, by, clean & (margins(model(x_adv), labels) < 0))
    row("all three", "absld", ours.robust)
    strongest = absld.evaluate(model, data, **budget, attacks="autoattack")
    row("AutoAttack", "pyautoattack, by absld", strongest.robust)


if __name__ == "__main__":
    main(sys.argv[1])
