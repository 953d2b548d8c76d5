"""ABSLD in one file: distil a small, robust image classifier with fewer weak classes.

Anti-Bias Soft Label Distillation (arXiv 2312.05508): a student learns the soft labels of a robust
teacher. Every class has temperatures of its own: hard classes get sharper labels, easy classes
smoother ones, and after each epoch the temperatures move to make the classes' risks equal.

Notation: x_nat is a natural image with pixels in [0,1], x_adv its adversarial version, y its label;
N is the number of images in a batch, C that of classes. Logits and soft labels are (N,C).

  D1  soft labels    soft_adv = softmax(teacher(x_nat) / T_adv[y]), and soft_nat with T_nat[y]
  D2  attack         x_adv = the point near x_nat that maximises KL(soft_adv || student), by PGD
  D3  two forwards   adv_logits = student(x_adv), then nat_logits = student(x_nat), in train mode
  D4  loss           5/6 KL(soft_adv || adv_logits) + 1/6 KL(soft_nat || nat_logits)
  D5  class risk     R_adv[c] = mean cross-entropy of adv_logits in class c over an epoch; R_nat too
  D6  temperatures   T <- clip(T - rate * gap / max|gap|, 0.5, 5), where gap = R - mean(R)
  D7  schedule       learning rate and temperature rate fall tenfold after each of three milestones

  python absld_min.py                      8x8 digits: about a minute on a CPU
  python absld_min.py --dataset cifar10    the paper's setting; a teacher is trained first
"""

import hashlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

Splits = list[tuple[Tensor, Tensor]]  # training, validation, test: images uint8 (M,3,H,W), labels
Batch = tuple[Tensor, Tensor, Tensor]  # x_nat (N,3,H,W), labels (N,), noise that starts the attack


@dataclass(frozen=True)
class Config:
    """Settings, each a flag. Defaults except dataset are for CIFAR-10, [rel] as in the release."""

    dataset: Literal["digits", "cifar10", "cifar100"] = "digits"
    data: str = "data"  # folder of CIFAR's archive, which is downloaded if it is not there
    out: str = "runs"  # folder of teacher.pt and student.pt, which are overwritten
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["tf32", "fp32"] = "tf32"  # of matmuls and convolutions on CUDA
    seed: int = 0  # of weights, batches and training noise; not of splits or evaluation
    student: Literal["convnet", "resnet18", "wrn-34-10"] = "resnet18"  # [rel]
    teacher_model: Literal["convnet", "resnet18", "wrn-34-10"] = "wrn-34-10"  # [rel]
    teacher: str = ""  # file with the teacher's state dict; without one, TRADES trains a teacher
    epochs: int = 300  # [rel]
    teacher_epochs: int = 76  # as TRADES
    batch_size: int = 128  # [rel]
    fidelity: Literal["paper", "released"] = "paper"  # which temperatures D1 uses, see absld_step
    temperature_rate: float = 0.1  # largest move of a temperature in an epoch [rel]; 0 is RSLAD
    epsilon: float = 8 / 255  # L-infinity radius of every attack [rel]
    padding: int = 4  # zero pixels around an image before a random crop [rel]
    flip: float = 0.5  # probability of a horizontal flip [rel]


DIGITS: dict[str, Any] = {"student": "convnet", "epochs": 40, "teacher_epochs": 30, "epsilon": 0.1}
DIGITS |= {"teacher_model": "convnet", "padding": 1, "flip": 0.0}  # our choice


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose numbers depend on `key` alone, not on what was drawn before."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "big"))


