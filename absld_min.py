"""ABSLD in one file: distil a robust network whose classes are about equally robust.

Anti-Bias Soft Label Distillation (arXiv 2312.05508): a student learns the soft labels of a robust
teacher; each class has two temperatures, moved after an epoch to draw the classes' risks level.
With x a clean image, y its class, v the frozen teacher, f the student:
  D1  soft labels     p_adv = softmax(v(x) / T_adv[y]),  p_nat = softmax(v(x) / T_nat[y])
  D2  inner maximum   x_adv = the point within epsilon of x that maximises KL(p_adv || f), by PGD
  D3  two forwards    z_adv = f(x_adv), then z_nat = f(x), in train mode
  D4  loss            5/6 KL(p_adv || z_adv) + 1/6 KL(p_nat || z_nat): one step of SGD
  D5  class risk      R[c] = mean cross-entropy of z_adv (of z_nat) over the images of class c
  D6  temperatures    T <- clip(T - rate * g / max|g|, 0.5, 5), g = R - mean(R), after each epoch
  D7  schedule        lr and rate drop tenfold when 215/300, 260/300, 285/300 of the epochs end
  python absld_min.py                                8x8 digits on a CPU, in about a minute
  python absld_min.py --dataset cifar10              the paper's setting, from nothing to the table
  python absld_min.py --temperature-rate 0           RSLAD: the same with all temperatures 1
  python absld_min.py --dataset folder --data DIR    your images: DIR/{train,test}/CLASS/*
Digits, seeds 0 to 4 (docs/results/digits.md; 2 cores of an AMD EPYC, torch 2.14.1), PGD-20: NSD
13.8 +- 2.7 % (RSLAD 18.8 +- 1.1), worst class 54.3 +- 6.1 (50.4 +- 7.4), average 77.6 (80.0).
Decided here: mean class risks, not sums; kl_scale 1, not 0.1; selection on held-out train images.
"""
import argparse, fractions, functools, hashlib, os, pathlib, re, signal, socket, sys, tempfile, time
from dataclasses import dataclass, fields
from typing import Literal, get_args
import torch
import torch.nn.functional as F
from torch import nn
Model = Literal["convnet", "resnet18", "wrn-34-10"]
@dataclass(frozen=True)
class Config:  # CIFAR-10's setting, each field a flag; [rel] as released, [own] decided here
    dataset: Literal["digits", "cifar10", "cifar100", "folder"] = "digits"
    data: str = "data"  # where the images are, or are downloaded to
    out: str = "runs"  # where networks are saved, and a teacher is found again
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0  # of everything but the split of the images
    student: Model = "resnet18"  # [rel]
    teacher_model: Model = "wrn-34-10"  # [rel]
    teacher: str = ""  # a file of weights; without one TRADES trains a teacher
    epochs: int = 300  # [rel]
    teacher_epochs: int = 76  # as TRADES
    batch_size: int = 128  # [rel]
    fidelity: Literal["paper", "released"] = "paper"  # reading of D1, see train_step
    temperature_rate: float = 0.1  # [rel]
    epsilon: float = 8 / 255  # [rel], pixels being in [0,1]
    max_steps: int = 10**9  # for a trial: at most so many steps an epoch
    allow_weak_teacher: bool = False  # go on with one that is near chance
DIGITS = dict(student="convnet", teacher_model="convnet", epochs=40, teacher_epochs=30, epsilon=0.1)
def generator(device, *key):  # no draw depends on what was drawn before, here or elsewhere
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "big"))
# ---- Soft labels and the loss --------------------------------------------------------------------
def soften(teacher_logits, labels, temperature):
    """Softmax of the logits (N,C), each image's over the temperature (C,) of its true class."""
    # Teacher's side only, no factor T^2. gather, unlike indexing, refuses a label of -1.
    return F.softmax(teacher_logits / temperature.gather(0, labels).unsqueeze(1), dim=1)  # D1
