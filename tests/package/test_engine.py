"""The engine: every technique computes what the plain step computes.

In float64 exactly where the order of sums is the same, else up to rounding. In bfloat16 the attack's
objective and robust accuracy are compared, with the spread over starts of the attack as the
yardstick.
"""

import copy
import functools
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.small_training import CONFIG, TRAIN, image_set, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import absld
import absld.engine.cuda_graph
import absld.models.architectures
from absld.attack import cross_entropy, kl
from absld.config.settings import TrainConfig
from absld.engine.batch_norm_folding import FoldedNetwork
from absld.engine.cuda_graph import partial_tensors
from absld.engine.engine import Compiled, Engine, training_attack
from absld.engine.logit_cache import CachedTeacher, DeviceCachedTeacher, LogitCacheSettings, fill
from absld.engine.precision import float32_precision, to_memory_format, with_precision
from absld.engine.step_metrics import StepMetrics
from absld.engine.techniques import Techniques, choose_techniques
from absld.errors import NonFiniteError, UsageError
from absld.models.layers import Normalised
from absld.models.resnets import resnet
from absld.seeding import global_generator
from absld.stepper import Stepper

CPU = torch.device("cpu")
SMALL = TrainConfig(epsilon=0.1, attack_steps=4)


def warmed(net, *key, side=8):
    """Return the network in float64, with batch statistics of some images, which folding needs."""
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


def bottlenecks():
    with global_generator("bottlenecks"):
        return resnet("Bottleneck", (1, 1, 1, 1), 3)


def odd():
    """Build a network with biases, a batch norm that is not affine, a convolution whose output is
    used twice, and one that is called twice."""

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
    "bottlenecks": bottlenecks,
    "wrn": lambda: absld.build_model("wrn-10-1", 3, "runtime"),
    "dm": lambda: absld.build_model("dm-wrn-10-1", 3, "runtime"),
    "odd": odd,
    "normalised": normalised,
}
FOLDS = {"convnet": 3, "resnet18": 20, "mobilenetv2": 57, "dm": 1, "odd": 1, "normalised": 3}
network = pytest.mark.parametrize("name", NETWORKS)


def batch_of(n=6, side=8, seed=0):
    """Draw images, noise and soft labels."""
    random = torch.Generator().manual_seed(seed)
    x_nat = torch.rand(n, 3, side, side, generator=random, dtype=torch.float64)
    noise = 0.001 * torch.randn(x_nat.shape, generator=random, dtype=torch.float64)
    soft = F.softmax(3 * torch.randn(n, 3, generator=random, dtype=torch.float64), dim=1)
    return x_nat, noise, soft


def engine_of(net, config=SMALL):
    """Return a student's engine, and the training attack."""
    techniques = choose_techniques(config, CPU)
    net = to_memory_format(net, techniques.channels_last)
    return Engine(net, techniques), training_attack(config, techniques)


def attacked(net, config=SMALL, **given):
    x_nat, noise, soft = batch_of(**given)
    engine, attack = engine_of(net, config)
    return attack(engine, kl(soft), x_nat, noise)


@functools.cache
def warmed_and_attacked(name):
    net = warmed(NETWORKS[name](), name)
    return net, attacked(net)


def ready(name):
    """Return a network of NETWORKS with batch statistics, and the plain attack on it."""
    net, plain = warmed_and_attacked(name)
    return copy.deepcopy(net), plain


# --- Folded batch norm ---


@network
def test_a_folded_network_gives_exactly_the_same_attack(name):
    """Its logits differ by rounding, the signs of its gradients do not."""
    net, plain = ready(name)
    folded = attacked(net, replace(SMALL, fold_batch_norm=True))
    assert torch.equal(plain, folded) and not torch.equal(plain, batch_of()[0])
    x_nat, net = batch_of()[0], net.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            FoldedNetwork(net).net(x_nat), net(x_nat), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", FOLDS)
def test_every_pair_that_can_be_folded_is_folded(name):
    net, _ = ready(name)
    folded = FoldedNetwork(net)
    assert len(folded.pairs) == FOLDS[name]
    before, after = (
        sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        for network in (net, folded)
    )
    assert after == before - FOLDS[name]


def test_a_folded_network_is_refreshed_when_the_attack_begins():
    net = warmed(absld.build_model("convnet", 3, "runtime"))
    engine, attack = engine_of(net, replace(SMALL, fold_batch_norm=True))
    x_nat, noise, soft = batch_of()
    before = attack(engine, kl(soft), x_nat, noise)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.2).add_(0.01)
    after = attack(engine, kl(soft), x_nat, noise)
    assert torch.equal(after, attacked(net)) and not torch.equal(after, before)


