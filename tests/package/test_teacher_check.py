"""absld teacher check: what it says of good, weak and broken networks, and exit codes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.program import few_digits, main, refused

import absld
from absld.cli.teacher_view import teacher_lines
from absld.data.sources import load_data
from absld.models.architectures import build_model
from absld.storage.checkpoint import load, save
from absld.storage.files import digest

CPU = ["--device", "cpu"]
DIGITS = ["--dataset", "digits", *CPU]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, trades_run):
    """The run of a teacher that is somewhat robust."""
    return str(shutil.copytree(trades_run, tmp_path_factory.mktemp("trained") / trades_run.name))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def checked(capfd, *flags, code=0):
    assert main("teacher", "check", *flags, "--json") == code
    printed = capfd.readouterr()
    return json.loads(printed.out), printed.err


def test_what_is_said_of_a_teacher(teacher, capfd):
    """Counted again: accuracies, soft labels, calibration, on the validation images."""
    results, _ = checked(capfd, teacher, *CPU)
    model = absld.load_network(teacher, 10, ("x",)).model.eval()
    data = load_data("digits", "").validation
    with torch.no_grad():
        logits = model(data.images / 255)
    right = logits.argmax(1) == data.labels
    soft = logits.softmax(1)
    network = results["network"]
    assert network["architecture"] == "convnet"
    assert network["parameters"] == sum(p.numel() for p in model.parameters())
    assert network["weights_sha256"] == digest(model.state_dict())
    assert results["data"]["split"] == "validation" and results["data"]["images"] == 180
    for k in range(10):
        own = data.labels == k
        clean, labels = results["clean"]["classes"][k], results["soft_labels"][k]
        assert (clean["right"], clean["images"]) == (int(right[own].sum()), int(own.sum()))
        robust = results["robust"]["classes"][k]
        assert robust["right"] <= clean["right"] and robust["low"] <= robust["value"]
        assert labels["true_probability"] == pytest.approx(soft[own, k].mean().item(), rel=1e-5)
        entropy = -(soft * soft.log()).sum(1)[own].mean().item()
        assert labels["entropy"] == pytest.approx(entropy, rel=1e-5)
    calibration = results["calibration"]
    assert calibration["accuracy"] == pytest.approx(right.double().mean().item())
    assert calibration["confidence"] == pytest.approx(soft.amax(1).mean().item(), rel=1e-5)
    (reason,) = results["reasons"]
    assert results["verdict"] == "fit" and reason.startswith(
        "takes pixels in [0,1]: clean accuracy"
    )
    # PGD-20 of validation, which selects epochs, is near: another start, the same attack.
    accuracies = absld.validate(model, data, epsilon=0.1)
    average = results["robust"]["metrics"]["average"]["value"]
    assert average == pytest.approx(accuracies.robust.mean().item(), abs=0.03)


def test_it_is_shown_in_80_columns(teacher, capfd):
    # At a small epsilon, where the verdict does not hang on how a processor rounds.
    given = [f"{teacher}/best.pt", *DIGITS, "--examples", "60", "--eps", "0.02"]
    assert main("teacher", "check", *given) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (start,) = [k for k, line in enumerate(lines) if line.startswith("verdict: fit: takes pixels")]
    assert " ".join(lines[start:]).endswith("normalised by mean and deviation")
    assert any(
        pair == ("60 of 180 validation images of digits", "epsilon 0.02 in the L-infinity norm")
        for pair in zip(lines, (line.split(";")[0] for line in lines[1:]), strict=False)
    )
    (shown,) = [line for line in lines if line.startswith("teacher sha256: ")]
    assert shown.split()[-1] == digest(load(f"{teacher}/best.pt")["model"])
    assert any(line.startswith("temperature of least cross-entropy") for line in lines)


def test_a_class_without_images_has_no_figures(teacher, capfd):
    results, _ = checked(capfd, teacher, *CPU, "--examples", "4")
    absent = [c["class"] for c in results["clean"]["classes"] if not c["images"]]
    assert len(absent) == 6
    for labels in results["soft_labels"]:
        assert (labels["entropy"] is None) == (labels["class"] in absent)
    assert max(map(len, teacher_lines(results))) <= 80


def test_a_network_near_chance_is_unfit(capfd):
    save({"model": build_model("convnet", 10, "untrained").state_dict()}, Path("new.pt"))
    results, errors = checked(capfd, "new.pt", *DIGITS, code=4)
    assert results["verdict"] == "unfit"
    assert "error: new.pt: near chance on clean images" in errors


NETS = """
import torch
from torch import nn
import absld

class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.net, self.change = absld.load_network({teacher!r}, 10, ("nets",)).model, change
    def forward(self, x):
        return self.change(self.net(x))

class Scaled(Changed):
    def forward(self, x):
        return self.net(self.change(x))

def minus_one_to_one(): return Scaled(lambda x: (x + 1) / 2)
def bytes_of_pixels(): return Scaled(lambda x: x / 255)

