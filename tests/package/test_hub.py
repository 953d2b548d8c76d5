"""hf:owner/name as a network: what is fetched, chosen and recorded, and what is said if it cannot be."""

import errno
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.file_download
import pytest
import torch
from helpers.hub_server import Handler, Repository, hub_server, use_hub
from helpers.program import QUICK, main, refused, the_run
from helpers.weight_files import Payload

from absld.config.files import to_toml
from absld.config.resolve import resolve
from absld.engine.distributed import Distributed
from absld.errors import CheckpointError, UsageError
from absld.evaluation.results import read_results
from absld.models.architectures import build_model
from absld.models.hub import HubName, fetch, parse
from absld.models.loading import load_network
from absld.progress import SILENT, Observer
from absld.runs.run_record import run_directory
from absld.storage.files import digest
from absld.storage.safetensors_files import describe_weights, safetensors_bytes

DIGITS = [*("--dataset", "digits", "--device", "cpu", "--attacks", "clean", "--no-checks")]
TOKEN = "hf_allowed"


def weights(seed=0):
    return build_model("convnet", 10, "hub", seed).state_dict()


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def published(state, **changes):
    """The weights that this package publishes of a network."""
    described = describe_weights("convnet", "0123456789", (3, 8, 8), state) | changes
    return {"model.safetensors": safetensors_bytes(state, {"absld": json.dumps(described)})}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a network o/n, and an empty cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with hub_server() as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        server.repositories["o/n"] = Repository(published(weights()))
        yield server


@pytest.fixture
def offline(hub, tmp_path, monkeypatch):
    return lambda: use_hub(monkeypatch, hub.url, tmp_path / "cache", offline=True)


def load_from(target):
    return load_network(target, 10, ("x",))


# --- Names and files ---


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("hf:o/n", HubName("o/n")),
        ("hf:o/n@v1.0", HubName("o/n", "v1.0")),
        ("hf:o/n/sub/a b.pt", HubName("o/n", "main", "sub/a b.pt")),
        ("hf:o-1/n_2.x@refs/pr/7/a.pt", HubName("o-1/n_2.x", "refs/pr/7", "a.pt")),
        ("hf:o/n@feature%2Fx/a@b.pt", HubName("o/n", "feature/x", "a@b.pt")),
    ],
)
def test_a_target_names_a_repository_a_revision_and_a_file(target, name):
    assert parse(target) == name


@pytest.mark.parametrize(
    "target",
    ["hf:", "hf:n", "hf:/n", "hf:o/", "hf:o/n/", "hf:o/n@", "hf:o/n@ v", "hf:o/n//a.pt", "hf:o/n/../a",
     "hf:o/n/a\\b.pt", "hf:o/ñ", "hf:https://x.y/o/n", "hf:o/n@v\n", "hf:o/n/" + "a/" * 5],
)  # fmt: skip
def test_a_malformed_target_is_a_usage_error_before_anything_is_asked(target, hub):
    with pytest.raises(UsageError, match="does not name a file on the hub"):
        load_from(target)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.safetensors", "a.pt", "b.bin"], "a.safetensors"),
        (["README.md", "sub/net.pth", "net.onnx"], "sub/net.pth"),
        (["../out.pt", "/abs.pt", "a.pt"], "a.pt"),
    ],
)
def test_the_only_safetensors_file_is_chosen_else_the_only_other_one(files, chosen, hub):
    hub.repositories["o/n"] = Repository({name: torch_file(weights()) for name in files})
    assert fetch("hf:o/n", SILENT).name.file == chosen


def test_several_files_are_listed_escaped_and_bounded_with_the_form_to_choose_one(hub):
    names = ["b.pt", "evil\x1b[31m\n.pt", *[f"{k:02}" + "x" * 200 + ".pt" for k in range(50)]]
    hub.repositories["o/n"] = Repository(dict.fromkeys(names, b""))
    with pytest.raises(CheckpointError, match="holds 52 files of weights: 00x") as error:
        fetch("hf:o/n", SILENT)
    assert len(str(error.value)) < 1500 and "\x1b" not in str(error.value)
    assert error.value.hint.startswith("choose one: hf:o/n/00x")


# --- What is read ---


def test_it_is_the_network_of_the_file_with_its_commit_and_digest(hub):
    network = load_from("hf:o/n")
    assert digest(network.model.state_dict()) == digest(weights())
    assert network.architecture == "convnet" and network.classes == tuple("0123456789")
    assert network.image_shape == (3, 8, 8)
    commit = hub.repositories["o/n"].branches["main"]
    assert network.hub["commit"] == commit and network.hub["file"] == "model.safetensors"
    assert network.notes == (
        f"hf:o/n/model.safetensors: commit {commit}",
        f"hf:o/n/model.safetensors: SHA-256 of the file {network.hub['sha256']}",
    )


