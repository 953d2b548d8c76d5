"""absld export: files that other programs evaluate, their parity with the original, and refusals."""

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.program import QUICK, few_digits, main, refused, the_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import absld
from absld.errors import CheckpointError
from absld.models.architectures import build_exactly, build_model
from absld.models.layers import Normalised
from absld.models.loading import load_network
from absld.runs import parity
from absld.runs.export_formats import SUFFIXES, decode, encode
from absld.storage.files import digest
from absld.storage.safetensors_files import describe_weights, safetensors_bytes

LETTERS = list("abcdefghij")
pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")

# Networks as other people have them.
NETS = """
    import torch
    from torch import nn
    from absld.models.architectures import build_model

    class Linear(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 10))
            self.change = forward
        def forward(self, x):
            return self.change(self.layers, x)

    def named(): return build_model("convnet", 10, "named")
    def dropout(): return Linear(lambda net, x: net(x))
    def by_length(): return Linear(lambda net, x: net(x.view(len(x), -1)))
    def cut(): return Linear(lambda net, x: net(x.detach()))
    def branch(): return Linear(lambda net, x: net(x) if x.mean() > 0.3 else -net(x))
    def in_numpy(): return Linear(lambda net, x: net(torch.from_numpy(x.detach().numpy())))
    def random(): return Linear(lambda net, x: net(x + torch.randn_like(x)))
    def of_the_batch(): return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), dropout())
    def half(): return Linear(lambda net, x: net(x).half())
    def shared():
        net = dropout()
        net.twice = net.layers[2]
        return net
"""


@pytest.fixture(autouse=True)
def nets(few_digits_in_an_empty_folder):
    Path("nets.py").write_text(textwrap.dedent(NETS))
    yield
    sys.modules.pop("nets", None)


def exported(capfd, *flags):
    """The report that --json prints, which is the one beside the file."""
    assert main("export", *flags, "--dataset", "digits", "--device", "cpu", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    path = Path(report["file"]["path"])
    assert json.loads(path.with_name(f"{path.name}.parity.json").read_text()) == report
    return path, report


# --- The file ---


@pytest.mark.parametrize("file_format", SUFFIXES)
def test_an_export_predicts_as_the_original_and_describes_it(file_format, teacher, capfd):
    path, report = exported(capfd, teacher, "--format", file_format)
    assert path.parent == Path("exports") and path.suffix == SUFFIXES[file_format]
    assert report["verdict"] == "same" and report["reason"] == ""
    for part in (report["parity"]["clean"], report["parity"]["adversarial"]):
        assert part["images"] == part["equal"] == 40 and part["ties"] == part["different"] == 0
        assert part["largest_difference"] <= part["tolerance"] < 1e-3
        assert [row["images"] for row in part["classes"]] == few_digits().test.class_counts()
        assert all(row["equal"] == row["images"] for row in part["classes"])
    found = description(path)
    weights = load_network(teacher, 10, ()).model.state_dict()
    assert found == describe_weights("convnet", few_digits().test.classes, (3, 8, 8), weights)


def description(path):
    """The description in a file, read without absld."""
    if path.suffix == ".onnx":
        import onnxruntime

        return json.loads(
            onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["absld"]
        )
    if path.suffix == ".pt2":
        texts = {"absld": ""}
        torch.export.load(path, extra_files=texts)
        return json.loads(texts["absld"])
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["absld"])


SMALLEST = ["resnet18", "preactresnet18", "mobilenetv2", "wrn-10-1", "dm-wrn-10-1"]


@pytest.mark.parametrize(
    "name", ["convnet", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALLEST)]
)
def test_a_network_of_every_family_is_exported_for_any_number_of_images(name, tmp_path):
    model = build_model(name, 10, "exported").eval().requires_grad_(False)
    check_formats(model, name, (3, 8, 8), tmp_path)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 17), (3, 224, 224)])
def test_other_channels_and_sizes(shape, tmp_path):
    model = build_model("convnet", 10, "exported")
    model[0] = nn.Conv2d(shape[0], 16, 3, padding=1)
    check_formats(model.eval(), "nets:any", shape, tmp_path, ["torch-export"])


def test_a_normalisation_is_in_the_file(tmp_path):
    model = Normalised(build_model("convnet", 10, "net"), torch.full((3,), 0.3), torch.ones(3) / 5)
    check_formats(model.eval(), "convnet", (3, 8, 8), tmp_path, ["torch-export", "safetensors"])