def soft_label_kl(student_logits, soft_labels):  # KL(soft labels || student): sum of C, mean of N
    # log_softmax, for log(softmax) is -inf once two logits are ~103 apart.
    return F.kl_div(F.log_softmax(student_logits, dim=1), soft_labels, reduction="batchmean")
def absld_loss(adv_logits, nat_logits, soft_adv, soft_nat, *, adv_weight=5 / 6, kl_scale=1.0):
    adv, nat = soft_label_kl(adv_logits, soft_adv), soft_label_kl(nat_logits, soft_nat)
    return kl_scale * (adv_weight * adv + (1 - adv_weight) * nat)  # D4; kl_scale is 0.1 in [rel]
# ---- The attack ----------------------------------------------------------------------------------
def project_linf(x_adv, x_nat, epsilon):  # into the ball around x_nat, then the pixel box
    return x_adv.clamp(x_nat - epsilon, x_nat + epsilon).clamp(0, 1)
def pgd(forward, objective, x_nat, noise, *, epsilon, step_size, steps):
    """Climb objective(forward(x)) by signed gradients from x_nat + noise (N,3,H,W), in the ball."""
    x_adv = x_nat + noise  # off the centre, where the KL is flat; clipped only after the first step
    for _ in range(steps):
        x_adv.requires_grad_()
        # The objective sums over the batch: an image's gradient is the same in any company.
        (gradient,) = torch.autograd.grad(objective(forward(x_adv)), x_adv)
        x_adv = project_linf(x_adv.detach() + step_size * gradient.sign(), x_nat, epsilon)  # D2
    return x_adv
# ---- The class temperatures: what the paper adds -------------------------------------------------
def class_risk_sums(logits, labels, num_classes):
    """Per class (C,): sum of the cross-entropies, number of images. Both add up over batches."""
    risk = F.cross_entropy(logits.detach(), labels, reduction="none")  # (N,)
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)  # (N,C)
    return torch.where(member, risk.unsqueeze(1), 0).sum(0), member.sum(0)  # D5
def update_temperature(temperature, class_risk, *, rate, lower, upper):
    """New temperatures (C,) from old ones and class risks (C,), where NaN marks an absent class."""
    # Above the mean risk: colder, so sharper labels, a firmer lesson. Below it: warmer, smoother.
    # The farthest class moves by the full rate at any scale of the risks, the rest in proportion.
    risk = class_risk[~class_risk.isnan()]
    gap = (class_risk - risk.mean()).nan_to_num(0.0)  # (C,); an absent class has 0: no move
    # Equal risks give 0/0, every temperature NaN for ever, or, unequal by rounding, a full move.
    rounding = len(risk) * torch.finfo(risk.dtype).eps * risk.abs().max() if len(risk) else 0
    if not risk.isfinite().all() or gap.abs().max() <= rounding:
        return temperature.clone()
    return (temperature - rate * gap / gap.abs().max()).clamp(lower, upper)  # D6
# ---- Networks: weights are named as in published checkpoints -------------------------------------
def conv(width_in, width, stride=1, size=3):
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=False)
class ResidualBlock(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        resizes = width_in != width and (conv(width_in, width, stride, 1), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(*resizes or ())
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))
class WideBlock(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = conv(width_in, width, stride, size=1) if width_in != width else None
    def forward(self, x):
        out = F.relu(self.bn1(x))  # normalised first; a shortcut that resizes starts here
        shortcut = self.convShortcut(out) if self.convShortcut else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))
