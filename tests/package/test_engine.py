"""The engine: every technique computes what the plain step computes.

In float64 exactly, where only the order of sums is as before; else to rounding, which the tests
say. In bfloat16 it is judged on what the attack reaches, and on robust accuracy, with the spread
over starts of the attack as the yardstick.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_trainer import CONFIG, TRAIN, VALIDATION, image_set, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import absld
import absld.engine.cuda_graph
import absld.models.architectures
from absld.attack import cross_entropy, kl
from absld.config.settings import TrainConfig
from absld.engine.batch_norm_folding import Folded
from absld.engine.cuda_graph import Recorded, tensors_of
from absld.engine.engine import Compiled, Engine, training_attack
from absld.engine.logit_cache import Bank, RememberingTeacher, fill
from absld.engine.precision import arithmetic, in_precision, laid_out
from absld.errors import NonFiniteError, UsageError
from absld.models.architectures import Normalised
from absld.seeding import global_generator
from absld.trainer import Training

SMALL = TrainConfig(epsilon=0.1, attack_steps=4)


def warmed(net, *key, side=8):
    """In float64, its batch statistics those of some images, so that folding them is seen."""
    with global_generator("runtime", *key), torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        net.double().train()
        for _ in range(3):
            net(torch.rand(8, 3, side, side, dtype=torch.float64))
    return net


def named(name):
    return lambda: absld.build_model(name, 3, "runtime")


def odd():
    """Biases, no affine part, a convolution with two readers, one that is called twice."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.plain = nn.BatchNorm2d(4, affine=False)
            self.read_twice = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            self.twice, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.live = nn.Conv2d(4, 4, 1)
            self.batch = nn.BatchNorm2d(4, track_running_stats=False)
            self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.plain(self.first(x)))
            y = self.read_twice(x)
            x = F.relu(self.norm(y)) + y
            x = self.after(self.twice(F.relu(self.twice(x))))
            x = F.dropout(self.batch(self.live(x)), 0.5, self.training)
            return self.linear(self.dropout(x).mean((2, 3)))

    with global_generator("odd"):
        return Odd()


def normalised():
    mean = torch.tensor([0.4, 0.5, 0.6])
    return Normalised(absld.build_model("convnet", 3, "runtime"), mean, mean / 2)


NETWORKS = {
    **{name: named(name) for name in ("convnet", "resnet18", "preactresnet18", "mobilenetv2")},
    "bottlenecks": named("resnet50"),
    "wrn": lambda: absld.models.architectures.WideResNet(10, 1, 3),
    "odd": odd,
    "normalised": normalised,
}
FOLDS = {"convnet": 3, "resnet18": 20, "mobilenetv2": 57, "odd": 1, "normalised": 3}
network = pytest.mark.parametrize("name", NETWORKS)


def some(n=6, side=8, seed=0):
    """Images, noise and soft labels."""
    random = torch.Generator().manual_seed(seed)
    x_nat = torch.rand(n, 3, side, side, generator=random, dtype=torch.float64)
    noise = 0.001 * torch.randn(x_nat.shape, generator=random, dtype=torch.float64)
    soft = F.softmax(3 * torch.randn(n, 3, generator=random, dtype=torch.float64), dim=1)
    return x_nat, noise, soft


def attacked(net, config=SMALL, **given):
    x_nat, noise, soft = some(**given)
    engine = Engine(laid_out(net, config.channels_last), config)
    return training_attack(config)(engine, kl(soft), x_nat, noise)


# --- Folded batch norm ---


@network
def test_a_folded_copy_gives_the_same_attack_exactly(name):
    """Its logits differ by rounding, the signs of its gradients do not."""
    net = warmed(NETWORKS[name](), name)
    plain = attacked(net)
    folded = attacked(net, replace(SMALL, fold_batch_norm=True))
    assert torch.equal(plain, folded) and not torch.equal(plain, some()[0])
    x_nat, net = some()[0], net.eval()
    with torch.no_grad():
        torch.testing.assert_close(Folded(net)(x_nat), net(x_nat), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FOLDS)
