"""The bank of a teacher's logits: each view asked for once, whatever happens to the file."""

import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
import strategies as draw
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import processes
from test_cli import few_digits, main, refused
from test_trainer import CONFIG, TRAIN, VALIDATION, bytes_of, image_set, network
from torch import nn

import absld
from absld.data.augmentation import Views, batches, draws
from absld.engine.logit_cache import (
    FEWEST,
    Bank,
    LogitBank,
    RememberingTeacher,
    bank_bytes,
    checksums,
    fill,
    open_bank,
    reserve,
    rows_of,
)
from absld.errors import CheckpointError
from absld.storage.checkpoint import save
from absld.trainer import Training

C = len(TRAIN.classes)


def counted(teacher):
    """A teacher that is in eval mode, and the number of images that it has been asked for."""
    asked = []
    teacher.eval().requires_grad_(False)
    teacher.register_forward_pre_hook(lambda module, x: asked.append(len(x[0])))
    return teacher, asked


ALL = len(Views(TRAIN, 1))


def empty(folder, rows=ALL, about="x"):
    return LogitBank.open(folder, {"about": about}, rows, C)


# --- Views by number ---


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_view_has_a_number_of_its_own(padding):
    views = Views(TRAIN, padding)
    assert len(views) == 2 * (2 * padding + 1) ** 2 * len(TRAIN)
    seen = {}
    for epoch in range(20):
        for drawn in draws(
            views, "x", epoch, batch_size=6, flip=0.5, radius=0.1, steps=len(TRAIN) // 6
        ):
            batch, numbers = views.batch(drawn), views.numbers(drawn)
            assert torch.equal(views.of_numbers(numbers), batch.x_nat)
            for number, image, place in zip(
                numbers.tolist(), drawn.images.tolist(),
                zip(*(part.tolist() for part in drawn[1:4]), strict=True), strict=True,
            ):  # fmt: skip
                assert seen.setdefault(number, (image, place)) == (image, place)
                assert 0 <= number < len(views)
    assert len(set(seen.values())) == len(seen)


def test_without_mirrors_numbers_are_in_the_first_half():
    views = Views(TRAIN, 1)
    for drawn in draws(views, "x", batch_size=6, flip=0.0, radius=0.1, steps=2):
        assert views.numbers(drawn).max() < rows_of(len(TRAIN), 1, 0.0) == len(views) // 2


def test_batches_are_those_of_their_draws():
    views = Views(TRAIN, 1)
    settings = {"batch_size": 6, "flip": 0.5, "radius": 0.1, "steps": 2}
    for batch, drawn in zip(
        batches(views, "k", **settings), draws(views, "k", **settings), strict=True
    ):
        again = views.batch(drawn)
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


# --- Rows ---

words = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(words, min_size=1, max_size=12), st.data())
def test_a_change_of_one_word_is_noticed(row, data):
    before = torch.tensor([row], dtype=torch.int32)
    at = data.draw(st.integers(0, len(row) - 1))
    after = before.clone()
    after[0, at] = data.draw(words.filter(lambda word: word != row[at]))
    assert checksums(before) != checksums(after)


@given(st.integers(2, 200), draw.seeds)
def test_what_is_written_is_read_and_nothing_else_is_there(columns, seed):
    random = torch.Generator().manual_seed(seed)
    bank = LogitBank(torch.zeros(20, columns + 1, dtype=torch.int32))
    logits = torch.randn(5, columns, generator=random) * 10
    index = torch.randperm(20, generator=random)[:5]
    assert not bank.read(torch.arange(20))[1].any()
    bank.write(index, logits)
    read, whole = bank.read(index)
    assert torch.equal(read, logits) and whole.all()
    assert bank.read(torch.arange(20))[1].sum() == 5 and bank.filled() == 0.25