def honest(): return Changed(lambda z: z)
def sharp(): return Changed(lambda z: 1000 * z)
def blind(): return Changed(lambda z: torch.cat([z[:, :9], z[:, 9:] - 100], 1))
def narrow(): return Changed(lambda z: z[:, :9])
def nan(): return Changed(lambda z: z * torch.nan)
def strict(): return Scaled(lambda x: x if 0 <= x.min() and x.max() <= 1 else 1 / 0)
"""


@pytest.fixture
def nets(teacher):
    Path("nets.py").write_text(NETS.format(teacher=teacher))
    yield
    sys.modules.pop("nets", None)


SCALES = [("minus_one_to_one", "in [-1,1]"), ("bytes_of_pixels", "in [0,255]")]


@pytest.mark.parametrize(("net", "scale"), SCALES)
def test_a_teacher_made_for_another_scale_of_pixels_is_unfit(net, scale, nets, capfd):
    """As it was trained: the scale that fits is named, and no training begins unasked."""
    results, errors = checked(capfd, f"nets:{net}", *DIGITS, code=4)
    (reason,) = results["reasons"]
    assert results["verdict"] == "unfit" and f"made for pixels {scale}: clean accuracy" in reason
    assert "put the normalisation inside the network" in reason and reason in errors
    flags = ["train", "--teacher", f"nets:{net}", *CPU, "--epochs", "1", "--max-steps", "1"]
    assert max(results["input_scale"]["accuracy"].items(), key=lambda pair: pair[1])[0] == scale
    out = refused(capfd, 4, f"nets:{net}: made for pixels {scale}", "--allow-weak-teacher", *flags)
    assert "epoch 1" not in out
    assert main(*flags, "--allow-weak-teacher", "--resume") == 0


def test_a_teacher_that_refuses_pixels_outside_of_0_to_1_is_checked(nets, capfd):
    results, _ = checked(capfd, "nets:strict", *DIGITS)
    assert results["verdict"] == "fit"
    assert results["input_scale"]["accuracy"]["in [-1,1]"] == 0.0
    flags = ["train", "--teacher", "nets:strict", *CPU, "--epochs", "1", "--max-steps", "1"]
    assert main(*flags) == 0


def test_what_names_and_shapes_cannot_tell_is_said(teacher, capfd):
    torch.save(load(f"{teacher}/best.pt")["model"], "bare.pt")
    results, errors = checked(capfd, "bare.pt", *DIGITS)
    (note,) = results["network"]["notes"]
    assert "recognised as convnet by names and shapes, which tell nothing of" in note
    assert note in errors


def test_doubts_have_reasons(nets, capfd):
    results, _ = checked(capfd, "nets:sharp", *DIGITS)
    assert results["verdict"] == "doubtful" and results["calibration"]["temperature"] == (
        pytest.approx(20, rel=0.01)
    )
    assert "nearly hard" in results["reasons"][-2] and "takes pixels" in results["reasons"][-1]
    results, _ = checked(capfd, "nets:blind", *DIGITS)
    assert any("class 9 is hardly robust, 0.0%" in reason for reason in results["reasons"])
    # The whole box for a budget: nothing withstands it.
    results, _ = checked(capfd, "nets:honest", *DIGITS, "--eps", "1")
    assert results["reasons"][0].startswith("not robust, ")


@pytest.mark.parametrize(
    ("net", "said"),
    [("narrow", "not logits"), ("nan", "NaN or infinity"), ("none", "none")],
)
def test_networks_that_cannot_teach(net, said, nets, capfd):
    code = 2 if net == "none" else 4
    refused(capfd, code, said, "needed", "teacher", "check", f"nets:{net}", *DIGITS)


def test_bad_files(capfd):
    Path("page.pt").write_text("<!DOCTYPE html><html>sign in</html>")
    refused(capfd, 4, "HTML page", "download", "teacher", "check", "page.pt", *DIGITS)
    refused(capfd, 4, "no such run or file", "check the path", "teacher", "check", "no.pt", *DIGITS)
    refused(capfd, 2, "no data set given", "--dataset", "teacher", "check", "page.pt")
    save({"model": build_model("convnet", 7, "x").state_dict()}, Path("seven.pt"))
    refused(capfd, 4, "expected (10, 64)", "number of classes", "teacher", "check", "seven.pt", *DIGITS)  # fmt: skip


def test_what_was_stripped_is_said(teacher, capfd):
    state = {f"module.{k}": v for k, v in load(f"{teacher}/best.pt")["model"].items()}
    torch.save({"state_dict": state}, "wrapped.pt")
    results, errors = checked(capfd, "wrapped.pt", *DIGITS, "--examples", "20")
    assert "prefixes removed" in errors and len(results["network"]["notes"]) == 2
    assert few_digits().train.classes == tuple(results["data"]["classes"])