def test_what_can_be_folded_is(name):
    net = warmed(NETWORKS[name](), name)
    folded = Folded(net)
    assert len(folded.pairs) == FOLDS[name]
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    there = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert left == there - FOLDS[name]


def test_a_copy_follows_the_weights_when_the_attack_begins():
    net = warmed(absld.build_model("convnet", 3, "runtime"))
    engine = Engine(net, replace(SMALL, fold_batch_norm=True))
    x_nat, noise, soft = some()
    attack = training_attack(SMALL)
    before = attack(engine, kl(soft), x_nat, noise)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.2).add_(0.01)
    after = attack(engine, kl(soft), x_nat, noise)
    assert torch.equal(after, attacked(net)) and not torch.equal(after, before)


def test_folding_leaves_the_network_as_it_is():
    net = warmed(odd())
    net.dropout.eval()
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    Folded(net)
    assert [module.training for module in net.modules()] == modes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.requires_grad for p in net.parameters())


class Branching(nn.Sequential):
    """Looks at the values of its input, which a trace has not."""

    def forward(self, x):
        return super().forward(x if x.mean() < 2 else x / 2)


def test_a_network_that_cannot_be_traced_is_refused_before_training():
    with pytest.raises(UsageError) as caught:
        train(
            replace(CONFIG, fold_batch_norm=True),
            student=Branching(nn.Flatten(), nn.Linear(48, 3)),
        )
    assert "batch norm cannot be folded" in str(caught.value)
    assert caught.value.way_out == "leave out --fold-batch-norm"