@pytest.mark.parametrize("file_format", SUFFIXES)
def test_a_network_of_grey_images_is_exported(file_format, tmp_path):
    model = build_exactly("convnet", 10, 1, ("grey",)).eval()
    check_formats(model, "convnet", (1, 8, 8), tmp_path, [file_format])


@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_logits_are_float32_whatever_the_network_gives(file_format, capfd):
    path, report = exported(capfd, "nets:half", "--format", file_format)
    described = {"image_shape": (3, 8, 8), "architecture": "nets:half", "classes": LETTERS}
    forward = decode(path.read_bytes(), path, described, file_format)
    assert forward(torch.rand(2, 3, 8, 8)).dtype == torch.float32
    assert report["verdict"].startswith("same")


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (["--norm", "l2", "--epsilon", "0.5"], "epsilon 0.5 in the L2 norm"),
        (["--norm", "linf", "--epsilon", "8/255"], "epsilon 8/255 (0.03137) in the L-infinity"),
    ],
    ids=["l2", "linf"],
)
def test_the_command_prints_the_export_and_its_budget(flags, budget, teacher, capfd):
    command = ["export", teacher, "--dataset", "digits", "--format", "safetensors", *flags]
    assert main(*command, "--device", "cpu") == 0
    printed = capfd.readouterr().out
    assert budget in printed and "verdict: same predictions" in printed
    assert main(*command, "--device", "cpu", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adversarial"]["norm"] == flags[1]


def check_formats(model, name, shape, folder, formats=tuple(SUFFIXES)):
    described = describe_weights(name, LETTERS, shape, model.state_dict())
    for file_format in formats:
        content = encode(model, described, file_format, name)
        path = folder / f"net{SUFFIXES[file_format]}"
        path.write_bytes(content)
        forward = decode(content, path, described, file_format)
        for count in (1, 2, 5):
            x = torch.rand(count, *shape)
            with torch.no_grad():
                ours, theirs = model(x), forward(x)
            assert theirs.shape == (count, 10)
            assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_a_file_names_no_path_of_this_machine():
    model = build_model("convnet", 10, "exported").eval()
    described = describe_weights("convnet", LETTERS, (3, 8, 8), model.state_dict())
    for file_format in ("onnx", "torch-export"):
        content = encode(model, described, file_format, "convnet")
        assert b".py" not in content and os.fsencode(Path(torch.__file__).parent) not in content


# --- Weights in safetensors are read again ---


def test_an_exported_file_of_weights_is_recognised_by_what_it_states(teacher, capfd):
    exported(capfd, teacher, "--format", "safetensors", "--out", "net.safetensors")
    network = load_network("net.safetensors", 10, ())
    assert (network.architecture, network.classes) == ("convnet", few_digits().test.classes)
    assert network.image_shape == (3, 8, 8) and network.notes == ()
    assert main("evaluate", "net.safetensors", "--dataset", "digits", "--attacks", "clean") == 0


def stating(**changed):
    """Write weights that state something else."""
    state = build_model("convnet", 10, "exported").state_dict()
    described = describe_weights("convnet", LETTERS, (3, 8, 8), state) | changed
    path = Path("net.safetensors")
    path.write_bytes(safetensors_bytes(state, {"absld": json.dumps(described)}))
    return str(path)


def test_classes_that_a_file_states_are_compared_with_those_of_the_data(capfd):
    command = ["evaluate", stating(), "--dataset", "digits", "--attacks", "clean"]
    assert main(*command) == 4
    assert "its classes are ['a', 'b'," in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "os:abort"}, "no name in a file is imported"),
        ({"architecture": 3}, "architecture: 3 is not of type 'string'"),
        ({"classes": "abc"}, "classes: 'abc' is not of type 'array'"),
        ({"image_shape": [3, 8]}, "image_shape: "),
        ({"sha256": "0" * 64}, "its tensors have changed"),
        ({"format": "absld-network-9"}, "format: "),
    ],
)
def test_a_description_that_is_wrong_is_refused(changed, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_network(stating(**changed), 10, ())


def test_what_others_write_beside_their_tensors_is_not_read():
    state = build_model("convnet", 10, "exported").state_dict()
    save_file(state, "net.safetensors", {"format": "pt", "classes": "nonsense", "sha256": "0"})
    network = load_network("net.safetensors", 10, ())
    assert network.classes == () and digest(network.model.state_dict()) == digest(state)


# --- Adversarial images ---


def test_adversarial_images_are_stored_and_used_again(teacher, capfd, monkeypatch):
    _, report = exported(capfd, teacher, "--format", "safetensors", "--examples", "20")
    stored = report["adversarial"]["path"]
    kept = load_file(stored)
    data, model = few_digits().test, load_network(teacher, 10, ()).model.eval()
    clean = data.images[kept["index"]] / 255
    assert torch.equal(kept["labels"], data.labels[kept["index"]]) and len(kept["labels"]) == 20
    assert 0 < (kept["images"] - clean).abs().max() <= report["adversarial"]["epsilon"] + 1e-6
    torch.testing.assert_close(kept["logits"], model(kept["images"]).detach())
    monkeypatch.setattr("absld.runs.adversarial_images.attack_network", None)
    _, again = exported(capfd, teacher, "--format", "torch-export", "--examples", "20")
    assert again["adversarial"] == report["adversarial"]
    assert again["parity"]["clean"]["images"] == again["parity"]["adversarial"]["images"] == 20


def test_stored_images_that_do_not_fit_are_refused(teacher, capfd):
    """Other images, NaN, fewer, of another type, none; other labels, numbers or logits."""
    _, report = exported(capfd, teacher, "--format", "safetensors")
    stored = report["adversarial"]["path"]
    kept = {key: value.clone() for key, value in load_file(stored).items()}  # not mapped
    faults = [
        ({"images": torch.zeros(40, 3, 8, 8)}, stored),
        ({"images": torch.full((40, 3, 8, 8), torch.nan)}, stored),
        ({"images": torch.zeros(39, 3, 8, 8)}, stored),
        ({"images": torch.zeros(40, 3, 8, 8, dtype=torch.uint8)}, stored),
        ({"labels": torch.zeros(40)}, stored),
    ]
    for name in ("labels", "index", "logits"):
        for other in (kept[name] + 1, torch.zeros(3)):
            faults.append((kept | {name: other}, f"its {name} are not"))
    flags = ["--dataset", "digits", "--device", "cpu", "--format", "safetensors"]
    for content, cause in faults:
        save_file(content, stored)
        refused(capfd, 4, cause, "remove it", "export", teacher, *flags)


# --- Parity ---


def test_a_tie_is_told_apart_from_another_prediction():
    ours = torch.tensor([[1.0, 0.0], [1.0, 1.00001], [1.0, 0.9], [0.0, 1.0]])
    theirs = torch.tensor([[1.0, 0.0], [1.0, 0.99999], [0.9, 1.0], [0.2, 1.0]])
    found = parity.compare_logits(ours, theirs, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    assert (found["equal"], found["ties"], found["different"]) == (2, 1, 1)
    assert [row["equal"] for row in found["classes"]] == [1, 1]
    assert found["largest_difference"] == pytest.approx(0.2)
    with pytest.raises(
        CheckpointError,
        match=r"a different class than the original for 1 of 4 clean images; .* 0\.2",
    ):
        parity.judge({"clean": found}, "net")
    assert parity.judge({"clean": found | {"different": 0}}, "net") == "same predictions"


@pytest.mark.parametrize("file_format", ["torch-export", "safetensors"])
def test_a_file_that_predicts_otherwise_gets_no_name(file_format, teacher, capfd, monkeypatch):
    def other(*given):
        forward = decode(*given)
        return lambda x: forward(x).roll(1, 1)

    monkeypatch.setattr("absld.runs.exporting.decode", other)
    flags = ["export", teacher, "--dataset", "digits", "--format", file_format]
    refused(capfd, 4, "40 of 40 clean and 40 of 40 adversarial", "no network was written", *flags)
    assert [path.name[:12] for path in Path("exports").iterdir()] == ["adversarial-"]


def test_the_first_image_is_evaluated_alone():
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return x.flatten(1)[:, :10]

    data = few_digits().test
    images = {"clean": parity.clean_images(data, torch.arange(40), 16)}
    parity.compare_networks(nn.Sequential(nn.Flatten(), First()), forward, images, data.classes)
    assert sizes == [1, 15, 16, 8]


class First(nn.Module):
    def forward(self, x):
        return x[:, :10]


def test_without_onnxruntime_the_report_says_that_nothing_was_compared(teacher, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path, report = exported(capfd, teacher)
    assert path.exists() and report["verdict"] == "not checked" and report["parity"] is None
    assert "pip install onnxruntime" in report["reason"]


def test_packages_that_write_onnx_are_missed_before_anything_is_done(teacher, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    flags = ["export", teacher, "--dataset", "digits"]
    assert refused(capfd, 2, "onnxscript", "pip install 'absld[onnx]'", *flags) == ""


# --- Networks of others ---


@pytest.mark.parametrize("name", ["dropout", "by_length", "in_numpy", "cut", "shared"])
def test_a_factory_is_exported(name, capfd):
    _, report = exported(capfd, f"nets:{name}", "--format", "torch-export")
    assert report["network"]["architecture"] == f"nets:{name}" and report["verdict"] == "same"


def test_weights_of_a_factory_are_read_where_it_is_typed(capfd):
    path, report = exported(capfd, "nets:shared", "--format", "safetensors")
    assert report["verdict"] == "same"
    flags = ["evaluate", path, "--dataset", "digits", "--attacks", "clean", "--no-checks"]
    refused(capfd, 4, "no name in a file is imported", "--model nets:shared", *flags)
    assert main(*flags, "--model", "nets:shared") == 0


@pytest.mark.parametrize(
    ("name", "cause", "hint"),
    [
        ("branch", "torch.export cannot trace it: ", "no branch on their values"),
        ("random", "fails the check 'repeated forwards agree': ", "no random numbers"),
        (
            "of_the_batch",
            'fails the check "an image\'s output is its own": ',
            "statistics of the batch",
        ),
    ],
)
def test_a_network_that_cannot_be_exported_is_refused_in_two_lines(name, cause, hint, capfd):
    flags = ["export", f"nets:{name}", "--dataset", "digits", "--format", "torch-export"]
    refused(capfd, 4, cause, hint, *flags)
    assert not list(Path("exports").iterdir())


# --- The place of the file ---


def test_only_an_export_of_the_same_weights_is_replaced(teacher, capfd):
    flags = ["--format", "safetensors", "--out", "net.safetensors"]
    path, _ = exported(capfd, teacher, *flags)
    exported(capfd, teacher, *flags)
    command = ["export", "nets:named", "--dataset", "digits", *flags]
    refused(capfd, 2, "net.safetensors: there is another", "another --out", *command)
    path.write_bytes(path.read_bytes() + b" ")
    command[1] = teacher
    refused(capfd, 2, "net.safetensors: there is another", "another --out", *command)


@pytest.mark.parametrize("name", ["net.safetensors", "net.safetensors.parity.json"])
def test_a_file_of_somebody_else_is_kept(name, teacher, capfd):
    Path(name).symlink_to("mine")
    Path("mine").write_text("mine")
    flags = ["--format", "safetensors", "--out", "net.safetensors"]
    refused(
        capfd, 2, "there is another file", "--out", "export", teacher, "--dataset", "digits", *flags
    )
    assert Path("mine").read_text() == "mine"


def test_the_suffix_is_that_of_the_format(teacher, capfd):
    flags = ["export", teacher, "--dataset", "digits", "--out", "net.onnx"]
    refused(capfd, 2, "ends in .pt2", "another --out", *flags, "--format", "torch-export")


def test_a_link_in_a_run_is_not_followed(capfd):
    assert main("train", *QUICK, "--student", "convnet", "--teacher-model", "convnet") == 0
    run, mine = the_run(), Path("mine")
    mine.mkdir()
    (run / "exports").symlink_to(mine.absolute())
    capfd.readouterr()
    refused(capfd, 4, "exports: a link", "put the folder", "export", run, "--format", "safetensors")
    (run / "exports").unlink()
    assert main("export", run, "--format", "safetensors", "--device", "cpu") == 0
    assert (run / "exports" / f"{run.name}.safetensors").exists() and not list(mine.iterdir())


def test_code_of_the_page_runs(teacher, capfd):
    for file_format, name in (("onnx", "net.onnx"), ("torch-export", "net.pt2")):
        _, report = exported(capfd, teacher, "--format", file_format, "--out", name)
    Path(report["adversarial"]["path"]).rename("adversarial.safetensors")
    page = Path(absld.__file__).parents[1] / "docs" / "export.md"
    given = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(blocks[0] + blocks[1], str(page), "exec"), given)
    model = load_network(teacher, 10, ()).model.eval()
    torch.testing.assert_close(given["logits"], model(torch.from_numpy(given["images"])))
    assert given["described"]["architecture"] == "convnet" and len(given["names"]) == 2
    exec(compile(blocks[2], str(page), "exec"), given)
    assert capfd.readouterr().out.startswith("1.0 ")