def test_folding_does_not_change_the_network():
    net = warmed(odd())
    net.dropout.eval()
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    FoldedNetwork(net)
    assert [module.training for module in net.modules()] == modes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.requires_grad for p in net.parameters())


class Branching(nn.Sequential):
    """Reads the values of its input, which a trace does not have."""

    def forward(self, x):
        return super().forward(x if x.mean() < 2 else x / 2)


def test_a_network_that_cannot_be_traced_is_refused_before_training():
    with pytest.raises(UsageError) as caught:
        train(
            replace(CONFIG, fold_batch_norm=True),
            student=Branching(nn.Flatten(), nn.Linear(48, 3)),
        )
    assert "batch norm cannot be folded" in str(caught.value)
    assert caught.value.hint == "--no-fold-batch-norm"


def test_synchronised_batch_norm_is_folded_too():
    """A student that was converted has the same attack."""
    net = warmed(absld.build_model("convnet", 3, "runtime"))
    plain = attacked(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert len(FoldedNetwork(net).pairs) == 3
    assert torch.equal(attacked(net, replace(SMALL, fold_batch_norm=True)), plain)


def test_the_student_itself_is_converted_to_synchronised_batch_norm(monkeypatch):
    """On a CUDA device. Its names and values stay."""
    monkeypatch.setattr("absld.stepper.choose_techniques", lambda *given: Techniques())
    student = absld.build_model("convnet", 3, "ours")
    names = list(student.state_dict())
    train(replace(CONFIG, epochs=1, sync_batch_norm=True), student=student)
    kinds = [type(module) for module in student if "BatchNorm" in type(module).__name__]
    assert kinds == [nn.SyncBatchNorm] * 3 and list(student.state_dict()) == names


# --- Trainings ---


def trained(**settings):
    """Train networks with batch norm in float64: weights after each step, reports, the student."""
    data = [image_set(n, seed=seed, dtype=torch.float64) for n, seed in ((12, 0), (9, 1))]
    student, teacher = (
        absld.build_model("convnet", 3, role).double() for role in ("ours", "theirs")
    )
    weights = []
    _, reports = train(
        replace(CONFIG, epochs=2, **settings),
        student=student,
        teacher=teacher,
        data=data,
        on_step=lambda step: weights.append(absld.digest(student.state_dict())),
    )
    return weights, reports, student


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    "method", ["absld", "trades", "adaad", "bat", "absld-margins", "fair-rslad"]
)
@pytest.mark.parametrize(
    "settings", [{"fold_batch_norm": True}, {"check_every": 2}, {"check_every": 99}]
)
def test_a_training_is_bit_equal_in_float64(method, settings):
    """Weights after every step, losses, class risks, accuracies."""
    plain, engine = trained(method=method), trained(method=method, **settings)
    assert engine[0] == plain[0] and len(set(plain[0])) > 4
    no_times = {"seconds": 0, "images_per_second": 0}
    for report, expected in zip(engine[1], plain[1], strict=True):
        assert report.record() | no_times == expected.record() | no_times


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("settings", [{"channels_last": True}, {"compile": True}], ids=str)
def test_another_order_of_sums_differs_by_rounding_only(settings):
    """Convolutions in another memory format, or compiled, sum in another order."""
    plain, engine = trained()[2], trained(**settings)[2]
    torch.testing.assert_close(engine.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


def test_each_training_is_compiled_however_many_there_were_before(monkeypatch):
    """torch compiles a function for a number of networks and then only warns."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    torch.compiler.reset()  # what other tests compiled
    for seed in range(3):
        train(replace(CONFIG, epochs=1, max_steps=1, compile=True, fold_batch_norm=True, seed=seed))


@network
def test_channels_last_gives_the_same_attack(name):
    net, plain = ready(name)
    assert torch.equal(attacked(net, replace(SMALL, channels_last=True)), plain)


# --- Precision of the parts ---


def test_each_part_has_its_precision():
    """The type of a convolution's output, in the teacher, attack and training."""
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


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), torch.float32),
        (nn.Conv2d(4, 8, 3, stride=(1, 2), groups=4), torch.float32),
        (nn.Conv2d(4, 4, 3, groups=4), torch.bfloat16),
        (nn.Conv2d(4, 4, 3, stride=2, groups=2), torch.bfloat16),
        (nn.Conv2d(1, 4, 3, stride=2), torch.bfloat16),
    ],
)
def test_bf16_on_a_cpu_leaves_strided_depthwise_convolutions_in_float32(layer, precision):
    """Values, and gradients to images and weights."""
    x = torch.rand(2, layer.in_channels, 9, 9, requires_grad=True)
    logits = with_precision(layer, "bf16")(x)
    if precision == torch.float32:
        expected = layer(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x).float()
        assert not torch.equal(expected, layer(x))
    assert torch.equal(logits, expected)
    inputs = x, *layer.parameters()
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (logits, expected))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.slow
def test_a_compiled_network_leaves_them_in_float32_too():
    """In a process of its own: torch.compile cannot trace the tests' checks of signatures."""
    program = """if True:
        import torch
        from absld.engine.engine import Compiled
        from absld.engine.precision import with_precision
        layer = torch.nn.Conv2d(4, 4, 3, stride=2, groups=4)
        x = torch.rand(2, 4, 9, 9)
        error = with_precision(Compiled(layer), "bf16")(x) - layer(x)
        assert error.abs().max() < 1e-6, error
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("around", "inside"), [("fp32", "tf32"), ("tf32", "fp32")])
def test_each_part_has_its_float32_precision(around, inside):
    """torch's setting inside the forwards."""
    settings = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = absld.build_model("convnet", 3, "runtime")

        def forward(self, x):
            settings.append(torch.backends.cuda.matmul.fp32_precision)
            return self.net(x)

    torch_names = {"fp32": "ieee", "tf32": "tf32"}
    student = Net()
    config = replace(CONFIG, precision=around, attack_precision=inside)
    x_nat, noise, soft = (tensor.float() for tensor in batch_of())
    with float32_precision(around):
        engine, attack = engine_of(student, config)
        attack(engine, kl(soft), x_nat, noise)
        assert settings == [torch_names[inside]] * CONFIG.attack_steps
        settings.clear()
        engine.train()(x_nat)
        assert settings == [torch_names[around]]
        settings.clear()
        with_precision(student, inside, around)(x_nat)
        assert settings == [torch_names[inside]]


