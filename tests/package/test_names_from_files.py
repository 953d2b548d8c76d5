"""Names that files hold: of code, which is never imported, and of classes, which must agree."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.image_files import make_folder
from helpers.program import QUICK, main, refused

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import to_toml
from absld.config.resolve import resolve
from absld.data.dataset import InMemoryImages
from absld.errors import CheckpointError
from absld.evaluation.class_names import check_class_names
from absld.models.architectures import build_model
from absld.models.loading import Network
from absld.storage.checkpoint import save

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")

NAMED = "os:abort"  # ends this process if it is called
DIGITS = tuple("0123456789")
CLEAN = ["--attacks", "clean", "--no-checks", "--device", "cpu"]


def save_run(folder, method="trades", student="convnet", architecture="convnet", classes=DIGITS):
    """Save a finished run of an untrained network, as somebody else may hand it over."""
    Path(folder).mkdir()
    config = resolve({"student": student, "method": method})
    (Path(folder) / "config.toml").write_text(to_toml(config))
    (Path(folder) / "STATUS").write_text("finished\n")
    (Path(folder) / "environment.json").write_text('[{"inputs": {}}]')
    state = build_model("convnet", len(classes), "handed over").state_dict()
    content = {"model": state, "architecture": architecture, "classes": list(classes)}
    save(content, Path(folder) / "best.pt")


READ_A_RUN = {
    "evaluate": ["evaluate", "RUN", *CLEAN],
    "evaluate --against": ["evaluate", "good", "--against", "RUN", *CLEAN],
    "teacher check": ["teacher", "check", "RUN", "--device", "cpu"],
    "teacher cache": ["teacher", "cache", "--teacher", "RUN", "--device", "cpu"],
    "compare": ["compare", "RUN", "good", *CLEAN],
    "train --teacher": ["train", *QUICK, "--teacher", "RUN"],
    "train --student": ["train", *QUICK, "--student", "RUN", "--method", "sat"],
}


@pytest.fixture
def nothing_is_imported(monkeypatch):
    """Any import by name ends the test."""
    for module in ("models.loading", "methods.registry"):
        monkeypatch.setattr(f"absld.{module}.import_object", pytest.fail)


# --- Code ---


@pytest.mark.parametrize("command", READ_A_RUN)
@pytest.mark.usefixtures("nothing_is_imported")
def test_a_network_that_a_run_names_is_not_called_unless_it_is_typed(command, capfd):
    save_run("RUN", student=NAMED, architecture=NAMED)
    save_run("good", "sat")
    said = f"its network is '{NAMED}', and no name in a file is imported"
    # A teacher has a known network unless another is typed.
    other = "else type --model package.module:factory" if "--teacher" in READ_A_RUN[command] else ""
    refused(capfd, 4, said, other or f"type --model {NAMED}", *READ_A_RUN[command])


@pytest.mark.parametrize("flags", [["RUN"], ["good", "--against", "RUN"]], ids=["run", "against"])
@pytest.mark.usefixtures("nothing_is_imported")
def test_settings_that_name_another_network_than_the_weights_call_nothing(flags, capfd):
    """The name in config.toml counts as little as the one beside the weights."""
    save_run("RUN", student=NAMED)
    save_run("good")
    refused(capfd, 4, f"its network is '{NAMED}'", f"--model {NAMED}", "evaluate", *flags, *CLEAN)
    typed = ["--model", "convnet", "--against-model", "convnet"]
    assert main("evaluate", *flags, *CLEAN, *typed) == 0


@pytest.mark.parametrize("name", ["method", "student", "teacher", "teacher_model"])
@pytest.mark.parametrize("path", ["config.toml", "a copy.toml"])
@pytest.mark.usefixtures("nothing_is_imported")
def test_a_run_s_settings_as_a_recipe_name_no_code(name, path, capfd):
    """They are known by their seal, whatever the name of the file."""
    Path(path).write_text(to_toml(resolve({name: NAMED, "method": "rslad"} | {name: NAMED})))
    said = f"{path}: {name} is '{NAMED}', and no name in a run's file is imported"
    flag = "--" + name.replace("_", "-")
    refused(capfd, 2, said, f"type {flag} {NAMED}", "train", "--recipe", path, *QUICK)
    if name == "method":
        refused(capfd, 2, said, flag, "compare", "--methods", f"sat,{path}", *CLEAN)
    with pytest.raises(pytest.fail.Exception, match=NAMED):  # what is typed is imported
        main("train", "--recipe", path, *QUICK, flag, NAMED)


def test_a_student_of_the_user_s_own_is_evaluated_and_compared_by_its_name(capfd):
    Path("mine.py").write_text(
        "from absld.models.architectures import convnet\ndef net(c): return convnet(c)\n"
    )
    student = ["--student", "mine:net"]
    assert main("compare", "--methods", "sat,trades", *QUICK, *student, *CLEAN) == 0
    ours = sorted(map(str, Path("runs").glob("digits-*")))
    assert len(ours) == 2
    capfd.readouterr()
    for command in (["evaluate", ours[0]], ["compare", *ours]):
        refused(capfd, 4, "its network is 'mine:net'", "--model mine:net", *command, *CLEAN)
        assert main(*command, *CLEAN, "--model", "mine:net") == 0
        capfd.readouterr()
    # Beside other runs: a factory counts for the runs that it is the network of.
    save_run("good", "rslad")
    assert main("compare", ours[0], "good", *CLEAN, "--model", "other:net,mine:net") == 0
    capfd.readouterr()
    refused(capfd, 2, "--model is for finished runs", "--student",
            "compare", "--methods", "sat,trades", *CLEAN, "--model", "mine:net")  # fmt: skip
    sys.modules.pop("mine")


# --- State dicts ---


def test_the_key_of_the_weights_is_typed_for_each_network(capfd):
    states = [build_model("convnet", 10, seed).state_dict() for seed in (1, 2)]
    torch.save(dict(zip(("state_dict", "state_dict_ema"), states, strict=True)), "both.pt")
    for number, state in enumerate(states):
        torch.save(state, f"{number}.pt")
    data = ["--dataset", "digits", *CLEAN]
    key = "state_dict_ema"
    assert main("evaluate", "both.pt", *data) == 0
    assert f"'state_dict' is read, '{key}' left out; to choose: --weights" in capfd.readouterr().out
    assert main("evaluate", "both.pt", *data, "--weights", key, "--out", "a", "--json") == 0
    chosen = capfd.readouterr().out
    against = ["evaluate", "0.pt", *data, "--against", "both.pt", "--out", "b", "--json"]
    assert main(*against, "--against-weights", key) == 0
    other = capfd.readouterr().out
    assert main("evaluate", "1.pt", *data, "--out", "c", "--json") == 0
    alone = capfd.readouterr().out
    sha = next(line for line in alone.splitlines() if '"weights_sha256"' in line).strip()
    assert sha in chosen and sha in other
    teacher = ["--teacher", "both.pt", "--teacher-weights"]
    assert main("train", *QUICK, *teacher, key, "--json") == 0
    capfd.readouterr()
    refused(capfd, 4, "no state dict 'emma'", key, "train", *QUICK, *teacher, "emma")
    sat = ["train", *QUICK, "--method", "sat", "--student"]
    assert main(*sat, "both.pt", "--student-weights", key, "--out", "a", "--json") == 0
    assert main(*sat, "1.pt", "--out", "b", "--json") == 0
    one, two = (
        json.loads(next(Path(out).glob("digits-*/environment.json")).read_text()) for out in "ab"
    )
    assert one[0]["inputs"]["initial_weights"] == two[0]["inputs"]["initial_weights"]
    capfd.readouterr()
    refused(capfd, 2, "teacher's file", "--teacher FILE", "train", *QUICK, *teacher[2:], key)
    refused(
        capfd, 2, "convnet is not a file", "leave out", *sat, "convnet", "--student-weights", key
    )


# --- Classes ---

OTHERS = {
    "another order": tuple("1023456789"),
    "other names": tuple("abcdefghij"),
    "capitals": (*DIGITS[:9], "Nine"),
}


@pytest.mark.parametrize(
    ("command", "others"),
    [*((command, "another order") for command in READ_A_RUN), ("evaluate", "other names"),
     ("evaluate", "capitals")],
)  # fmt: skip
def test_a_network_of_other_classes_is_refused_unless_they_count_by_position(
    command, others, capfd
):
    save_run("RUN", classes=OTHERS[others])
    save_run("good", "sat")
    both = f"its classes are {list(OTHERS[others])}; those of the data are {list(DIGITS)}"
    refused(capfd, 4, both, "--class-order by-position", *READ_A_RUN[command])
    code = 4 if command == "teacher check" else 0  # an untrained network is unfit
    assert main(*READ_A_RUN[command], "--class-order", "by-position") == code
    printed = capfd.readouterr()
    text = " ".join((printed.err + printed.out).split())  # a comparison wraps its notes
    assert f"classes {list(OTHERS[others])} are read by position" in text


def test_a_run_is_not_evaluated_on_other_folders_of_the_same_images(capfd):
    """Read by position unsaid, a class would get the accuracy of another."""
    save_run("RUN", classes=("c0", "c1"))
    make_folder(Path("same"), ("c0", "c1"))
    make_folder(Path("other"), ("y1", "z0"))
    command = ["evaluate", "RUN", "--dataset", "folder", *CLEAN, "--data"]
    assert main(*command, "same") == 0
    capfd.readouterr()
    refused(capfd, 4, "['c0', 'c1']; those of the data are ['y1', 'z0']",
            "by-position", *command, "other")  # fmt: skip


def network_of(classes):
    return Network(torch.nn.Identity(), "convnet", classes=tuple(classes))


def data_of(classes):
    n = len(classes)
    return InMemoryImages(torch.zeros(n, 1, 1, 1), torch.arange(n), tuple(classes))


def test_of_many_classes_those_that_differ_are_listed():
    names = [f"class {k}" for k in range(1000)]
    changed = [*names[:777], "another", *names[778:]]
    with pytest.raises(CheckpointError) as caught:
        check_class_names(network_of(changed), data_of(names), "net.pt", "by-name")
    said = "its classes are [777: 'another', ...] (1000); those of the data are [777: 'class 777'"
    assert said in str(caught.value) and len(str(caught.value)) < 200


def test_names_of_classes_cannot_hide_what_they_are():
    """Control characters and marks that turn the text round are shown as escapes."""
    odd = "\x1b[2J\n\u202e"
    with pytest.raises(CheckpointError) as caught:
        check_class_names(network_of([odd, "b"]), data_of(["a", "b"]), "net.pt", "by-name")
    assert repr(odd) in str(caught.value) and odd not in str(caught.value)


@pytest.mark.parametrize("classes", [(), ("a", "b")], ids=["unknown", "the same"])
def test_a_network_of_the_same_or_of_unknown_classes_gets_no_note(classes):
    order = EvaluationConfig().class_order
    network = check_class_names(network_of(classes), data_of(["a", "b"]), "net.pt", order)
    assert network.notes == ()
