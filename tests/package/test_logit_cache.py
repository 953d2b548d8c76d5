"""The cache of a teacher's logits: each view is evaluated once, whatever happens to the file."""

import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import strategies as draw
from helpers.processes import processes
from helpers.program import few_digits, main, refused, use_few_digits
from helpers.small_training import CONFIG, TRAIN, VALIDATION, bytes_of, image_set, network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.data.augmentation import Views, batches, draws
from absld.engine.logit_cache import (
    MIN_BATCH,
    CachedTeacher,
    DeviceCachedTeacher,
    LogitCache,
    LogitCacheSettings,
    cache_bytes,
    cache_rows,
    cached_epoch,
    cached_teacher,
    checksums,
    fill,
    open_logit_cache,
    reserve,
)
from absld.errors import CheckpointError
from absld.stepper import Stepper
from absld.storage.checkpoint import save

C = len(TRAIN.classes)


def counted(teacher):
    """Return the teacher in eval mode, and the numbers of images that it has evaluated."""
    evaluated = []
    teacher.eval().requires_grad_(False)
    teacher.register_forward_pre_hook(lambda module, x: evaluated.append(len(x[0])))
    return teacher, evaluated


ALL = len(Views(TRAIN, 1))


def empty(folder, rows=ALL, about="x"):
    return LogitCache.open(folder, {"about": about}, rows, C)


def filled(cache):
    """Return the fraction of rows that are valid."""
    return cache.read(torch.arange(len(cache.rows)))[1].double().mean()


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
                zip(*(part.tolist() for part in drawn[2:5]), strict=True), strict=True,
            ):  # fmt: skip
                assert seen.setdefault(number, (image, place)) == (image, place)
                assert 0 <= number < len(views)
    assert len(set(seen.values())) == len(seen)


def test_without_mirrors_numbers_are_in_the_first_half():
    views = Views(TRAIN, 1)
    for drawn in draws(views, "x", batch_size=6, flip=0.0, radius=0.1, steps=2):
        assert views.numbers(drawn).max() < cache_rows(len(TRAIN), 1, 0.0) == len(views) // 2


def test_batches_are_those_of_their_draws():
    views = Views(TRAIN, 1)
    settings = {"batch_size": 6, "flip": 0.5, "radius": 0.1, "steps": 2}
    for batch, drawn in zip(
        batches(views, "k", **settings), draws(views, "k", **settings), strict=True
    ):
        again = views.batch(drawn)
        assert batch.views is again.views is None
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], again[:3], strict=True))


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
    cache = LogitCache(torch.zeros(20, columns + 1, dtype=torch.int32))
    logits = torch.randn(5, columns, generator=random) * 10
    index = torch.randperm(20, generator=random)[:5]
    assert not cache.read(torch.arange(20))[1].any()
    cache.write(index, logits)
    read, valid = cache.read(index)
    assert torch.equal(read, logits) and valid.all()
    assert cache.read(torch.arange(20))[1].sum() == 5 and filled(cache) == 0.25