# --- Soft labels and loss ---
def soften(teacher_logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """Return soft labels (N,C): logits (N,C) over the temperature (C,) of each true label (N,)."""
    return F.softmax(teacher_logits / temperature.gather(0, labels).unsqueeze(1), dim=1)  # D1


def soft_label_kl(logits: Tensor, soft_labels: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return KL(soft_labels || softmax(logits)) of (N,C): sum over C, then mean (or sum) over N."""
    return F.kl_div(F.log_softmax(logits, dim=1), soft_labels, reduction=reduction)


def absld_loss(
    adv_logits: Tensor,
    nat_logits: Tensor,
    soft_adv: Tensor,
    soft_nat: Tensor,
    *,
    adv_weight: float = 5 / 6,
    kl_scale: float = 1.0,
) -> Tensor:
    """Return the loss of a batch, from (N,C). [rel]: the same weight, kl_scale 0.1 for C = 10."""
    adv_kl, nat_kl = soft_label_kl(adv_logits, soft_adv), soft_label_kl(nat_logits, soft_nat)
    return kl_scale * (adv_weight * adv_kl + (1 - adv_weight) * nat_kl)  # D4


# --- Attacks ---
def pgd(
    forward: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor], Tensor],
    x_nat: Tensor,
    noise: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Return x_adv (N,3,H,W) that maximises objective(forward(x_adv)), a sum over the batch."""
    x_adv = x_nat + noise  # a random start; only the steps are projected
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(forward(x_adv)), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = x_adv.clamp(x_nat - epsilon, x_nat + epsilon).clamp(0, 1)  # D2
    return x_adv


def training_attack(config: Config, model: nn.Module, soft_labels: Tensor, batch: Batch) -> Tensor:
    """Return x_adv (N,3,H,W) that maximises KL(soft_labels || model), soft_labels (N,C) [rel]."""
    x_nat, _, noise = batch
    objective = partial(soft_label_kl, soft_labels=soft_labels, reduction="sum")
    epsilon, step_size = config.epsilon, config.epsilon / 4
    model.eval()  # keeps the steps of the attack out of batch norm's running statistics
    return pgd(model, objective, x_nat, noise, epsilon=epsilon, step_size=step_size, steps=10)


# --- Class temperatures: what the paper adds ---
def class_risk_sums(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return per-class sums of cross-entropy and image counts, both (C,), of (N,C) and (N,)."""
    risk = F.cross_entropy(logits.detach(), labels, reduction="none")  # (N,)
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)  # (N,C)
    return torch.where(member, risk.unsqueeze(1), 0).sum(0), member.sum(0)  # D5


def update_temperature(
    temperature: Tensor, class_risk: Tensor, *, rate: float, lower: float, upper: float
) -> Tensor:
    """Return the next temperatures (...,C), from mean risks that are NaN for absent classes."""
    # A class at more than average risk gets a lower temperature, so sharper labels; one at less
    # risk a higher temperature. An absent class stays, and is not in the average.
    gap = (class_risk - class_risk.nanmean(-1, keepdim=True)).nan_to_num(0.0)
    largest = gap.abs().amax(-1, keepdim=True)
    # The class with the largest gap moves by `rate`, the others in proportion to their gaps.
    moved = (temperature - rate * gap / largest).clamp(lower, upper)  # D6
    # Nothing moves if risks are equal up to rounding, or if one is infinite, and so the limit.
    limit = gap.shape[-1] * torch.finfo(gap.dtype).eps * class_risk.abs().nan_to_num(0.0, torch.inf)
    return torch.where(largest > limit.amax(-1, keepdim=True), moved, temperature)


# --- Networks; WideResNet's weights are named as in TRADES' checkpoint ---
class WideBlock(nn.Module):
    """Residual block (N,width_in,H,W) -> (N,width,H/stride,W/stride), batch norm first."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv3x3(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.convShortcut = conv1x1(width_in, width, stride) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return torch.add(self.conv2(F.relu(self.bn2(self.conv1(out)))), shortcut)


def build_model(name: str, num_classes: int, *key: int | str) -> nn.Sequential:
    """Return a network (N,3,H,W) -> (N,C) with PyTorch's initial weights, drawn from `key`."""
    net = nn.Sequential()  # calls its parts in the order in which they are added
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator(*key).get_state())
        if name == "convnet":
            for width_in, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
                net.extend([conv3x3(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
        elif name == "resnet18":  # for small images: a 3x3 convolution first, no max pooling
            net.conv1, net.bn1, net.relu = conv3x3(3, 64), nn.BatchNorm2d(64), nn.ReLU()
            net.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
            for number, width_in, width in ((2, 64, 128), (3, 128, 256), (4, 256, 512)):
                shortcut = nn.Sequential(conv1x1(width_in, width, 2), nn.BatchNorm2d(width))
                first = BasicBlock(width_in, width, 2, shortcut)
                net.add_module(f"layer{number}", nn.Sequential(first, BasicBlock(width, width)))
        else:  # WideResNet-34-10: three groups of five blocks, ten times the usual width
            net.conv1 = conv3x3(3, 16)
            for number, width_in, width in ((1, 16, 160), (2, 160, 320), (3, 320, 640)):
                layer = nn.Sequential(WideBlock(width_in, width, 1 if number == 1 else 2))
                layer.extend(WideBlock(width, width, stride=1) for _ in range(4))
                net.add_module(f"block{number}", nn.Sequential(OrderedDict(layer=layer)))
            net.bn1, net.relu = nn.BatchNorm2d(width), nn.ReLU()
        net.pool, net.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()  # (N,width) of the last layer
        net.add_module("fc" if name == "wrn-34-10" else "linear", nn.Linear(width, num_classes))
    return net


# --- Data: whole sets on the device ---
def load_data(config: Config) -> tuple[Splits, list[str]]:
    """Return training, validation and test images, and the names of the classes."""
    if config.dataset == "digits":
        pixels, y = map(torch.from_numpy, load_digits(return_X_y=True))  # (1797,64) from 0 to 16
        x = (pixels * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
        x, x_test, y, y_test = train_test_split(x, y, test_size=599, stratify=y, random_state=0)
        classes, share = list("0123456789"), 0.15
    else:
        source = CIFAR10 if config.dataset == "cifar10" else CIFAR100
        train, test = (source(config.data, train=flag, download=True) for flag in (True, False))
        x, x_test = (torch.tensor(part.data).permute(0, 3, 1, 2) for part in (train, test))
        y, y_test = (torch.tensor(part.targets) for part in (train, test))
        classes, share = train.classes, 0.05
    x, x_val, y, y_val = train_test_split(x, y, test_size=share, stratify=y, random_state=0)
    data = [(x, y), (x_val, y_val), (x_test, y_test)]  # x_val selects the epoch, not x_test
    return [(x.contiguous().to(config.device), y.to(config.device)) for x, y in data], classes


def batches(config: Config, images: Tensor, labels: Tensor, *key: int | str) -> Iterator[Batch]:
    """Yield an epoch's batches of random crops, drawn from `key`; a short last one is dropped."""
    n, side, device = config.batch_size, images.shape[3], images.device
    crops = F.pad(images, [config.padding] * 4).unfold(2, side, 1).unfold(3, side, 1)  # views
    order = torch.randperm(len(images), generator=generator(*key, device=device), device=device)
    for step, index in enumerate(order[: len(order) // n * n].view(-1, n)):
        random = generator(*key, step, device=device)
        dy, dx = torch.randint(crops.shape[2], (2, n), generator=random, device=device)
        mirrored = torch.rand(n, 1, 1, 1, generator=random, device=device) < config.flip
        crop = crops[index, :, dy, dx] / 255  # (N,3,H,W) in [0,1]
        noise = 0.001 * torch.randn(crop.shape, generator=random, device=device)  # [rel]
        yield torch.where(mirrored, crop.flip(3), crop), labels[index], noise


# --- Evaluation ---
def fairness(class_accuracy: Tensor, ddof: int = 0) -> tuple[float, float, float]:
    """Return average, worst class and NSD (std / mean) of accuracies (C,), NaN for absent ones."""
    accuracy = class_accuracy[~class_accuracy.isnan()].cpu().double()
    nsd = accuracy.std(correction=ddof) / accuracy.mean().clamp_min(1e-12)
    return accuracy.mean().item(), accuracy.min().item(), nsd.item()


def evaluate(config: Config, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of each class (2,C), clean and under PGD-20 as in TRADES."""
    model.eval()
    counts, random = labels.bincount(), generator("evaluate", device=labels.device)
    hits, n, epsilon = torch.zeros_like(counts).repeat(2, 1), config.batch_size, config.epsilon
    step_size = 0.003 * epsilon / (8 / 255)
    for x_nat, y in zip(torch.split(images / 255, n), torch.split(labels, n), strict=True):
        noise = torch.empty_like(x_nat).uniform_(-epsilon, epsilon, generator=random)
        objective = partial(F.cross_entropy, target=y, reduction="sum")
        x_adv = pgd(model, objective, x_nat, noise, epsilon=epsilon, step_size=step_size, steps=20)
        with torch.no_grad():
            predictions = torch.stack([model(x_nat), model(x_adv)]).argmax(2)  # (2,N)
        hits.index_add_(1, y, (predictions == y).long())
    return hits / counts


# --- Training ---
def absld_step(
    config: Config, student: nn.Module, teacher: nn.Module, temperature: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, risk sums (2,C), counts (C,). Rows are adv and nat, as in temperature (2,C)."""
    x_nat, labels, _ = batch
    if config.fidelity == "released":  # one buffer serves both: each label gets T_adv[y] * T_nat[y]
        temperature = (temperature[0] * temperature[1]).repeat(2, 1)
    teacher_logits = teacher(x_nat)  # without a graph, for the teacher is frozen
    soft_adv, soft_nat = (soften(teacher_logits, labels, row) for row in temperature)
    x_adv = training_attack(config, student, soft_adv, batch)
    student.train()
    # Two calls, so batch norm never mixes them; the later one weighs more in its statistics.
    adv_logits, nat_logits = student(x_adv), student(x_nat)  # D3
    loss = absld_loss(adv_logits, nat_logits, soft_adv, soft_nat)
    adv_risk, counts = class_risk_sums(adv_logits, labels, temperature.shape[1])
    nat_risk, _ = class_risk_sums(nat_logits, labels, temperature.shape[1])
    return loss, torch.stack([adv_risk, nat_risk]), counts


def trades_step(config: Config, model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of TRADES (arXiv 1901.08573), for a teacher: CE + 6 KL(nat || adv)."""
    x_nat, labels, _ = batch
    with torch.no_grad():
        soft_labels = F.softmax(model.eval()(x_nat), dim=1)
    x_adv = training_attack(config, model, soft_labels, batch)
    log_nat, log_adv = (F.log_softmax(model.train()(x), dim=1) for x in (x_nat, x_adv))
    kl = F.kl_div(log_adv, log_nat, log_target=True, reduction="batchmean")
    return F.nll_loss(log_nat, labels) + 6 * kl


def train(config: Config, model: nn.Module, teacher: nn.Module | None, data: Splits) -> None:
    """Train a student (a teacher, if `teacher` is None); keep the epoch of best average + worst."""
    role = "teacher" if teacher is None else "student"
    (images, labels), validation, _ = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    milestones = [round(at * config.epochs) for at in (215 / 300, 260 / 300, 285 / 300)]  # [rel]
    temperature = torch.ones(2, int(labels.max()) + 1, device=config.device)
    best_score, path = -1.0, f"{config.out}/{role}.pt"
    print(f"{role}\nepoch     loss  clean robust  worst    NSD temperatures")
    for epoch in range(1, config.epochs + 1):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch > m for m in milestones)  # D7
        losses, risks, counts = [], torch.zeros_like(temperature), torch.zeros_like(temperature)
        for batch in batches(config, images, labels, config.seed, role, epoch):
            if teacher is None:
                loss = trades_step(config, model, batch)
            else:
                loss, sums, members = absld_step(config, model, teacher, temperature, batch)
                risks, counts = risks + sums, counts + members
            if not loss.isfinite():  # the one GPU sync of a step
                raise FloatingPointError(f"epoch {epoch}: {loss=}, {temperature=}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        if teacher is not None:
            rate = config.temperature_rate * 0.1 ** sum(epoch + 1 > m for m in milestones)  # D7
            risk = risks / counts
            temperature = update_temperature(temperature, risk, rate=rate, lower=0.5, upper=5.0)
        clean, robust = evaluate(config, model, *validation)
        average, worst, nsd = fairness(robust)
        row = f"{epoch:5} {sum(losses) / len(losses):8.4f} {fairness(clean)[0]:6.1%} {average:6.1%}"
        row += f" {worst:6.1%} {nsd:6.1%}  {temperature.min():.2f} - {temperature.max():.2f}"
        print(row, flush=True)
        if average + worst > best_score:
            best_score = average + worst
            torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))


def main(arguments: list[str] | None = None) -> None:
    """Train a teacher, unless a file has its weights, and a student; test the student."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, kind in Config.__annotations__.items():
        flag, default = "--" + name.replace("_", "-"), getattr(Config, name)
        about = f"default: {default}" + (f", for digits {DIGITS[name]}" if name in DIGITS else "")
        parser.add_argument(flag, type=type(default), choices=get_args(kind) or None, help=about)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    config = Config(**(DIGITS if given.get("dataset", "digits") == "digits" else {}) | given)
    precision = "tf32" if config.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    print(f"seed {config.seed}, device {config.device}, torch {torch.__version__}")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    data, classes = load_data(config)
    layout = torch.channels_last if "cuda" in config.device else torch.contiguous_format
    teacher = build_model(config.teacher_model, len(classes), config.seed, "teacher")
    student = build_model(config.student, len(classes), config.seed, "student")
    for net in (teacher, student):
        net.to(config.device).to(memory_format=layout)
    if config.teacher:
        state = torch.load(config.teacher, map_location="cpu", weights_only=True)
        used = [name for name in state if "sub_block1." not in name]  # TRADES' file has it, unused
        teacher.load_state_dict({name.removeprefix("module."): state[name] for name in used})
    else:
        train(replace(config, epochs=config.teacher_epochs), teacher, None, data)
    train(config, student, teacher.eval().requires_grad_(False), data)
    print("class              clean  PGD-20")
    clean, robust = ([*each, *fairness(each)] for each in evaluate(config, student, *data[2]))
    rows = zip([*classes, "average", "worst class", "NSD"], clean, robust, strict=True)
    for name, natural, adversarial in rows:
        print(f"{name:16} {natural:7.2%} {adversarial:7.2%}")


if __name__ == "__main__":
    main()
