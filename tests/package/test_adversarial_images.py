"""The adversarial images of an evaluation: the file, and the examples on the page."""

import base64
import html
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.linear import sample
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from absld.config.evaluation_settings import EvaluationConfig
from absld.errors import CheckpointError, Stopped, UsageError
from absld.evaluation import adversarial_images
from absld.evaluation.evaluate import evaluate
from absld.evaluation.runner import run_network_evaluation
from absld.models.loading import Network
from absld.progress import Observer
from absld.report.examples import example_section, png
from absld.report.html import render_page, write_report
from absld.storage.checkpoint import load

FEW = ("index", "labels", "attack", "predictions")


class Watching(Observer):
    """An observer that keeps notes, and ends the evaluation after so many batches."""

    def __init__(self, batches=None):
        self.left, self.notes = batches, []

    def attack_batch(self, progress):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Stopped(130)

    def note(self, text):
        self.notes.append(text)


def evaluated(out, observer=None, classes=4, n=80, **changes):
    """Evaluate a linear network; return its images, and the run."""
    model, data = sample(3, classes, n, torch.float32)
    chosen = {"attacks": "fgsm,pgd3,cw3", "epsilon": 0.1, "norm": "linf", "batch_size": 30}
    chosen |= {"dataset": "digits", "checks": False, "device": "cpu", "out": str(out)}
    network = Network(model, "package.module:linear", ())
    config = EvaluationConfig(**chosen | changes)
    return data, run_network_evaluation("linear", network, data, config, observer or Watching())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The run of an evaluation that keeps examples; only to be read."""
    return evaluated(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The run of one that saves all adversarial images; only to be read."""
    return evaluated(tmp_path_factory.mktemp("saved"), save_adversarial=True)


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of the folder of `kept`."""
    return Path(shutil.copytree(kept[1].path.parent, tmp_path / kept[1].path.parent.name))


def stored_by(run):
    return load_file(run.path.with_name("adversarial.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "l2", "epsilon": 0.5, "each": True, "examples": 50, "restarts": 2}],
    ids=["linf", "l2"],
)
def test_the_stored_images_are_those_that_decided(tmp_path, changes):
    data, run = evaluated(tmp_path, save_adversarial=True, **changes)
    stored, found = stored_by(run), run.evaluation
    wrong = found.predictions != found.labels
    for k, (attack, predicted) in enumerate(
        zip(stored["attack"].tolist(), stored["predictions"].tolist(), strict=True)
    ):
        breaking = wrong[:, k].nonzero().flatten().tolist()
        assert attack == (breaking[0] if breaking else 3)
        assert predicted == found.predictions[attack, k]
    assert len(set(stored["attack"].tolist())) >= 3
    assert torch.equal(stored["index"], found.index)
    assert torch.equal(stored["labels"], found.labels)
    assert torch.equal(stored["clean"], data.images[found.index])
    with torch.no_grad():
        again = sample(3, 4, dtype=torch.float32)[0](stored["images"]).argmax(1)
    assert torch.equal(again, stored["predictions"])
    moved = (stored["images"] - stored["clean"]).flatten(1)
    size = moved.norm(dim=1) if found.norm == "l2" else moved.abs().amax(1)
    assert size.max() <= found.epsilon + 1e-6
    assert (size[stored["attack"] == 0] == 0).all() and (size[stored["attack"] > 0] > 0).all()


def test_a_reader_finds_what_the_file_is_of(saved):
    _, run = saved
    path = run.path.with_name("adversarial.safetensors")
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    assert texts.pop("format") == "absld-adversarial-1"
    read = {name: json.loads(text) for name, text in texts.items()}
    assert read == {
        "attacks": ["clean", "fgsm", "pgd3", "cw3"],
        "norm": "linf",
        "epsilon": 0.1,
        "seed": 0,
        "weights_sha256": run.results["network"]["weights_sha256"],
        "images_sha256": run.results["data"]["images_sha256"],
    }
    assert set(load(path)) == {*FEW, "images", "clean"}
    assert not path.with_name("adversarial.partial").exists()


@pytest.mark.parametrize(("batches", "save_all"), [(2, False), (8, True)])
def test_a_continued_evaluation_has_the_same_file(tmp_path, kept, saved, batches, save_all):
    _, whole = saved if save_all else kept
    with pytest.raises(Stopped):
        evaluated(tmp_path / "part", Watching(batches), save_adversarial=save_all)
    _, continued = evaluated(tmp_path / "part", save_adversarial=save_all)
    files = [
        run.path.with_name("adversarial.safetensors").read_bytes() for run in (whole, continued)
    ]
    assert files[0] == files[1]


def test_without_the_flag_an_evaluation_that_began_with_it_continues(tmp_path, kept):
    with pytest.raises(Stopped):
        evaluated(tmp_path, Watching(5), save_adversarial=True)
    _, run = evaluated(tmp_path)
    path = run.path.with_name("adversarial.safetensors")
    assert path.read_bytes() == kept[1].path.with_name(path.name).read_bytes()


def test_an_evaluation_without_images_stays_so(folder, tmp_path):
    (folder / "adversarial.safetensors").unlink()
    evaluated(tmp_path)
    assert not list(folder.glob("adversarial.*"))


def test_saving_changes_no_figure_and_no_name(kept, saved):
    runs = kept[1], saved[1]
    assert runs[0].path.parent.name == runs[1].path.parent.name
    one, other = ({**run.results, "environment": 0, "seconds": 0} for run in runs)
    assert one == other


def test_without_the_flag_there_is_an_example_of_each_of_the_worst_classes(tmp_path):
    _, run = evaluated(tmp_path, classes=25, n=300)
    stored, found = stored_by(run), run.evaluation
    labels = stored["labels"].tolist()
    assert labels == found.robust_accuracy.argsort(stable=True)[:20].tolist()
    broken = found.correct[0] & ~found.robust
    for label, index, attack in zip(labels, stored["index"], stored["attack"], strict=True):
        of_class = (found.labels == label).nonzero().flatten()[:16]
        expected = of_class[broken[of_class]]
        assert not len(expected) or (index == expected[0] and attack > 0)


def test_candidates_are_few_and_of_all_classes():
    labels = torch.arange(5).repeat_interleave(100)
    few = adversarial_images.candidates(labels, 4)
    assert labels[few].bincount().tolist() == [16] * 5 and few[:16].tolist() == list(range(16))
    assert labels[adversarial_images.candidates(labels, 2**26 // 7)].bincount().tolist() == [
        *(2, 2, 1, 1, 1)
    ]
    assert len(adversarial_images.candidates(labels, 2**30)) == 1


def test_the_flag_after_an_evaluation_runs_the_attacks_again(folder, tmp_path):
    text = (folder / "evaluation.json").read_text()
    _, run = evaluated(tmp_path, save_adversarial=True)
    assert len(stored_by(run)["labels"]) == 80 and run.path.read_text() == text
    watching = Watching()
    evaluated(tmp_path, watching, save_adversarial=True)
    assert not any("adversarial" in note for note in watching.notes)
    evaluated(tmp_path)  # keeps the file
    assert len(stored_by(run)["labels"]) == 80


def test_images_that_an_evaluation_went_on_without_are_not_taken_up(folder, tmp_path, saved):
    with pytest.raises(Stopped):  # the attacks run again for the flag
        evaluated(tmp_path, Watching(5), save_adversarial=True)
    evaluated(tmp_path)
    _, run = evaluated(tmp_path, save_adversarial=True)
    assert torch.equal(stored_by(run)["images"], stored_by(saved[1])["images"])


def test_an_interrupted_evaluation_without_images_says_that_it_begins_again(tmp_path):
    with pytest.raises(Stopped):
        evaluated(tmp_path, Watching(5))
    watching = Watching()
    _, run = evaluated(tmp_path, watching, save_adversarial=True)
    assert any("attacks run again" in note for note in watching.notes)
    assert len(stored_by(run)["labels"]) == 80


def test_a_full_disk_is_found_before_the_attacks(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UsageError, match=r"needs 0\.0 MB") as fault:
        evaluated(tmp_path, save_adversarial=True)
    assert "--examples" in fault.value.hint


def test_without_attacks_there_is_nothing_to_save(tmp_path):
    with pytest.raises(UsageError, match="needs an attack"):
        evaluated(tmp_path, attacks="clean", save_adversarial=True)
    _, run = evaluated(tmp_path, attacks="clean")
    assert not run.path.with_name("adversarial.safetensors").exists()


def test_predictions_that_do_not_repeat_are_noted(kept, tmp_path):
    _, run = kept
    model, data = sample(3, 4, dtype=torch.float32)
    recorder = adversarial_images.Recorder(
        tmp_path / "rows", positions=torch.arange(80), total=80, image_shape=(3, 4, 4)
    )
    recorder.make()
    watching = Watching()
    with recorder:
        recorder.keep(run.evaluation, 0, torch.arange(80), data.images)
        right = model(data.images).argmax(1)
        for wrong in (0, 7):
            other = torch.cat([(right[:wrong] + 1) % 4, right[wrong:]])
            adversarial_images.count_changed(recorder, model, data, other, 30, watching)
    assert len(watching.notes) == 1 and watching.notes[0].startswith("7 of 80 stored images")


def test_rows_that_are_not_there_are_an_error(tmp_path):
    recorder = adversarial_images.Recorder(
        tmp_path / "rows", positions=torch.arange(3), total=9, image_shape=(1, 2, 2)
    )
    (tmp_path / "rows").write_bytes(bytes(40))
    with recorder, pytest.raises(CheckpointError, match="too early"):
        list(recorder.images(torch.arange(3), 2))


# --- Examples on the page ---


def pictures_of(page):
    """The pictures of a page by their alternative texts."""
    parts = page.split('<img src="data:image/png;base64,')[1:]
    return {
        html.unescape(part.split('alt="')[1].split('"')[0]): Image.open(
            io.BytesIO(base64.b64decode(part.split('"')[0]))
        )
        for part in parts
    }


def test_the_page_shows_the_images(kept):
    data, run = kept
    section = example_section(run.path.parent, run.results)
    page = render_page(run.results, [], (), section)
    pictures = pictures_of(page)
    assert len(pictures) == 3 * 4
    assert section.factor == 5 and "perturbation times 5 (" in page
    assert "Images have 4 x 4 pixels" in page
    (example, _), *_ = section.examples
    clean = pictures[f"clean, image {example.number} of class {example.name}"]
    expected = (255 * data.images[example.number]).round().byte().permute(1, 2, 0)
    assert torch.equal(torch.tensor(np.array(clean)), expected)
    attacked = pictures[f"adversarial, image {example.number} of class {example.name}"]
    with torch.no_grad():
        x = torch.tensor(np.array(attacked))[None].permute(0, 3, 1, 2) / 255
        model, _ = sample(3, 4, dtype=torch.float32)
        assert model(x).argmax(1) == int(example.predicted)


def test_a_hostile_class_name_is_text_beside_an_image(kept):
    _, run = kept
    name = '"><script>alert(1)</script>\u202e'
    classes = [f"{name}{k}" for k in range(4)]
    results = run.results | {"data": run.results["data"] | {"classes": classes}}
    page = render_page(results, [], (), example_section(run.path.parent, results))
    assert "<script" not in page and "\u202e" not in page
    assert page.count("of class &#34;&gt;&lt;script") == 3 * 4


def test_an_evaluation_without_images_has_a_report_without_them(folder):
    (folder / "adversarial.safetensors").unlink()
    assert "Adversarial images" not in write_report(str(folder)).read_text()


def other_seed(stored, texts):
    texts["seed"] = "5"


def other_format(stored, texts):
    texts["format"] = "another program's"


def row_of_no_attack(stored, texts):
    stored["attack"] += 9


def flat(stored, texts):
    stored["images"] = stored["images"].flatten(1)


def other_shape(stored, texts):
    stored["clean"] = stored["clean"][:, :, :3].clone()


def no_labels(stored, texts):
    del stored["labels"]


@pytest.mark.parametrize(
    "change", [other_seed, other_format, row_of_no_attack, flat, other_shape, no_labels]
)
def test_images_of_something_else_are_refused(folder, change):
    path = folder / "adversarial.safetensors"
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    stored = load_file(path)
    change(stored, texts)
    save_file(stored, path, texts)
    with pytest.raises(CheckpointError, match=r"adversarial\.safetensors") as fault:
        write_report(str(folder))
    assert "remove it" in fault.value.hint


def test_all_images_of_another_evaluation_are_not_taken_for_those_of_this_one(tmp_path):
    _, one = evaluated(tmp_path / "one", save_adversarial=True)
    _, other = evaluated(tmp_path / "other", seed=1)
    name = "adversarial.safetensors"
    shutil.copy(one.path.with_name(name), other.path.with_name(name))
    with pytest.raises(CheckpointError, match="another evaluation, by seed"):
        evaluated(tmp_path / "other", seed=1, save_adversarial=True)


def test_a_damaged_file_is_refused(folder, tmp_path):
    path = folder / "adversarial.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        write_report(str(folder))
    with pytest.raises(CheckpointError) as fault:
        evaluated(tmp_path, save_adversarial=True)
    assert "remove it" in fault.value.hint


@pytest.mark.parametrize(
    ("shape", "mode", "size"),
    [
        ((1, 8, 8), "L", (8, 8)),
        ((3, 8, 6), "RGB", (6, 8)),
        ((4, 8, 8), "L", (8, 8)),
        ((3, 300, 600), "RGB", (96, 48)),
        ((1, 1, 5000), "L", (96, 1)),
    ],
)
def test_pictures_of_any_size(shape, mode, size):
    content = base64.b64decode(png(torch.full(shape, 2.0)).partition(",")[2])
    picture = Image.open(io.BytesIO(content))
    assert (picture.mode, picture.size) == (mode, size)
    assert picture.getextrema() == (255, 255) or set(picture.getextrema()) == {(255, 255)}


def test_on_images_gets_every_image_that_was_classified():
    model, data = sample(3, 4, dtype=torch.float32)
    seen = torch.zeros(2, len(data), dtype=torch.long)

    def count(evaluation, row, chosen, images):
        seen[row, chosen] += 1
        assert torch.equal(model(images).argmax(1), evaluation.predictions[row, chosen])

    found = evaluate(model, data, epsilon=0.1, attacks="fgsm", batch_size=30, on_images=count)
    assert (seen[0] == 1).all() and torch.equal(seen[1] == 1, found.correct[0])