def test_a_branch_a_tag_and_a_commit_are_revisions(hub):
    repository = hub.repositories["o/n"]
    repository.commit(published(weights(1)))
    repository.commit(published(weights(2)), branch="feature/x")
    first = next(iter(repository.commits))
    for revision, seed in (("main", 1), ("feature%2Fx", 2), (first, 0)):
        state = load_from(f"hf:o/n@{revision}").model.state_dict()
        assert digest(state) == digest(weights(seed)), revision


def test_nothing_but_the_file_is_fetched(hub):
    files = {"config.json": b'{"architecture": "resnet18", "classes": ["a"]}'}
    hub.repositories["o/n"] = Repository(published(weights()) | files)
    assert load_from("hf:o/n").classes == tuple("0123456789")
    fetched = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == {"model.safetensors"}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"architecture": "os:abort"}, "'os:abort', and no name in a file is imported"),
        ({"sha256": "0" * 64}, "its tensors have changed"),
        ({"classes": "abc"}, "classes"),
    ],
)
def test_a_description_that_names_code_or_does_not_fit_is_refused(changes, cause, hub):
    hub.repositories["o/n"] = Repository(published(weights(), **changes))
    with pytest.raises(CheckpointError, match=cause):
        load_from("hf:o/n")


def test_a_pickle_that_runs_code_is_refused(hub, tmp_path):
    hub.repositories["o/n"] = Repository({"a.bin": torch_file(Payload(tmp_path / "made"))})
    with pytest.raises(CheckpointError):
        load_from("hf:o/n")
    assert not (tmp_path / "made").exists()


# --- The cache ---


def test_offline_the_cache_is_read_and_a_note_says_so(hub, offline):
    online = load_from("hf:o/n")
    offline()
    hub.requests.clear()
    network = load_from("hf:o/n")
    assert network.notes[0] == "hf:o/n: HF_HUB_OFFLINE is set: what is in the cache is used"
    assert network.notes[1:] == online.notes and network.hub == online.hub
    assert network.classes == online.classes and not hub.requests


def test_a_hub_without_an_answer_leaves_what_is_in_the_cache(hub, tmp_path, monkeypatch):
    online = load_from("hf:o/n")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    network = load_from("hf:o/n")
    assert "cannot be reached" in network.notes[0] and network.hub == online.hub


def test_a_whole_commit_in_the_cache_needs_no_hub(hub):
    commit = load_from("hf:o/n").hub["commit"]
    hub.requests.clear()
    assert load_from(f"hf:o/n@{commit}/model.safetensors").classes and not hub.requests


def test_a_branch_that_moves_gives_other_weights_and_another_commit(hub):
    before = load_from("hf:o/n")
    hub.repositories["o/n"].commit(published(weights(1)))
    after = load_from("hf:o/n")
    assert before.hub["commit"] != after.hub["commit"]
    assert digest(after.model.state_dict()) == digest(weights(1))


def test_a_file_that_is_damaged_in_the_cache_is_not_read(hub):
    file = fetch("hf:o/n", SILENT)
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, its SHA-256 is not that on the hub"):
        fetch("hf:o/n", SILENT)


def test_two_at_once_download_a_file_once(hub, tmp_path, monkeypatch):
    class Slow(Handler):
        def reply(self, body, status=200, headers=None):
            if self.command == "GET" and "resolve" in self.path:
                time.sleep(0.3)
            super().reply(body, status, headers)

    with hub_server(Slow) as slow, ThreadPoolExecutor(2) as pool:
        use_hub(monkeypatch, slow.url, tmp_path / "another cache")
        slow.repositories["o/n"] = Repository({"a.pt": torch_file(weights())})
        a, b = pool.map(lambda _: fetch("hf:o/n", SILENT), range(2))
        assert a == b
        assert slow.requests.count(("GET", "/o/n/resolve/main/a.pt")) == 1


def test_a_download_reports_its_bytes(hub):
    seen = []

    class Watcher(Observer):
        def load(self, name, done, total, unit="bytes"):
            seen.append((name, done, total, unit))

    fetch("hf:o/n", Watcher())
    size = len(
        hub.repositories["o/n"].commits[load_from("hf:o/n").hub["commit"]]["model.safetensors"]
    )
    assert ("hf:o/n/model.safetensors", size, size, "bytes") in seen


def test_processes_that_got_other_weights_do_not_train_together():
    class Another(Distributed):
        def all_reduce_max(self, number):
            return max(number, 1)

    with pytest.raises(UsageError, match="the processes do not have the same") as error:
        run_directory(resolve({}), "absld", {"weights": "a"}, Another())
    assert "hf:owner/name@COMMIT" in error.value.hint


# --- Errors ---