def test_every_flipped_byte_is_noticed(tmp_path):
    """In a file: at 200 places, of logits and of checksums."""
    bank = empty(tmp_path, rows=50)
    index = torch.arange(50)
    random = torch.Generator().manual_seed(0)
    bank.write(index, torch.randn(50, C, generator=random))
    (path,) = tmp_path.glob("*.bank")
    content = bytearray(path.read_bytes())
    for place in torch.randint(len(content), (200,), generator=random).tolist():
        bit = 1 << place % 8
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ bit]))
        whole = empty(tmp_path, rows=50).read(index)[1]
        assert (~whole).nonzero().flatten().tolist() == [place // (4 * (C + 1))]
        path.write_bytes(content)
    assert empty(tmp_path, rows=50).read(index)[1].all()


def test_a_bank_is_a_file_of_its_size_and_says_what_it_is_of(tmp_path):
    bank = empty(tmp_path)
    (path,) = tmp_path.glob("*.bank")
    assert path.stat().st_size == bank_bytes(len(bank.rows), C) == 4 * len(bank.rows) * (C + 1)
    assert '"about": "x"' in path.with_suffix(".json").read_text()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, needed are") as caught:
        empty(tmp_path)
    assert caught.value.way_out == "remove it"


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_full_disk_is_an_error_and_leaves_no_file_of_a_wrong_size(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            empty(tmp_path)
    assert not empty(tmp_path).read(torch.arange(5))[1].any()


def test_another_teacher_or_other_images_have_another_bank(tmp_path):
    views = Views(TRAIN, 1)
    others = [
        (network("a"), views, 0.5, "fp32"),
        (network("b"), views, 0.5, "fp32"),
        (network("a"), Views(VALIDATION, 1), 0.5, "fp32"),
        (network("a"), Views(TRAIN, 2), 0.5, "fp32"),
        (network("a"), views, 0.5, "bf16"),
        (network("a"), views, 0.0, "fp32"),  # half as many views
        (nn.Sequential(*network("a"), Doubled()), views, 0.5, "fp32"),  # the same weights
    ]
    for count, (teacher, of, flip, precision) in enumerate(others, 1):
        open_bank(tmp_path, teacher, of, flip=flip, precision=precision)
        assert len(list(tmp_path.glob("*.bank"))) == count
    open_bank(tmp_path, network("a"), views, flip=0.5, precision="fp32")
    assert len(list(tmp_path.glob("*.bank"))) == count


# --- The teacher ---


def test_a_view_is_asked_for_once(tmp_path):
    teacher, asked = counted(network("t"))
    views = Views(TRAIN, 1)
    remembering = RememberingTeacher(teacher, empty(tmp_path))
    for _ in range(2):
        for drawn in draws(views, "x", batch_size=6, flip=0.5, radius=0.1, steps=2):
            batch = views.batch(drawn)
            expected = teacher(batch.x_nat)
            asked.pop()
            remembering.about_to_see(batch.x_nat, views.numbers(drawn))
            assert torch.equal(remembering(batch.x_nat), expected)
            assert torch.equal(remembering(batch.x_nat), expected)
    assert asked == [6, 6]


def test_a_few_missing_views_have_company_whose_rows_stay(tmp_path):
    """Of 48 views one is missing: 16 are evaluated, one row is written."""
    teacher, asked = counted(network("t"))
    views = Views(bytes_of(image_set(48)), 1)
    remembering = RememberingTeacher(teacher, empty(tmp_path, rows=len(views)))
    index = torch.arange(0, len(views), len(views) // 48)[:48]
    x_nat = views.of_numbers(index)
    expected = teacher(x_nat)
    remembering.bank.write(index, expected + 1)  # so that a row that is written again is seen
    remembering.bank.rows[index[7], 0] += 1
    remembering.about_to_see(x_nat, index)
    asked.clear()
    found = remembering(x_nat)
    assert asked == [FEWEST]
    assert torch.equal(found[7], expected[7])
    others = torch.arange(48) != 7
    assert torch.equal(found[others], expected[others] + 1)
    assert torch.equal(remembering.bank.read(index)[0], found)


def test_other_images_go_to_the_teacher(tmp_path):
    """Also a copy of the announced ones: who knows what was done to it."""
    teacher, asked = counted(network("t"))
    views = Views(TRAIN, 1)
    remembering = RememberingTeacher(teacher, empty(tmp_path))
    x = torch.rand(4, *TRAIN.images.shape[1:])
    assert torch.equal(remembering(x), teacher(x))
    (drawn,) = draws(views, "x", batch_size=6, flip=0.5, radius=0.1, steps=1)
    batch = views.batch(drawn)
    remembering.about_to_see(batch.x_nat, views.numbers(drawn))
    copy = batch.x_nat.clone()
    assert torch.equal(remembering(copy), teacher(copy))
    assert not remembering.bank.read(views.numbers(drawn))[1].any() and asked == [4, 4, 6, 6]


def test_filling_is_ahead_and_goes_on(tmp_path):
    teacher, asked = counted(network("t"))
    views = Views(TRAIN, 1)
    remembering = RememberingTeacher(teacher, empty(tmp_path))
    steps = fill(remembering, views, 50)
    first = [next(steps) for _ in range(2)]
    assert first == [(50, len(views)), (100, len(views))]
    assert remembering.bank.filled() == 100 / len(views)
    *_, last = fill(remembering, views, 30)
    assert last == (len(views), len(views)) and remembering.bank.filled() == 1
    assert len(views) <= sum(asked) <= len(views) + 30
    every = torch.arange(len(views))
    torch.testing.assert_close(
        remembering.bank.read(every)[0], teacher(views.of_numbers(every)), rtol=0, atol=1e-6
    )


def test_a_system_without_posix_fallocate_gets_its_file_as_well(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    (tmp_path / "a file").touch()
    reserve(tmp_path / "a file", 1000)
    assert (tmp_path / "a file").read_bytes() == bytes(1000)


def test_a_whole_bank_can_be_held_on_the_device(tmp_path):
    """As on CUDA: then neither the file nor the teacher is asked any more."""
    teacher, asked = counted(network("t"))
    views = Views(TRAIN, 1)
    remembering = RememberingTeacher(teacher, empty(tmp_path))
    *_, _ = fill(remembering, views, 50)
    remembering.bank.rows[3] += 1
    remembering.hold(torch.device("cpu"))
    assert remembering.held is None  # one is damaged
    *_, _ = fill(remembering, views, 50)
    remembering.hold(torch.device("cpu"))
    index = torch.tensor([5, 0, 3])
    expected = remembering.bank.read(index)[0]
    remembering.bank.rows[:] = 0
    before, x_nat = sum(asked), views.of_numbers(index)
    remembering.about_to_see(x_nat, index)
    assert torch.equal(remembering(x_nat), expected) and sum(asked) == before


# --- Trainings ---


def trained(folder, config=CONFIG, gib=1.0, seed="student", images=TRAIN):
    student, (teacher, asked) = network(seed), counted(network("teacher"))
    bank = Bank(Path(folder), gib) if folder else None
    reports = list(absld.fit(student, teacher, images, VALIDATION, config, bank=bank))
    return absld.digest(student.state_dict()), [r.loss for r in reports], sum(asked)


@pytest.mark.parametrize("method", ["absld", "rslad", "fair-rslad", "ard"])
def test_a_training_is_the_same_with_a_bank(method, tmp_path):
    """To the bits, on a CPU, in the first run with it and in those that find it filled; in batches
    that are large enough for it."""
    config = replace(CONFIG, method=method, epochs=6, batch_size=FEWEST)
    images = bytes_of(image_set(2 * FEWEST))
    without = trained(None, config, images=images)
    first, second = (trained(tmp_path, config, images=images) for _ in range(2))
    assert first[:2] == without[:2] == second[:2]
    # Two images for the check that the network fits, and two that name the bank.
    assert 4 < first[2] <= without[2] + 2 and second[2] == 4


def test_damage_is_mended_and_changes_nothing(tmp_path):
    first = trained(tmp_path)
    (path,) = tmp_path.glob("*.bank")
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 97):
        content[place] ^= 255
    path.write_bytes(content)
    again = trained(tmp_path)
    assert again[:2] == first[:2] and again[2] > 4
    assert trained(tmp_path)[2] == 4


def test_where_there_is_no_bank(tmp_path):
    """It does not fit, it is not wanted, the method has its teacher judge attacked images, or
    the networks are not of float32."""
    small = bank_bytes(rows_of(len(TRAIN), CONFIG.padding, CONFIG.flip), C) / 2**30
    assert trained(tmp_path, gib=0.0)[2] == trained(tmp_path, gib=small * 0.99)[2] > 2
    assert not list(tmp_path.iterdir())
    trained(tmp_path, replace(CONFIG, method="adaad", epochs=1))
    assert not list(tmp_path.iterdir())
    double = Training(
        network("s").double(), network("t").double(),
        absld.ImageSet(TRAIN.images.double() / 255, TRAIN.labels, TRAIN.classes),
        absld.ImageSet(VALIDATION.images.double() / 255, VALIDATION.labels, VALIDATION.classes),
        CONFIG, "student", lambda step: None, Bank(tmp_path, 1.0),
    )  # fmt: skip
    assert not isinstance(double.teacher, RememberingTeacher) and not list(tmp_path.iterdir())
    trained(tmp_path, gib=small)
    assert len(list(tmp_path.glob("*.bank"))) == 1


def fill_from_another_process(folder, seed):
    torch.set_num_threads(1)
    trained(folder, replace(CONFIG, seed=seed, epochs=2))


def test_two_processes_share_a_bank(tmp_path):
    """At the same time, from nothing: what they leave is whole, and of the teacher."""
    children = [
        processes.Process(target=fill_from_another_process, args=(tmp_path, seed))
        for seed in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    (path,) = tmp_path.glob("*.bank")
    views = Views(TRAIN, CONFIG.padding)
    bank = open_bank(
        tmp_path, network("teacher"), views, flip=CONFIG.flip, precision=CONFIG.precision
    )
    there = bank.read(torch.arange(len(bank.rows)))[1].nonzero().flatten()
    assert len(there) > 30 and len(list(tmp_path.glob("*.bank"))) == 1 and path.exists()
    teacher, _ = counted(network("teacher"))
    torch.testing.assert_close(
        bank.read(there)[0], teacher(views.of_numbers(there)), rtol=0, atol=1e-6
    )


# --- absld teacher bank ---


def test_a_bank_that_is_filled_ahead_answers_for_all_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("absld.runs.training_run.load_data", lambda *given: few_digits())
    save({"model": absld.build_model("convnet", 10, "t").state_dict()}, Path("teacher.pt"))
    given = ["--teacher", "teacher.pt", "--batch-size", "16", "--device", "cpu"]
    assert main("teacher", "bank", *given) == 0
    views = 9 * len(few_digits().train)
    told = capfd.readouterr().out
    assert (
        "teacher's logits of all views: 0.0 MiB in runs/banks" in told
        and f"{views:,} of {views:,}" in told
    )
    (path,) = Path("runs/banks").glob("*.bank")
    assert LogitBank(
        torch.from_file(str(path), size=views * 11, dtype=torch.int32).view(views, 11)
    ).filled() == 1  # fmt: skip
    seen = []
    ask = RememberingTeacher.forward
    monkeypatch.setattr(
        "absld.engine.logit_cache.RememberingTeacher.forward",
        lambda self, x: seen.append(self.bank.read(self.announced[1])[1].all()) or ask(self, x),
    )
    quick = ["--epochs", "2", "--allow-weak-teacher", "--max-steps", "2", *given]
    assert main("train", *quick) == 0
    assert len(seen) == 4 and all(seen) and len(list(path.parent.glob("*.bank"))) == 1
    digest = re.findall("student sha256: .*", capfd.readouterr().out)
    assert main("train", *quick, "--bank-gib", "0", "--out", "other") == 0
    assert digest == re.findall("student sha256: .*", capfd.readouterr().out)
    assert not Path("other/banks").exists()


def test_banks_that_cannot_be(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("absld.runs.training_run.load_data", lambda *given: few_digits())
    save({"model": absld.build_model("convnet", 10, "t").state_dict()}, Path("teacher.pt"))
    refused(capfd, 2, "whose logits?", "--teacher", "teacher", "bank")
    refused(capfd, 2, "is more than --bank-gib 0", "larger --bank-gib",
            "teacher", "bank", "--teacher", "teacher.pt", "--bank-gib", "0")  # fmt: skip
    refused(capfd, 4, "gone.pt", "path", "teacher", "bank", "--teacher", "gone.pt")