def test_every_flipped_byte_is_noticed(tmp_path):
    """In a file: at 200 places, of logits and of checksums."""
    cache = empty(tmp_path, rows=50)
    index = torch.arange(50)
    random = torch.Generator().manual_seed(0)
    cache.write(index, torch.randn(50, C, generator=random))
    (path,) = tmp_path.glob("*.cache")
    content = bytearray(path.read_bytes())
    for place in torch.randint(len(content), (200,), generator=random).tolist():
        bit = 1 << place % 8
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ bit]))
        valid = empty(tmp_path, rows=50).read(index)[1]
        assert (~valid).nonzero().flatten().tolist() == [place // (4 * (C + 1))]
        path.write_bytes(content)
    assert empty(tmp_path, rows=50).read(index)[1].all()


def test_a_cache_is_a_file_of_its_size_beside_its_identity(tmp_path):
    cache = empty(tmp_path)
    (path,) = tmp_path.glob("*.cache")
    assert path.stat().st_size == cache_bytes(len(cache.rows), C) == 4 * len(cache.rows) * (C + 1)
    assert '"about": "x"' in path.with_suffix(".json").read_text()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, expected") as caught:
        empty(tmp_path)
    assert caught.value.hint == "remove it"


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


def opened(folder, teacher, views, flip, precision, batch_size=32):
    settings = {"flip": flip, "precision": precision, "batch_size": batch_size}
    return open_logit_cache(folder, teacher, views, **settings)


def test_another_teacher_or_other_images_have_another_cache(tmp_path):
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
        opened(tmp_path, teacher, of, flip, precision)
        assert len(list(tmp_path.glob("*.cache"))) == count
    opened(tmp_path, network("a"), views, 0.5, "fp32", batch_size=64)  # on a CPU it does not count
    assert len(list(tmp_path.glob("*.cache"))) == count


# --- The teacher ---


def test_a_view_is_evaluated_once(tmp_path):
    teacher, evaluated = counted(network("t"))
    views = Views(TRAIN, 1)
    cached = CachedTeacher(teacher, empty(tmp_path))
    for _ in range(2):
        for drawn in draws(views, "x", batch_size=6, flip=0.5, radius=0.1, steps=2):
            x_nat, numbers = views.batch(drawn).x_nat, views.numbers(drawn)
            expected = teacher(x_nat)
            evaluated.pop()
            for _ in range(2):
                assert torch.equal(cached(x_nat, numbers), expected)
    assert evaluated == [6, 6]


def test_a_missing_view_is_evaluated_among_others_whose_rows_stay(tmp_path):
    """Of 48 views one is missing: 16 are evaluated, one row is written."""
    teacher, evaluated = counted(network("t"))
    views = Views(bytes_of(image_set(48)), 1)
    cached = CachedTeacher(teacher, empty(tmp_path, rows=len(views)))
    index = torch.arange(0, len(views), len(views) // 48)[:48]
    x_nat = views.of_numbers(index)
    expected = teacher(x_nat)
    cached.cache.write(index, expected + 1)  # so that a row that is written again is seen
    cached.cache.rows[index[7], 0] += 1
    evaluated.clear()
    logits = cached(x_nat, index)
    assert evaluated == [MIN_BATCH]
    assert torch.equal(logits[7], expected[7])
    others = torch.arange(48) != 7
    assert torch.equal(logits[others], expected[others] + 1)
    assert torch.equal(cached.cache.read(index)[0], logits)


def test_images_without_view_numbers_are_evaluated_by_the_teacher(tmp_path):
    """Such as attacked images; nothing is cached."""
    teacher, evaluated = counted(network("t"))
    cached = CachedTeacher(teacher, empty(tmp_path))
    for x in (torch.rand(4, *TRAIN.images.shape[1:]), Views(TRAIN, 1).of_numbers(torch.arange(6))):
        assert torch.equal(cached(x), teacher(x))
    assert filled(cached.cache) == 0 and evaluated == [4, 4, 6, 6]


def test_filling_is_resumed_where_it_was_interrupted(tmp_path):
    teacher, evaluated = counted(network("t"))
    views = Views(TRAIN, 1)
    cached = CachedTeacher(teacher, empty(tmp_path))
    steps = fill(cached, views, 50)
    first = [next(steps) for _ in range(2)]
    assert first == [(50, len(views)), (100, len(views))]
    assert filled(cached.cache) == 100 / len(views)
    *_, last = fill(cached, views, 30)
    assert last == (len(views), len(views)) and filled(cached.cache) == 1
    assert len(views) <= sum(evaluated) <= len(views) + 30
    every = torch.arange(len(views))
    torch.testing.assert_close(
        cached.cache.read(every)[0], teacher(views.of_numbers(every)), rtol=0, atol=1e-6
    )


def test_a_system_without_posix_fallocate_gets_its_file_as_well(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    (tmp_path / "a file").touch()
    reserve(tmp_path / "a file", 1000)
    assert (tmp_path / "a file").read_bytes() == bytes(1000)


# --- On an accelerator; the CPU stands in for one ---

CPU = torch.device("cpu")


class RoundedByBatch(nn.Module):
    """Gives logits that depend on the size of the batch, as rounding does on a GPU."""

    def forward(self, x):
        return x.flatten(1)[:, :C] + len(x)


def on_device(folder, teacher=None):
    """Return a teacher on a device with an empty cache, the sizes of the batches that it evaluates,
    and all views."""
    teacher, evaluated = counted(teacher or RoundedByBatch())
    return DeviceCachedTeacher(teacher, empty(folder), CPU), evaluated, Views(TRAIN, 1)


def asked(cached, views, *batches):
    """Return the logits of batches of an epoch."""
    with cached_epoch(cached):
        return [cached(views.of_numbers(index), index) for index in batches]


def test_a_teacher_has_the_cache_of_its_device(tmp_path):
    teacher, cache = network("t"), empty(tmp_path)
    assert type(cached_teacher(teacher, cache, CPU)) is CachedTeacher
    accelerated = cached_teacher(teacher, cache, torch.device("cuda"))
    assert type(accelerated) is DeviceCachedTeacher and accelerated.device.type == "cuda"


def test_a_device_evaluates_whole_batches_until_the_cache_is_whole_and_then_none(tmp_path):
    """Also if it becomes whole during a run. The numbers are the same before and afterwards."""
    cached, evaluated, views = on_device(tmp_path)
    index = torch.tensor([5, 0, 3, 200])
    before = asked(cached, views, index, index + 1)
    again = asked(cached, views, index)
    assert cached.held is None and evaluated == [4, 4, 4]
    steps = len(list(fill(cached, views, 4)))
    assert steps == len(views) // 4 and evaluated.count(4) == len(evaluated)
    evaluated.clear()
    after = asked(cached, views, index, index + 1)
    assert evaluated == [] and cached.held is not None
    assert all(map(torch.equal, after, before)) and torch.equal(again[0], before[0])
    cached.cache.rows[:] = 0
    assert torch.equal(asked(cached, views, index)[0], before[0])  # the file is not read again


def test_a_damaged_row_keeps_a_device_from_using_the_cache(tmp_path):
    cached, evaluated, views = on_device(tmp_path)
    *_, _ = fill(cached, views, 4)
    cached.cache.rows[-1, 0] += 1
    evaluated.clear()
    asked(cached, views, torch.arange(4))
    assert cached.held is None and evaluated == [4]
    *_, _ = fill(cached, views, 4)
    assert evaluated == [4, 4]  # the batch of the damaged row
    asked(cached, views, torch.arange(4))
    assert cached.held is not None


def test_a_device_stores_the_logits_of_an_epoch_at_its_end(tmp_path):
    """Only finite ones that the file lacks, and none of an epoch that is interrupted."""
    cached, _, views = on_device(tmp_path)
    first, second = torch.arange(4), torch.arange(2, 6)
    with pytest.raises(KeyboardInterrupt), cached_epoch(cached):
        cached(views.of_numbers(first), first)
        raise KeyboardInterrupt
    assert filled(cached.cache) == 0
    stored = torch.full((2, C), 7.0)
    cached.cache.write(torch.tensor([0, 3]), stored)
    x = views.of_numbers(second)
    x[0] = torch.nan
    with cached_epoch(cached):
        cached(x, second)
        assert filled(cached.cache) == 2 / len(views)
    logits, valid = cached.cache.read(torch.arange(6))
    assert valid.tolist() == [True, False, False, True, True, True]
    assert torch.equal(logits[[0, 3]], stored)
    assert torch.equal(logits[4:], cached.teacher(x)[2:])


def test_the_last_batch_of_a_filling_is_a_whole_one(tmp_path):
    cached, evaluated, views = on_device(tmp_path)
    assert len(views) % 50
    steps = list(fill(cached, views, 50))
    assert steps[-1] == (len(views), len(views)) and evaluated == [50] * len(steps)
    assert torch.equal(
        cached.cache.read_whole(chunk=100),
        views.of_numbers(torch.arange(len(views))).flatten(1)[:, :C] + 50,
    )


def test_no_epoch_of_a_cpu_or_without_a_teacher_is_different(tmp_path):
    for teacher in (None, network("t"), CachedTeacher(network("t"), empty(tmp_path))):
        with cached_epoch(teacher):
            pass
    assert filled(empty(tmp_path)) == 0


# --- Trainings ---


def trained(folder, config=CONFIG, gib=1.0, seed="student", images=TRAIN):
    student, (teacher, evaluated) = network(seed), counted(network("teacher"))
    cache = LogitCacheSettings(Path(folder), gib) if folder else None
    reports = list(absld.fit(student, teacher, images, VALIDATION, config, logit_cache=cache))
    return absld.digest(student.state_dict()), [r.loss for r in reports], sum(evaluated)


@pytest.mark.parametrize("method", ["absld", "rslad", "fair-rslad", "ard"])
def test_a_training_with_a_cache_is_bit_equal(method, tmp_path):
    """On a CPU, in the first run with it and in those that find it filled; in batches of at least
    MIN_BATCH images."""
    config = replace(CONFIG, method=method, epochs=6, batch_size=MIN_BATCH)
    images = bytes_of(image_set(2 * MIN_BATCH))
    without = trained(None, config, images=images)
    first, second = (trained(tmp_path, config, images=images) for _ in range(2))
    assert first[:2] == without[:2] == second[:2]
    # Two images for the check that the network fits, and two for the identity of the cache.
    assert 4 < first[2] <= without[2] + 2 and second[2] == 4


def test_iad_caches_the_logits_of_clean_views_alone(tmp_path):
    """The logits of attacked images are neither cached nor taken from the cache."""
    config = replace(CONFIG, method="iad", epochs=4, batch_size=MIN_BATCH)
    images = bytes_of(image_set(2 * MIN_BATCH))
    without = trained(None, config, images=images)
    first, second = (trained(tmp_path, config, images=images) for _ in range(2))
    assert first[:2] == without[:2] == second[:2]
    attacked = 3 * 2 * MIN_BATCH  # in all epochs after the first
    assert second[2] == 4 + attacked


def test_a_damaged_file_is_repaired_and_changes_no_training(tmp_path):
    first = trained(tmp_path)
    (path,) = tmp_path.glob("*.cache")
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 97):
        content[place] ^= 255
    path.write_bytes(content)
    again = trained(tmp_path)
    assert again[:2] == first[:2] and again[2] > 4
    assert trained(tmp_path)[2] == 4


def test_there_is_no_cache_where_it_does_not_fit_or_help(tmp_path):
    """It is too large, it is not wanted, or the method's teacher evaluates attacked images."""
    small = cache_bytes(cache_rows(len(TRAIN), CONFIG.padding, CONFIG.flip), C) / 2**30
    assert trained(tmp_path, gib=0.0)[2] == trained(tmp_path, gib=small * 0.99)[2] > 2
    assert not list(tmp_path.iterdir())
    trained(tmp_path, replace(CONFIG, method="adaad", epochs=1))
    assert not list(tmp_path.iterdir())
    trained(tmp_path, gib=small)
    assert len(list(tmp_path.glob("*.cache"))) == 1


def test_there_is_no_cache_of_logits_that_are_not_float32(tmp_path, double_precision):
    student, teacher = network("s").double(), network("t").double()
    cache = LogitCacheSettings(tmp_path, 1.0)
    stepper = Stepper(student, teacher, TRAIN, CONFIG, logit_cache=cache)
    assert not isinstance(stepper.teacher, CachedTeacher) and not list(tmp_path.iterdir())


def train_with_cache(folder, seed):
    torch.set_num_threads(1)
    trained(folder, replace(CONFIG, seed=seed, epochs=2))


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path):
    """At the same time, from nothing: the rows that they leave are the teacher's logits."""
    children = [
        processes.Process(target=train_with_cache, args=(tmp_path, seed)) for seed in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    (path,) = tmp_path.glob("*.cache")
    views = Views(TRAIN, CONFIG.padding)
    cache = opened(tmp_path, network("teacher"), views, CONFIG.flip, "fp32")
    there = cache.read(torch.arange(len(cache.rows)))[1].nonzero().flatten()
    assert len(there) > 30 and len(list(tmp_path.glob("*.cache"))) == 1 and path.exists()
    teacher, _ = counted(network("teacher"))
    torch.testing.assert_close(
        cache.read(there)[0], teacher(views.of_numbers(there)), rtol=0, atol=1e-6
    )


# --- absld teacher cache ---


@pytest.mark.parametrize("precision", [[], ["--teacher-precision", "fp32"]])
def test_a_cache_that_is_filled_ahead_serves_all_runs(precision, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    use_few_digits(monkeypatch)
    save({"model": absld.build_model("convnet", 10, "t").state_dict()}, Path("teacher.pt"))
    given = ["--teacher", "teacher.pt", "--batch-size", "16", "--device", "cpu", *precision]
    assert main("teacher", "cache", *given) == 0
    views = 9 * len(few_digits().train)
    output = capfd.readouterr().out
    assert "teacher's logits of all views: 0.0 MiB in runs/logit-caches" in output
    assert f"{views:,} of {views:,}" in output
    (path,) = Path("runs/logit-caches").glob("*.cache")
    rows = torch.from_file(str(path), size=views * 11, dtype=torch.int32).view(views, 11)
    assert filled(LogitCache(rows)) == 1
    hits = []
    forward = CachedTeacher.forward

    def noted(self, x, views=None):
        hits.append(self.cache.read(views)[1].all())
        return forward(self, x, views)

    monkeypatch.setattr("absld.engine.logit_cache.CachedTeacher.forward", noted)
    quick = ["--epochs", "2", "--allow-weak-teacher", "--max-steps", "2", *given]
    assert main("train", *quick) == 0
    assert len(hits) == 4 and all(hits) and len(list(path.parent.glob("*.cache"))) == 1
    digest = re.findall("student sha256: .*", capfd.readouterr().out)
    assert main("train", *quick, "--logit-cache-gib", "0", "--out", "other") == 0
    assert digest == re.findall("student sha256: .*", capfd.readouterr().out)
    assert not Path("other/logit-caches").exists()


def test_a_cache_that_cannot_be_made_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    use_few_digits(monkeypatch)
    save({"model": absld.build_model("convnet", 10, "t").state_dict()}, Path("teacher.pt"))
    refused(capfd, 2, "teacher cache needs a teacher", "--teacher", "teacher", "cache")
    refused(capfd, 2, "is more than --logit-cache-gib 0", "larger --logit-cache-gib",
            "teacher", "cache", "--teacher", "teacher.pt", "--logit-cache-gib", "0")  # fmt: skip
    refused(capfd, 4, "gone.pt", "path", "teacher", "cache", "--teacher", "gone.pt")