def build_model(name, num_classes, *key):
    with torch.random.fork_rng(devices=[]):  # PyTorch's own initialisation, but from a key
        torch.default_generator.set_state(generator("cpu", *key).get_state())
        net = nn.Sequential()
        if name == "convnet":  # small: for the digits, and for quick runs on 32x32 images
            for width_in, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
                net.extend([conv(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
        elif name == "resnet18":  # for 32x32 images: a 3x3 stem, and no pooling behind it
            net.conv1, net.bn1, net.relu = conv(3, 64), nn.BatchNorm2d(64), nn.ReLU()
            for i, (width_in, width) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
                first = ResidualBlock(width_in, width, stride=min(i, 2))
                net.add_module(f"layer{i}", nn.Sequential(first, ResidualBlock(width, width, 1)))
        else:  # WideResNet-34-10: three groups of five blocks, ten times the usual width
            net.conv1 = conv(3, 16)
            for i, (width_in, width) in enumerate(((16, 160), (160, 320), (320, 640)), 1):
                net.add_module(f"block{i}", group := nn.Sequential())
                group.layer = nn.Sequential(WideBlock(width_in, width, stride=min(i, 2)))
                group.layer.extend(WideBlock(width, width, 1) for _ in range(4))
            net.bn1, net.relu = nn.BatchNorm2d(width), nn.ReLU()
        net.pool, net.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        net.add_module("fc" if name == "wrn-34-10" else "linear", nn.Linear(width, num_classes))
        return net
# ---- Data: a set is images (N,3,H,W) uint8 and labels (N,), whole on the device ------------------
def split(images, labels, size):  # by class, `size` images second; alike for all seeds
    from sklearn.model_selection import train_test_split
    parts = train_test_split(images, labels, test_size=size, stratify=labels, random_state=0)
    return [(parts[0], parts[2]), (parts[1], parts[3])]
def load_data(config):  # training, validation and test set; names of the classes
    if config.dataset == "digits":
        from sklearn.datasets import load_digits
        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))  # (1797,64), 0 to 16
        images = (pixels * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
        (train, test), classes, share = split(images, labels, 599), list("0123456789"), 0.15
    else:
        from torchvision import datasets
        from torchvision.transforms.v2.functional import pil_to_tensor, resize
        def read(path):
            try:
                return datasets.folder.default_loader(path)
            except Exception as error:  # Pillow raises many kinds, and seldom names the file
                raise OSError(f"cannot read {path}: {error}") from error
        if config.dataset == "folder":  # isfile: what is no image is an error, not passed over
            parts = [datasets.ImageFolder(f"{config.data}/{part}", None, None, read, os.path.isfile)
                     for part in ("train", "test")]
        else:
            socket.setdefaulttimeout(10)  # a network that never answers is none
            source = getattr(datasets, config.dataset.upper())
            parts = [source(config.data, train=train, download=True) for train in (True, False)]
        classes, share = parts[0].classes, 0.05  # [own]
        if len(classes) < 2 or classes != parts[1].classes:
            raise ValueError(f"classes in train: {classes}, in test: {parts[1].classes}")
        train, test = [(torch.stack([resize(pil_to_tensor(x), [32, 32]) for x, _ in part]),
                        torch.tensor(part.targets)) for part in parts]
    n, rarest = len(train[1]), max(2, int(train[1].bincount().min()))
    sets = [*split(*train, max(round(share * n), -(-n // rarest))), test]  # each class in each set
    if len(sets[0][1]) < config.batch_size:
        raise ValueError(f"{len(sets[0][1])} training images do not fill --batch-size")
    return [[tensor.to(config.device) for tensor in data] for data in sets], classes
def batches(config, images, labels, *key):  # an epoch; a short last batch is dropped
    (count, _, height, width), device, n = images.shape, images.device, config.batch_size
    padding, flip = (1, 0.0) if config.dataset == "digits" else (4, 0.5)  # [own], [rel]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # no copies
    order = torch.randperm(count, generator=generator(device, *key), device=device)
    for step in range(min(count // n, config.max_steps)):
        index, random = order[step * n : (step + 1) * n], generator(device, *key, step)
        dy, dx = torch.randint(2 * padding + 1, (2, n), generator=random, device=device)
        mirror = torch.rand(n, 1, 1, 1, generator=random, device=device) < flip
        crop = windows[index, :, dy, dx] / 255  # (N,3,H,W)
        noise = 0.001 * torch.randn(crop.shape, generator=random, device=device)  # [rel]
        yield torch.where(mirror, crop.flip(3), crop), labels[index], noise  # start of the attack
# ---- Evaluation ----------------------------------------------------------------------------------
def fairness(class_accuracy, ddof=0):  # (C,) -> average, worst class, NSD = std / mean
    accuracy = class_accuracy[~class_accuracy.isnan()].cpu().double()  # NaN: no image of this class
    nsd = accuracy.std(correction=ddof) / accuracy.mean().clamp_min(1e-12)
    return accuracy.mean().item(), accuracy.min().item(), nsd.item()
def evaluate(model, images, labels, epsilon):  # (2,C) class accuracies: clean, under PGD-20
    counts, random = labels.bincount(), generator(labels.device, "evaluate")
    hits = torch.zeros(2, len(counts), dtype=torch.long, device=labels.device)
    for x_nat, y in zip((images / 255).split(500), labels.split(500)):
        noise = torch.empty_like(x_nat).uniform_(-epsilon, epsilon, generator=random)
        x_adv = pgd(model.eval(), lambda z: F.cross_entropy(z, y, reduction="sum"), x_nat, noise,
                    epsilon=epsilon, step_size=0.003 * epsilon / (8 / 255), steps=20)  # TRADES
        for row, x in zip(hits, (x_nat, x_adv)):
            row += y[model(x).argmax(1) == y].bincount(minlength=len(counts))
    return hits / counts  # of whole numbers, so exact
# ---- Training ------------------------------------------------------------------------------------
def attack(config, model, soft_labels, x_nat, noise):  # eval mode: batch norm is not to see it
    return pgd(model.eval(), lambda z: len(z) * soft_label_kl(z, soft_labels), x_nat, noise,
               epsilon=config.epsilon, step_size=config.epsilon / 4, steps=10)  # [rel]
def train_step(config, student, teacher, temperature, x_nat, labels, noise):
    """D1 to D5 of a batch: the loss, and (3,C): class risk sums adversarial, natural, counts."""
    teacher_logits = teacher.eval()(x_nat).detach()  # (N,C)
    if config.fidelity == "released":  # it divides one buffer in place, by T_adv[y], then T_nat[y]
        temperature = temperature.prod(0).expand(2, -1)
    soft_adv, soft_nat = (soften(teacher_logits, labels, row) for row in temperature)
    x_adv = attack(config, student, soft_adv, x_nat, noise)
    student.train()
    # Two forwards in this order: batch norm sees the adversarial images first, never both at once.
    adv_logits, nat_logits = student(x_adv), student(x_nat)  # D3
    loss = absld_loss(adv_logits, nat_logits, soft_adv, soft_nat)
    adv_risk, counts = class_risk_sums(adv_logits, labels, temperature.shape[1])
    nat_risk, _ = class_risk_sums(nat_logits, labels, temperature.shape[1])
    return loss, torch.stack([adv_risk, nat_risk, counts])
def trades_step(config, model, _, temperature, x_nat, labels, noise):
    """Cross-entropy on clean images + 6 KL(f(x) || f(x_adv)), x_adv maximising that KL."""
    clean = F.softmax(model.eval()(x_nat), dim=1).detach()
    x_adv = attack(config, model, clean, x_nat, noise)
    log_nat, log_adv = (F.log_softmax(model.train()(x), dim=1) for x in (x_nat, x_adv))
    robust = F.kl_div(log_adv, log_nat, log_target=True, reduction="batchmean")
    loss = F.nll_loss(log_nat, labels) + 6 * robust  # gradient through both sides of the KL
    return loss, temperature.new_zeros(3, temperature.shape[1])  # no class counted: none moves
def train(config, model, teacher, sets, num_classes, path, loss_of=train_step):
    """All epochs; path and the model get the one that is best on the validation images."""
    role, epochs = ("student", config.epochs) if teacher else ("teacher", config.teacher_epochs)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=2e-4)  # [rel]
    temperature = torch.ones(2, num_classes, device=config.device)  # rows: adv, nat
    milestones = [round(m / 300 * epochs) for m in (215, 260, 285)]  # [rel], of 300 epochs
    best, history = {}, []
    print("epoch     lr    loss  clean robust  worst    NSD temperatures seconds images/s")
    for epoch in range(1, epochs + 1):
        start, losses, risks = time.perf_counter(), [], 0
        lr = optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch > m for m in milestones)  # D7
        for step, batch in enumerate(batches(config, *sets[0], config.seed, role, epoch)):
            loss, risk = loss_of(config, model, teacher, temperature, *batch)
            if not loss.isfinite():  # before the step, which would spread it to all weights
                raise FloatingPointError(f"{epoch=} {step=} {loss=} {risk=} {temperature=}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            risks += risk
        rate = config.temperature_rate * 0.1 ** sum(epoch >= m for m in milestones)
        temperature = torch.stack([update_temperature(old, risk / risks[2], rate=rate, lower=0.5,
                                   upper=5.0) for old, risk in zip(temperature, risks)])  # [rel]
        seconds, loss = time.perf_counter() - start, sum(losses) / len(losses)
        clean, robust = evaluate(model, *sets[1], config.epsilon)
        mean, (average, worst, nsd) = fairness(clean)[0], fairness(robust)
        history.append(dict(epoch=epoch, lr=lr, loss=loss, clean=clean, robust=robust,
                            temperature=temperature, seconds=seconds, score=average + worst))
        print(f"{epoch:5} {lr:6.4f} {loss:7.4f} {mean:6.1%} {average:6.1%} {worst:6.1%} {nsd:6.3f}"
              f"  {temperature.min():4.2f} - {temperature.max():4.2f} {seconds:7.1f}"
              f" {len(losses) * config.batch_size / seconds:8.0f}", flush=True)
        if not best or average + worst > best["score"]:
            best, state = history[-1], {k: v.clone() for k, v in model.state_dict().items()}
        saved = dict(best, model=state, sha256=digest(state), history=history, config=vars(config))
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            torch.save(saved, f"{folder}/whole")  # then renamed at once: never half a file
            os.replace(f"{folder}/whole", f"{path}.best")
    os.replace(f"{path}.best", path)  # only a finished run gets the name that is used again
    model.load_state_dict(state)
train_teacher = functools.partial(train, loss_of=trades_step)  # its argument `teacher` is None
# ---- Files and main ------------------------------------------------------------------------------
def digest(state):  # SHA-256 over the sorted names, each followed by dtype, shape, raw bytes
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update((name + f"{tensor.dtype}{tuple(tensor.shape)}").encode())
        sha.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
def load_weights(model, path):  # a state dict, bare or wrapped
    try:
        content = state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        for wrapper in ("state_dict", "model_state_dict", "model", "net", "ema"):
            state = state.get(wrapper, state)
        sound = content.get("sha256", digest(state)) == digest(state)
    except Exception as error:  # a broken file can make the unpickler raise anything
        held = re.findall(r"GLOBAL (\S+)", str(error)) or pathlib.Path(path).read_bytes()[:20]
        raise ValueError(f"{path}: no state dict, or half of one, but {held}") from error
    if not sound:
        raise ValueError(f"{path}: its tensors have changed since their SHA-256 was taken")
    odd, state = state.keys(), {re.sub(r"^((module|model|_orig_mod)\.)+", "", name): tensor
                                for name, tensor in state.items() if "sub_block1." not in name}
    if odd := sorted(odd - state.keys()):
        print(f"{path}: {len(odd)} tensors renamed or left out, such as {odd[0]}", file=sys.stderr)
    if odd := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: tensor {odd[0]} holds NaN or infinity")
    if odd := sorted(state.keys() ^ model.state_dict().keys()):
        like = {m: len(build_model(m, 2).state_dict().keys() & state) for m in get_args(Model)}
        raise ValueError(f"{path}: lacks or adds {odd[:5]}; nearest: {max(like, key=like.get)}")
    model.load_state_dict(state)
def main(argv=None):  # exit codes: 2 usage, 3 data, 4 teacher, 5 not finite, 1 the rest
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="absld_min.py [--FLAG VALUE ...]   (--help lists the flags)", allow_abbrev=False)
    parser.register("type", float, lambda s: float(fractions.Fraction(s) if "/" in s else s))
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(
            choices=get_args(f.type) or None, type=f.type if f.type in (int, float) else str)
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"default: {f.default}", **kind)
    code, way_out = 2, "see --help; --device cpu works everywhere, --out must be writable"
    try:
        given = vars(parser.parse_args(argv))
        config = Config(**(DIGITS if given.get("dataset", "digits") == "digits" else {}) | given)
        if not (0 <= config.epsilon <= 1 and 0 <= config.temperature_rate <= 10 and min(
                config.epochs, config.teacher_epochs, config.batch_size, config.max_steps) >= 1):
            raise ValueError("--epsilon must be in [0,1], the rate in [0,10], numbers 1 or more")
        torch.zeros(1, device=config.device).item()
        torch.backends.cudnn.deterministic = True
        os.makedirs(config.out, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()  # to fail now, not after an epoch
        print(f"seed {config.seed}, device {config.device}, torch {torch.__version__}")
        code, way_out = 3, f"needed in {config.data}: {{train,test}}/CLASS/*, or CIFAR's tar.gz"
        sets, classes = load_data(config)
        teacher, student = (build_model(name, len(classes), config.seed, role).to(config.device)
            for role, name in (("teacher", config.teacher_model), ("student", config.student)))
        made = [vars(config)[k] for k in "seed teacher_epochs batch_size epsilon max_steps".split()]
        key = digest(dict(images=sets[0][0], labels=sets[0][1], flags=torch.DoubleTensor(made)))
        path = config.teacher or f"{config.out}/teacher-{config.teacher_model}-{key[:8]}.pt"
        code, way_out = 4, "needed: --teacher-model's weights, longer training, or memory"
        if os.path.exists(path) or config.teacher:
            load_weights(teacher, path)
        else:
            train_teacher(config, teacher, None, sets, len(classes), path)
        accuracy = fairness(evaluate(teacher, *sets[1], 0.0)[0])[0]
        if accuracy < 1 / len(classes) + 0.05 and not config.allow_weak_teacher:
            raise ValueError(f"{path}: near chance, {accuracy:.1%} clean (--allow-weak-teacher)")
        code, way_out = 1, "does --out still take files? --batch-size fit? *.best is the best epoch"
        path = f"{config.out}/student-{hashlib.sha256(repr(config).encode()).hexdigest()[:8]}.pt"
        train(config, student, teacher.eval().requires_grad_(False), sets, len(classes), path)
        accuracies = evaluate(student, *sets[2], config.epsilon)
        worst = accuracies.sort().values[:, : max(1, len(classes) // 10)].mean(1)
        rows = [*zip(classes, *accuracies), ("worst 10 % of classes", *worst)]
        print(f"{path}\n{'class':22}   clean  PGD-20")
        rows += zip(("average", "worst class", "NSD"), *map(fairness, accuracies))
        for name, clean, robust in rows:
            print(f"{name:22} {clean:7.2%} {robust:7.2%}")
        for role, model in (("teacher", teacher), ("student", student)):
            print(f"{role} sha256: {digest(model.state_dict())}")
    except (OSError, RuntimeError, ValueError, ArithmeticError, AssertionError, ImportError) as e:
        code, way_out = (5, "see *.best") if type(e) is FloatingPointError else (code, way_out)
        print(f"error: {' '.join(str(e).split())}\n{way_out}", file=sys.stderr)
        sys.exit(code)
if __name__ == "__main__":
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # quiet in `| head`
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (signal.signal(n, signal.SIG_DFL), sys.exit(128 + n)))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # odd class names
    main()