def test_batch_norm_of_several_devices_is_folded_too():
    """And in eval mode it is the same: the attack of a student that was converted."""
    net = warmed(absld.build_model("convnet", 3, "runtime"))
    plain = attacked(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert len(Folded(net).pairs) == 3
    assert torch.equal(attacked(net, replace(SMALL, fold_batch_norm=True)), plain)


def test_batch_norm_of_several_devices_is_put_into_the_student(monkeypatch):
    """Where there is a CUDA device. Names and values stay, and the student is the one given."""
    monkeypatch.setattr("absld.trainer.check_speed", lambda config, device: None)
    student = absld.build_model("convnet", 3, "ours")
    names = list(student.state_dict())
    train(replace(CONFIG, epochs=1, sync_batch_norm=True), student=student)
    kinds = [type(module) for module in student if "BatchNorm" in type(module).__name__]
    assert kinds == [nn.SyncBatchNorm] * 3 and list(student.state_dict()) == names


# --- Trainings ---

DOUBLE = image_set(12, dtype=torch.float64), image_set(9, seed=1, dtype=torch.float64)


def trained(data=DOUBLE, double=True, **settings):
    """Weights after each step, and the reports, of a training with batch norm in all of it."""
    student, teacher = (absld.build_model("convnet", 3, role) for role in ("ours", "theirs"))
    if double:
        student, teacher = student.double(), teacher.double()
    weights = []
    _, reports = train(
        replace(CONFIG, epochs=2, **settings),
        student=student,
        teacher=teacher,
        data=data,
        on_step=lambda step: weights.append(absld.digest(student.state_dict())),
    )
    return weights, reports, student


@pytest.mark.parametrize("method", ["absld", "trades", "adaad", "absld-margins", "fair-rslad"])
@pytest.mark.parametrize(
    "settings", [{"fold_batch_norm": True}, {"check_every": 2}, {"check_every": 99}]
)
def test_a_training_is_the_same_in_float64(method, settings):
    """To the bits: weights after every step, losses, class risks, accuracies."""
    plain, engine = trained(method=method), trained(method=method, **settings)
    assert engine[0] == plain[0] and len(set(plain[0])) > 4
    for mine, theirs in zip(engine[1], plain[1], strict=True):
        times = {"seconds": 0, "images_per_second": 0}
        assert mine.record() | times == theirs.record() | times


@pytest.mark.parametrize("settings", [{"channels_last": True}, {"compile": True}], ids=str)
def test_another_order_of_sums_is_rounding(settings):
    """Convolutions that lie otherwise, or are compiled, add up in another order."""
    plain, engine = trained()[2], trained(**settings)[2]
    torch.testing.assert_close(engine.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


@network
def test_channels_last_gives_the_same_attack(name):
    net = warmed(NETWORKS[name](), name)
    plain = attacked(net)
    assert torch.equal(attacked(net, replace(SMALL, channels_last=True)), plain)


# --- Precision of the parts ---


def test_each_part_has_its_precision():
    """Seen from inside: the type that a convolution gives, in the teacher, attack and training."""
    student, teacher = (absld.build_model("convnet", 3, role) for role in ("ours", "theirs"))
    seen = {}

    def note(part):
        def hook(module, x, out):
            where = part or ("training" if module.training else "attack")
            seen.setdefault(where, set()).add(out.dtype)

        return hook

    def precisions(**settings):
        seen.clear()
        stop = iter(range(1))
        train(
            replace(CONFIG, epochs=1, max_steps=1, **settings), student=student, teacher=teacher,
            on_step=lambda report: report.phase == "validation" or seen.update(
                {"attack of training": seen.pop("attack"), next(stop, None): None}
            ),
        )  # fmt: skip
        return {k: v for k, v in seen.items() if v and k != "attack"}

    half, full = {torch.bfloat16}, {torch.float32}
    student[0].register_forward_hook(note(None))
    teacher[0].register_forward_hook(note("teacher"))
    # The check that a network fits the images is in full precision.
    assert precisions(precision="bf16") == {
        "teacher": half | full, "training": half, "attack of training": half | full,
    }  # fmt: skip
    assert precisions(teacher_precision="bf16") == {
        "teacher": half | full, "training": full, "attack of training": full,
    }  # fmt: skip
    assert precisions(attack_precision="bf16") == {
        "teacher": full, "training": full, "attack of training": half | full,
    }  # fmt: skip
    assert precisions(precision="bf16", attack_precision="fp32", teacher_precision="fp32") == {
        "teacher": full, "training": half, "attack of training": full,
    }  # fmt: skip


@pytest.mark.parametrize(("around", "inside"), [("fp32", "tf32"), ("tf32", "fp32")])
def test_tf32_of_the_parts(around, inside):
    """torch's switches as they are inside the forwards."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = absld.build_model("convnet", 3, "runtime")

        def forward(self, x):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return self.net(x)

    said = {"fp32": "ieee", "tf32": "tf32"}
    student = Net()
    config = replace(CONFIG, precision=around, attack_precision=inside)
    x_nat, noise, soft = (tensor.float() for tensor in some())
    with arithmetic(around):
        engine = Engine(student, config)
        training_attack(config)(engine, kl(soft), x_nat, noise)
        assert seen == [said[inside]] * CONFIG.attack_steps
        seen.clear()
        engine.train()(x_nat)
        assert seen == [said[around]]
        seen.clear()
        in_precision(student, inside, around)(x_nat)
        assert seen == [said[inside]]


@pytest.fixture(scope="module")
def digits():
    """A student that has learned, some images, and labels that its attack goes against."""
    splits = absld.load_data("digits", "nowhere")
    config = replace(TrainConfig(), epochs=6, padding=1, flip=0.0, epsilon=0.1, method="trades")
    student = absld.build_model("convnet", 10, "runtime")
    list(absld.fit(student, None, splits.train, splits.validation, config, role="teacher"))
    x_nat = splits.test.images[:250] / 255
    with torch.no_grad():
        soft = F.softmax(student.eval()(x_nat), dim=1)
    return student, x_nat, splits.test.labels[:250], soft


def reached(digits, seed, **settings):
    """What the attack reaches, by the student in full precision: objective, and robust accuracy."""
    student, x_nat, labels, soft = digits
    config = TrainConfig(epsilon=0.1, **settings)
    noise = 0.001 * torch.randn(x_nat.shape, generator=torch.Generator().manual_seed(seed))
    engine = Engine(student, config)
    x_adv = training_attack(config)(engine, kl(soft), x_nat, noise)
    with torch.no_grad():
        logits = student.eval()(x_adv)
    return kl(soft)(logits).item() / len(x_nat), (logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize(
    "settings",
    [{"attack_precision": "bf16"}, {"attack_precision": "bf16", "fold_batch_norm": True}],
    ids=["bf16", "folded bf16"],
)
def test_half_precision_is_within_the_spread_of_starts(digits, settings):
    """Means over eight starts, against their spread: the attack is not weaker (it may be stronger:
    its rounding leaves flat places), and as many images withstand it."""
    objective, robust = torch.tensor([reached(digits, seed) for seed in range(8)]).T
    half, robust_half = torch.tensor([reached(digits, seed, **settings) for seed in range(8)]).T
    assert objective.max() - objective.min() > 0 < robust.max() - robust.min()
    assert objective.mean() - half.mean() <= objective.max() - objective.min()
    assert (robust.mean() - robust_half.mean()).abs() <= robust.max() - robust.min()


# --- Looks for a NaN ---


class Infinite(torch.autograd.Function):
    """The input as it is, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Breaks(nn.Module):
    """Breaks in the nth training step, by its output or by its gradient."""

    def __init__(self, n, how):
        super().__init__()
        self.model, self.left, self.how = absld.build_model("convnet", 3, "ours"), 2 * n - 1, how

    def forward(self, x):
        self.left -= self.training
        logits = self.model(x)
        if self.left > 0 or not self.training:
            return logits
        return self.how(logits)


@pytest.mark.parametrize("check_every", [1, 2, 3, 50])
@pytest.mark.parametrize(
    "how", [Infinite.apply, lambda x: x * float("nan")], ids=["gradient", "loss"]
)
def test_the_step_that_broke_is_named_whenever_it_is_looked_at(check_every, how, tmp_path):
    """Steps 1 to 3 are epoch 1; the fifth is the second of epoch 2."""
    run = absld.RunDirectory(tmp_path)
    student = Breaks(5, how)
    with pytest.raises(NonFiniteError, match=r"^epoch 2, step 2: \{'loss'"):
        train(replace(CONFIG, check_every=check_every), student=student, run=run)
    if check_every == 1:  # before the optimiser's step
        assert all(p.isfinite().all() for p in student.parameters())
    assert [record["epoch"] for record in run.records()] == [1]
    saved = absld.storage.checkpoint.load(run.last)
    assert all(t.isfinite().all() for t in saved["model"].values())


def test_nothing_broken_is_saved_by_an_interruption_between_two_looks(tmp_path):
    run, student = absld.RunDirectory(tmp_path), Breaks(4, lambda x: x * float("nan"))

    def stop(report):
        if report.epoch == 2:
            raise absld.Interrupted(15)

    with pytest.raises(NonFiniteError, match="step 1: "):
        train(replace(CONFIG, check_every=50), student=student, run=run, on_step=stop)
    assert all(
        t.isfinite().all() for t in absld.storage.checkpoint.load(run.last)["model"].values()
    )


class Waits(TorchDispatchMode):
    """Notes what a program can only go on from when the device has answered."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.WAITS:
            self.noted.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["absld", "fair-rslad", "absld-margins", "trades"])
def test_no_step_waits_for_the_device(method, tmp_path, monkeypatch):
    """But to look at the losses, and to ask a bank that is not whole: counted on a CPU, without the
    check of the labels' range, which is made there alone."""
    waits, tolist = Waits(), torch.Tensor.tolist
    monkeypatch.setattr("absld.temperature.check_batch", lambda *given: None)
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: waits.noted.append("tolist") or tolist(self)
    )

    def noted(hold, **settings):
        config = replace(CONFIG, method=method, fold_batch_norm=True, **settings)
        training = Training(
            absld.build_model("convnet", 3, "ours"), absld.build_model("convnet", 3, "theirs"),
            TRAIN, VALIDATION, config, "student", lambda report: None, Bank(tmp_path, 1.0),
        )  # fmt: skip
        if isinstance(training.teacher, RememberingTeacher):
            list(fill(training.teacher, training.views, 50))
            if hold:
                training.teacher.hold(torch.device("cpu"))
        draws = list(training.draws())
        waits.noted = []
        with waits:
            for draw in draws:
                training.step(draw)
        assert len(draws) == 3
        return waits.noted

    assert noted(True, check_every=99) == []
    assert noted(True) == ["tolist"] * 3
    if method != "trades":
        assert len(noted(False, check_every=99)) >= 3


# --- What a device has not, and what cannot be compiled ---


@pytest.mark.parametrize("name", ["cuda_graph", "sync_batch_norm"])
def test_what_needs_a_cuda_device_says_so(name):
    with pytest.raises(UsageError) as caught:
        train(replace(CONFIG, **{name: True}))
    flag = f"--{name.replace('_', '-')}"
    assert str(caught.value) == f"{flag} needs a CUDA device, not cpu"
    assert caught.value.way_out == f"leave out {flag}"


def test_what_cannot_be_compiled_says_so(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: torch._dynamo.disable(fails))

    def fails(x):
        raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler"), None)

    with pytest.raises(UsageError) as caught:
        Compiled(nn.Identity())(torch.ones(1))
    assert "--compile: " in str(caught.value) and caught.value.way_out == "leave out --compile"


# --- CUDA graphs ---


class Replayed:
    """Stands for a CUDA graph: what was recorded is run again, on the buffers it was recorded on."""

    def __init__(self, run):
        self.run, self.result, self.times = run, run(), 0

    def replay(self):
        self.times += 1
        self.result.copy_(self.run())


@pytest.fixture
def recordings(monkeypatch):
    made = []

    def record(run):
        made.append(Replayed(run))
        return made[-1], made[-1].result

    monkeypatch.setattr(absld.engine.cuda_graph, "record", record)
    return made


def test_a_recorded_attack_is_replayed_on_other_images(recordings):
    """Two shapes and two objectives make three recordings; each answers for its own."""
    net = warmed(absld.build_model("convnet", 3, "runtime"))
    config = replace(SMALL, cuda_graph=True, fold_batch_norm=True)
    engine, attack = Engine(net, config), training_attack(config)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    for seed, n in ((0, 6), (1, 6), (2, 3), (3, 6)):
        x_nat, noise, soft = some(n, seed=seed)
        results.append(attack(engine, kl(soft), x_nat, noise))
        plain = training_attack(SMALL)(net, kl(soft), x_nat, noise)
        assert torch.equal(results[-1], plain)
        with torch.no_grad():
            net[0].weight.mul_(1.1)  # as an optimiser would, in place
    assert torch.equal(results[0], results[0].clone()) and not torch.equal(results[0], results[1])
    hard = attack(engine, cross_entropy(labels), x_nat, noise)
    assert torch.equal(hard, training_attack(SMALL)(net, cross_entropy(labels), x_nat, noise))
    assert [recording.times for recording in recordings] == [3, 1, 1]


def test_results_are_not_written_over_by_the_next_replay(recordings):
    double = Recorded(lambda x: 2 * x, [torch.ones(2)])
    first, second = double(torch.ones(2)), double(torch.zeros(2))
    assert first.tolist() == [2, 2] and second.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["absld-margins", "fair-rslad", "adaad", "absld"])
def test_a_method_whose_attack_changes_is_not_recorded(method, recordings, monkeypatch):
    """Radii that are tensors, objectives that count, two networks: each time anew."""
    monkeypatch.setattr("absld.trainer.check_speed", lambda config, device: None)
    assert trained(method=method, cuda_graph=True)[0] == trained(method=method)[0]
    assert len(recordings) == (method == "absld")


def test_only_what_consists_of_tensors_can_be_recorded():
    one, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    assert tensors_of(kl(one)) == (one,) and tensors_of(cross_entropy(label)) == (label,)
    assert tensors_of(partial(max, one, 3)) is tensors_of(partial(max, key=one)) is None
    assert tensors_of(max) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fold", [False, True])
def test_a_cuda_graph_gives_the_same_attack(fold):
    net = warmed(absld.build_model("resnet18", 3, "runtime")).cuda()
    config = replace(SMALL, cuda_graph=True, fold_batch_norm=fold)
    engine, attack = Engine(net, config), training_attack(config)
    for seed in range(3):
        x_nat, noise, soft = (tensor.cuda() for tensor in some(seed=seed))
        plain = training_attack(SMALL)(net, kl(soft), x_nat, noise)
        assert torch.equal(attack(engine, kl(soft), x_nat, noise), plain)