@pytest.fixture
def digits(trained_on_digits):
    """A trained student, images, their labels, and soft labels for the attack's objective."""
    splits, student = absld.load_data("digits", "nowhere"), trained_on_digits
    x_nat = splits.test.images[:250] / 255
    with torch.no_grad():
        soft = F.softmax(student.eval()(x_nat), dim=1)
    return student, x_nat, splits.test.labels[:250], soft


def reached(digits, seed, **settings):
    """Attack, and return objective and robust accuracy of the student in full precision."""
    student, x_nat, labels, soft = digits
    config = TrainConfig(epsilon=0.1, **settings)
    noise = 0.001 * torch.randn(x_nat.shape, generator=torch.Generator().manual_seed(seed))
    engine, attack = engine_of(student, config)
    x_adv = attack(engine, kl(soft), x_nat, noise)
    with torch.no_grad():
        logits = student.eval()(x_adv)
    return kl(soft)(logits).item() / len(x_nat), (logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize(
    "settings",
    [{"attack_precision": "bf16"}, {"attack_precision": "bf16", "fold_batch_norm": True}],
    ids=["bf16", "folded bf16"],
)
def test_the_attack_in_half_precision_is_within_the_spread_of_starts(digits, settings):
    """Means over eight starts, against their spread: the attack is not weaker (it may be stronger:
    its rounding leaves flat places), and as many images are robust."""
    objective, robust = torch.tensor([reached(digits, seed) for seed in range(8)]).T
    half, robust_half = torch.tensor([reached(digits, seed, **settings) for seed in range(8)]).T
    assert objective.max() - objective.min() > 0 < robust.max() - robust.min()
    assert objective.mean() - half.mean() <= objective.max() - objective.min()
    assert (robust.mean() - robust_half.mean()).abs() <= robust.max() - robust.min()


# --- Checks for NaN ---


class Infinite(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Diverges(nn.Module):
    """A student whose output or gradient is not finite from the nth training step on."""

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
def test_the_first_step_that_is_not_finite_is_named(check_every, how, tmp_path):
    """Steps 1 to 3 are epoch 1; the fifth is the second of epoch 2."""
    run = absld.RunDirectory(tmp_path)
    student = Diverges(5, how)
    named = r"^epoch 2, step 2: loss .*, adv temperatures [\d.]+ to [\d.]+, nat temperatures "
    with pytest.raises(NonFiniteError, match=named):
        train(replace(CONFIG, check_every=check_every), student=student, run=run)
    if check_every == 1:  # before the optimiser's step
        assert all(p.isfinite().all() for p in student.parameters())
    assert [record["epoch"] for record in run.records()] == [1]
    saved = absld.storage.checkpoint.load(run.last)
    assert all(t.isfinite().all() for t in saved["model"].values())


def test_an_interruption_between_two_checks_saves_no_nan(tmp_path):
    run, student = absld.RunDirectory(tmp_path), Diverges(4, lambda x: x * float("nan"))

    def stop(report):
        if report.epoch == 2:
            raise absld.Interrupted(15)

    with pytest.raises(NonFiniteError, match="step 1: "):
        train(replace(CONFIG, check_every=50), student=student, run=run, on_step=stop)
    assert all(
        t.isfinite().all() for t in absld.storage.checkpoint.load(run.last)["model"].values()
    )


class Waits(TorchDispatchMode):
    """Records the operations after which the host must wait for the device."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.WAITS:
            self.recorded.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["absld", "fair-rslad", "absld-margins", "trades"])
def test_no_step_waits_for_the_device(method, tmp_path, monkeypatch):
    """Except to check the losses, and to read a logit cache from its file: counted on a CPU,
    without the checks of labels and noise, which are made there alone."""
    waits, tolist = Waits(), torch.Tensor.tolist
    for check in ("temperature.check_batch", "attack.check_noise"):
        monkeypatch.setattr(f"absld.{check}", lambda *given: None)
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: waits.recorded.append("tolist") or tolist(self)
    )

    def recorded(held, **settings):
        config = replace(CONFIG, method=method, fold_batch_norm=True, **settings)
        networks = (absld.build_model("convnet", 3, role) for role in ("ours", "theirs"))
        cache = LogitCacheSettings(tmp_path, 1.0)
        stepper = Stepper(*networks, TRAIN, config, logit_cache=cache)
        if isinstance(stepper.teacher, CachedTeacher):
            list(fill(stepper.teacher, stepper.views, 50))
            if held:
                teacher, cache = stepper.teacher.teacher, stepper.teacher.cache
                stepper.teacher = DeviceCachedTeacher(teacher, cache, CPU)
                stepper.teacher.hold_if_whole()
        metrics, draws = StepMetrics(stepper.techniques.check_every), list(stepper.draws(1))
        waits.recorded = []
        with waits:
            for number, draw in enumerate(draws):
                stepper.step(draw, 1, number, lambda values: metrics.add(values, 1))
        assert len(draws) == 3
        return waits.recorded

    assert recorded(True, check_every=99) == []
    assert recorded(True) == ["tolist"] * 3
    if method != "trades":
        assert len(recorded(False, check_every=99)) >= 3


# --- Devices without a technique, and networks that cannot be compiled ---


@pytest.mark.parametrize("name", ["cuda_graph", "sync_batch_norm"])
def test_a_technique_that_needs_cuda_is_refused_elsewhere(name):
    with pytest.raises(UsageError) as caught:
        train(replace(CONFIG, **{name: True}))
    flag = f"--{name.replace('_', '-')}"
    assert str(caught.value) == f"{flag} needs a CUDA device, not cpu"
    assert caught.value.hint == f"leave out {flag}"


def test_a_network_that_cannot_be_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: torch._dynamo.disable(fails))

    def fails(x):
        raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler"), None)

    with pytest.raises(UsageError) as caught:
        Compiled(nn.Identity())(torch.ones(1))
    assert "cannot be compiled: " in str(caught.value) and caught.value.hint == "--no-compile"


# --- CUDA graphs ---


def test_only_an_objective_of_tensors_alone_can_be_captured():
    one, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    assert partial_tensors(kl(one)) == (one,) and partial_tensors(cross_entropy(label)) == (label,)
    assert partial_tensors(partial(max, one, 3)) is partial_tensors(partial(max, key=one)) is None
    assert partial_tensors(max) is None


class Weighted:
    """An objective with a state."""

    factor = 2.0

    def objective(self, labels, logits):
        return self.factor * logits.gather(1, labels.unsqueeze(1)).sum()


def test_an_objective_with_a_state_of_its_own_is_not_captured():
    labels, factor = torch.zeros(1, dtype=torch.long), 2.0

    def closure(labels, logits):
        return factor * logits.gather(1, labels.unsqueeze(1)).sum()

    assert partial_tensors(partial(closure, labels)) is None
    assert partial_tensors(partial(Weighted().objective, labels)) is None