@pytest.mark.parametrize(
    ("target", "cause", "hint"),
    [
        ("hf:o/missing", "no such repository on 127.0.0.1, or a private one", "HF_TOKEN"),
        ("hf:o/private", "no such repository on 127.0.0.1, or a private one", "`hf auth login`"),
        ("hf:o/gated", "its owner must grant access", "HF_TOKEN"),
        ("hf:o/n@v9", "no revision 'v9'", "a branch, a tag or a whole commit"),
        ("hf:o/n/a.pt", "no such file", "there are: model.safetensors"),
        ("hf:o/empty", "holds no file of weights", "README.md"),
        ("hf:o/..n", "not a name of a repository", "hf:owner/name"),
    ],
)
def test_each_fault_is_one_line_and_a_hint_without_the_token(
    target, cause, hint, hub, capfd, monkeypatch, few_digits_in_an_empty_folder
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repositories["o/private"] = Repository(published(weights()), private=True)
    hub.repositories["o/gated"] = Repository(published(weights()), gated=True)
    hub.repositories["o/empty"] = Repository({"README.md": b""})
    code = 2 if ".." in target else 4
    out = refused(capfd, code, cause, hint, "evaluate", target, *DIGITS)
    assert "hf_secret" not in out


def test_a_token_opens_what_it_may_read(hub, monkeypatch):
    hub.repositories["o/n"].gated = hub.repositories["o/n"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_from("hf:o/n").architecture == "convnet"


def test_offline_without_a_cache_is_an_error_that_says_so(offline):
    offline()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as error:
        load_from("hf:o/n")
    assert "not in the cache" in error.value.hint


def test_a_full_disk_is_named(hub, monkeypatch):
    def write(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", write)
    with pytest.raises(CheckpointError, match=r"cache: No space left on device") as error:
        load_from("hf:o/n")
    assert "HF_HOME" in error.value.hint


def test_without_huggingface_hub_the_extra_is_named(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError) as error:
        load_from("hf:o/n")
    assert error.value.hint == "pip install 'absld[hub]'"


# --- Commands ---


def test_a_run_depends_on_the_weights_not_on_how_they_came(
    hub, capfd, few_digits_in_an_empty_folder
):
    Path("local.pt").write_bytes(torch_file(weights()))
    flags = ["train", *QUICK, "--json"]
    assert main(*flags, "--teacher", "hf:o/n", "--student", "hf:o/n") == 0
    printed = capfd.readouterr()
    assert "model.safetensors: commit" in printed.err and "%|" not in printed.err
    json.loads(printed.out)
    (session,) = json.loads((the_run() / "environment.json").read_text())
    commit = hub.repositories["o/n"].branches["main"]
    assert [session["hub"][role]["commit"] for role in ("student", "teacher")] == [commit] * 2
    # The same weights from elsewhere are the same run; those of a branch that moved are not.
    assert main(*flags, "--teacher", "local.pt", "--student", "local.pt") == 2
    assert "holds a run with these settings" in capfd.readouterr().err
    hub.repositories["o/n"].commit(published(weights(1)))
    assert main(*flags, "--teacher", "hf:o/n", "--student", "local.pt", "--resume") == 0
    assert "teacher_weights is" in capfd.readouterr().err


def test_a_run_s_settings_as_a_recipe_fetch_nothing_unless_it_is_typed(
    hub, capfd, few_digits_in_an_empty_folder
):
    Path("copy.toml").write_text(to_toml(resolve({"teacher": "hf:o/n"})))
    train = ["train", "--recipe", "copy.toml", *QUICK]
    refused(capfd, 2, "nothing that a run's file names is fetched", "--teacher hf:o/n", *train)
    assert not hub.requests
    assert main(*train, "--teacher", "hf:o/n") == 0


def test_evaluations_take_it_and_record_where_it_comes_from(
    hub, capfd, few_digits_in_an_empty_folder
):
    Path("local.pt").write_bytes(torch_file(weights(1)))
    assert main("evaluate", "hf:o/n", "--against", "local.pt", *DIGITS) == 0
    (path,) = Path("evaluations").glob("o-n-*/evaluation.json")
    origin = read_results(path)["network"]["hub"]
    assert origin["repository"] == "o/n" and origin["revision"] == "main"
    assert main("evaluate", "local.pt", "--against", "hf:o/n", *DIGITS) == 0
    assert "evaluated before" in capfd.readouterr().out


def test_the_logits_of_such_a_teacher_are_cached(hub, capfd, few_digits_in_an_empty_folder):
    flags = ["--teacher", "hf:o/n", "--device", "cpu", "--batch-size", "64", "--padding", "0"]
    assert main("teacher", "cache", *flags) == 0
    assert "model.safetensors: commit" in capfd.readouterr().out
