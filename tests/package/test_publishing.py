"""A run on a hub: the files, the card, who may see them, and the network that comes back."""

import html
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as hub_constants
import pytest
import torch
from helpers.hub_server import Repository, use_hub
from helpers.hub_uploads import TOKEN, writable_hub
from helpers.program import QUICK, main, refused, the_run, use_few_digits
from markdown_it import MarkdownIt

import absld
from absld.errors import CheckpointError, UsageError
from absld.methods import METHODS
from absld.models.architectures import build_exactly, build_model
from absld.models.layers import Normalised
from absld.report.model_card import SOURCES, Subject, evaluation_command
from absld.storage.checkpoint import load, save
from absld.storage.safetensors_files import describe_weights, safetensors_bytes
from absld.text import printable

PAGE = Path(absld.__file__).parents[1] / "docs/publishing.md"
FILES = ["README.md", "config.json", "evaluation.json", "model.safetensors"]
# Of huggingface_hub's own call of its client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
HOSTILE = (
    "<script>alert(1)</script>",
    "a | b",
    "x\n---\nlicense: mit\n",
    "\x1b[31mred\u202e",
    "[click](javascript:alert(1))",
    "![](https://example.org/track.png)",
    "`code` **bold** <img src=x onerror=alert(1)>",
    "www.example.org",
    "猫",
    "&lt;b&gt; {{ 7 * 7 }} {% raw %}",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, its evaluation, and the one of a part of the images."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_few_digits(patch)
        assert main("train", *QUICK) == 0
        for flags in (["clean,fgsm"], ["clean,fgsm", "--examples", "20"]):
            assert main("evaluate", the_run(), "--no-checks", "--attacks", *flags) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, in the current folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    use_few_digits(monkeypatch)
    return the_run()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback, and a token that may write to the repositories of `me`."""
    with writable_hub() as served:
        use_hub(monkeypatch, served.url, tmp_path / "cache")
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def pushed(hub, name="me/net"):
    repository = hub.repositories[name]
    return repository.commits[repository.branches["main"]]


def push(run, capfd, *flags):
    assert main("push", run, "hf:me/net", "--json", *flags) == 0
    return json.loads(capfd.readouterr().out)


def test_a_pushed_network_comes_back_with_its_logits_and_names(run, hub, capfd):
    said = push(run, capfd, "--license", "MIT")
    files = pushed(hub)
    assert hub.repositories["me/net"].private and sorted(files) == FILES
    assert said["private"] is True and said["commit"] in said["url"]
    assert {file["name"]: file["bytes"] for file in said["files"]} == {
        name: len(content) for name, content in files.items()
    }
    network = absld.Classifier.from_pretrained("me/net")
    own = absld.load_network(str(run), 10, ())
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(network(x), own.model.eval()(x)) and not network.training
    assert (network.classes, network.image_shape) == (own.classes, own.image_shape)
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.license == "mit"


def test_a_pushed_network_is_evaluated_as_its_run_was(run, hub, capfd):
    push(run, capfd)
    before = json.loads(strongest(run).read_text())
    flags = ["hf:me/net", "--no-checks", "--attacks", "clean,fgsm", "--json"]
    assert main("evaluate", *flags, "--dataset", "digits", "--epsilon", "0.1") == 0
    after = json.loads(capfd.readouterr().out)
    for part in ("attacks", "robust", "confusion", "data"):
        assert after[part] == before[part]
    published = json.loads(pushed(hub)["evaluation.json"])
    assert published["network"]["weights_sha256"] == after["network"]["weights_sha256"]


def test_out_writes_the_files_that_a_push_uploads(run, hub, capfd):
    push(run, capfd)
    assert not hub.requests.clear()
    assert main("push", run, "hf:me/net", "--out", "files") == 0
    assert not hub.requests
    assert {path.name: path.read_bytes() for path in Path("files").iterdir()} == pushed(hub)


def test_nothing_of_this_machine_is_pushed_but_the_files(run, hub, capfd):
    push(Path.cwd() / run, capfd)
    sent = b"".join(pushed(hub).values())
    assert str(Path.cwd()).encode() not in sent and str(run).encode() not in sent
    assert TOKEN.encode() not in sent and TOKEN not in capfd.readouterr().err


# --- The card ---


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def card_of(run, *flags):
    assert main("push", run, "hf:me/net", "--out", "files", *flags) == 0
    return Path("files/README.md").read_text()


def rename_classes(run, names):
    content = load(run / "best.pt")
    save(content | {"classes": list(names)}, run / "best.pt")

    def change(results):
        results["data"]["classes"] = list(names)
        for part in (results["robust"], *results["attacks"]):
            for k, name in enumerate(names):
                part["classes"][k]["class"] = name

    for path in run.glob("evaluations/*/evaluation.json"):
        edit_json(path, change)


def test_a_card_is_valid_and_shows_names_as_they_are(run):
    plain = huggingface_hub.ModelCard(card_of(run)).data.to_dict()
    rename_classes(run, HOSTILE)
    card = huggingface_hub.ModelCard(card_of(run))
    assert card.data.to_dict() == plain
    assert "license" not in plain and plain["library_name"] == "absld"
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    table = page.rpartition("<th>images</th>")[2].partition("</table>")[0]
    rows = [re.findall("<td>(.*?)</td>", row) for row in table.split("</tr>")[1:-1]]
    assert {len(row) for row in rows} == {4}
    assert {html.unescape(row[0]) for row in rows} == set(map(printable, HOSTILE))
    assert r"www\.example.org" in card.text and r"https\://" in card.text  # hubs make links of them


def test_a_card_shows_the_figures_of_the_evaluation(run):
    results = json.loads(Path(strongest(run)).read_text())
    data = huggingface_hub.ModelCard(card_of(run)).data
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    for name, part in (("clean", results["attacks"][0]), ("robust", results["robust"])):
        (average, worst) = [value for key, value in figures.items() if key.startswith(name)]
        assert average == pytest.approx(part["metrics"]["average"]["value"], abs=1e-4)
        assert worst == pytest.approx(part["metrics"]["worst"]["value"], abs=1e-4)


def strongest(run):
    return next(p for p in run.glob("evaluations/*/*.json") if '"examples": null' in p.read_text())


def test_the_nearest_bound_on_all_test_images_is_shown(run, capfd):
    (run / "evaluations/other").mkdir()
    other = run / "evaluations/other/evaluation.json"
    shutil.copy(strongest(run), other)

    def weaker(results):
        results["environment"]["started"] = "9999"
        results["robust"]["metrics"]["average"]["value"] = 0.9

    edit_json(other, weaker)
    card_of(run)
    assert f"evaluation: {strongest(run)}" in capfd.readouterr().out
    assert "90.0" in card_of(run, "--evaluation", other)
    strongest(run).unlink()
    other.unlink()
    card = card_of(run)
    assert "is on 20 of 40 images" in capfd.readouterr().out
    assert "Measured on a part of the images: 20 of 40" in card


def test_an_evaluation_with_the_budget_of_the_training_is_preferred(run, capfd):
    def other_budget(results):
        results["environment"]["started"] = "9999"
        results["settings"] |= {"norm": "l2", "epsilon": 0.5}

    other = strongest(run)
    edit_json(other, other_budget)
    card_of(run)
    assert "is on 20 of 40 images" in capfd.readouterr().out
    card_of(run, "--evaluation", other)
    assert "has another budget than the training, 0.5 in the L2 norm" in capfd.readouterr().out


def test_a_card_has_a_source_for_every_method():
    assert SOURCES.keys() == METHODS.keys()


def test_the_command_of_a_card_has_the_form_of_the_images():
    results = {"data": {"dataset": "folder", "split": "test"}}
    results["settings"] = {"attacks": ["fgsm"], "norm": "linf", "epsilon": 8 / 255}
    config, recipe = {"image_shape": (1, 32, 32)}, {"dataset": "folder", "resize": "crop"}
    subject = Subject("me/net", config, recipe, "", "", by_name=True)
    command = evaluation_command(subject, results)
    for flag in ("--channels 1", "--resize crop", "--image-size 32"):
        assert flag in command
    usual = recipe | {"resize": "squash"}
    usual = subject._replace(config={"image_shape": (3, 32, 32)}, recipe=usual)
    command = evaluation_command(usual, results)
    assert "--channels" not in command and "--resize" not in command


def test_a_card_is_of_the_weights_that_are_pushed(run, capfd):
    for path in run.glob("evaluations/*/evaluation.json"):
        edit_json(path, lambda results: results["network"].update(weights_sha256="ab" * 32))
    cause, hint = "no evaluation of its student", f"absld evaluate {run}"
    refused(capfd, 4, cause, hint, "push", run, "hf:me/net", "--out", "files")
    assert not Path("files").exists()


# --- What is refused ---


@pytest.mark.parametrize(
    "target", ["me/net", "hf:net", "hf:me/", "hf:me/a/b", "hf:../x", "hf:me/net@v1", "hf:me/n t"]
)
def test_other_names_of_repositories_are_refused(target, capfd):
    refused(capfd, 2, target, "", "push", "no-run", target)


def test_a_licence_is_an_identifier(capfd):
    refused(capfd, 2, "SPDX", "mit", "push", "no-run", "hf:me/net", "--license", "mit\nx: y")


def test_a_run_that_is_not_finished_is_refused(run, capfd):
    (run / "STATUS").write_text("interrupted\n")
    flags = ("hf:me/net", "--out", "files")
    refused(capfd, 4, "is interrupted", "--resume", "push", run, *flags)
    refused(capfd, 4, "not a run", "absld train", "push", "elsewhere", *flags)


@pytest.mark.parametrize(
    ("token", "name", "code", "cause", "hint"),
    [
        ("", "me/net", 2, "no token", "hf auth login"),
        ("hf_wrong", "me/net", 2, "does not accept the token", "hf auth login"),
        (TOKEN, "you/net", 2, "may not write", "write access"),
    ],
)
def test_who_may_not_write_is_told_so(run, hub, monkeypatch, capfd, token, name, code, cause, hint):
    monkeypatch.setenv("HF_TOKEN", token)
    out = refused(capfd, code, cause, hint, "push", run, f"hf:{name}", "--license", "mit")
    assert "hf_wrong" not in out and not hub.repositories


def test_a_licence_that_the_hub_refuses_is_its_error(run, hub, capfd):
    flags = ("push", run, "hf:me/net", "--license", "refused-1.0")
    refused(capfd, 4, '"license" must be one of', "licence", *flags)
    assert pushed(hub) == {}


def test_a_hub_that_is_not_there_is_an_error_of_a_line(run, hub, monkeypatch, capfd, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    refused(capfd, 4, "cannot be reached", "HF_ENDPOINT", "push", run, "hf:me/net")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(capfd, 2, "huggingface_hub", "absld[hub]", "push", "no-run", "hf:me/net")
    monkeypatch.delitem(sys.modules, "absld.models.pretrained", raising=False)
    with pytest.raises(UsageError, match="huggingface_hub"):
        importlib.import_module("absld.models.pretrained")


def test_files_go_into_a_public_repository_only_if_that_is_typed(run, hub, capfd):
    hub.repositories["me/net"] = Repository(private=False, token=TOKEN)
    refused(capfd, 2, "hf:me/net is public", "--public", "push", run, "hf:me/net")
    assert pushed(hub) == {}
    assert push(run, capfd, "--public")["private"] is False and sorted(pushed(hub)) == FILES
    hub.repositories["me/net"] = Repository(private=True, token=TOKEN)
    assert push(run, capfd, "--public")["private"] is True


# --- In Python ---


def test_a_classifier_keeps_its_normalisation(tmp_path):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    network = Normalised(build_model("convnet", 3, 0), mean, std).eval()
    absld.Classifier(network, "convnet", ("a", "b", "c"), (3, 8, 8)).save_pretrained(tmp_path)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(absld.Classifier.from_pretrained(tmp_path)(x), network(x))


def test_a_classifier_of_grey_images_comes_back(tmp_path):
    network = build_exactly("convnet", 3, 1, ("grey",)).eval()
    absld.Classifier(network, "convnet", ("a", "b", "c"), (1, 8, 8)).save_pretrained(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(absld.Classifier.from_pretrained(tmp_path)(x), network(x))


def test_the_weights_describe_themselves(tmp_path):
    network, classes = build_model("convnet", 3, 0).eval(), ("a", "b", "c")
    absld.Classifier(network, "convnet", classes, (3, 8, 8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == describe_weights("convnet", classes, (3, 8, 8), network.state_dict())
    edit_json(tmp_path / "config.json", lambda config: config.update(architecture="os:abort"))
    assert absld.Classifier.from_pretrained(tmp_path).architecture == "convnet"
    (tmp_path / "config.json").unlink()
    assert absld.Classifier.from_pretrained(tmp_path).classes == classes
    assert absld.load_network(str(tmp_path / "model.safetensors"), 3, ()).classes == classes


def test_code_of_the_page_and_of_a_card_runs(run, hub, capfd):
    push(run, capfd)
    page = PAGE.read_text(encoding="utf-8").replace("owner/name", "me/net")
    for text in (page, pushed(hub)["README.md"].decode()):
        (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
        given = {"pixels": torch.rand(2, 3, 8, 8)}
        exec(code, given)
        assert given["logits"].shape == (2, len(given["classifier"].classes))


def test_code_that_a_repository_names_is_not_imported(tmp_path):
    network = build_model("convnet", 3, 0).eval()
    absld.Classifier(network, "os:abort", ("a", "b", "c"), (3, 8, 8)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'os:abort', and no name in a file is imported"):
        absld.Classifier.from_pretrained(tmp_path)
    own = absld.Classifier.from_pretrained(tmp_path, model=build_model("convnet", 3, 1))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(own(x), network(x)) and own.architecture == "os:abort"


@pytest.mark.parametrize(
    "change", [{"sha256": "0" * 64}, {"classes": ["a"]}, {"format": "other"}, {}]
)
def test_a_description_that_does_not_fit_or_is_missing_is_refused(tmp_path, change):
    state = build_model("convnet", 3, 0).state_dict()
    described = describe_weights("convnet", "abc", (3, 8, 8), state) | change
    texts = {"absld": json.dumps(described)} if change else {}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(state, texts))
    with pytest.raises(CheckpointError):
        absld.Classifier.from_pretrained(tmp_path)


def test_a_pickle_in_a_repository_is_not_read(hub):
    hub.repositories["me/net"] = Repository({"pytorch_model.bin": b"\x80\x02."})
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        absld.Classifier.from_pretrained("me/net")
    assert not any("pytorch_model.bin" in path for _, path in hub.requests)
