"""The logit caches of runs: where they are, how large, and filling one ahead of all runs."""

from collections.abc import Iterator
from pathlib import Path

from absld.config.datasets import Columns
from absld.config.settings import Config
from absld.data.augmentation import Views
from absld.data.dataset import ImageSet
from absld.data.decoding import Form
from absld.data.placement import Placement
from absld.data.sources import load_split
from absld.engine.logit_cache import (
    cache_bytes,
    cache_rows,
    cached_teacher,
    fill,
    open_logit_cache,
)
from absld.engine.precision import float32_precision, resolve_device
from absld.engine.techniques import choose_techniques
from absld.errors import UsageError
from absld.evaluation.class_names import check_class_names, check_image_shape
from absld.evaluation.validation import check_network
from absld.models.loading import Network, load_network
from absld.models.published import refuse_published
from absld.progress import SILENT, Observer
from absld.stepper import freeze_teacher
from absld.storage.opening import refuse_links


def load_teacher(config: Config, train: ImageSet, observer: Observer = SILENT) -> Network:
    """Load the teacher of `--teacher`. Raises AbsldError if there is none, or it does not fit."""
    refuse_published(config.teacher, config.dataset)
    teacher = load_network(
        config.teacher,
        train.num_classes,
        (config.seed, "teacher"),
        config.teacher_model,
        config.teacher_weights,
        image_shape=train.image_shape,
        observer=observer,
    )
    check_network(teacher.model, train, config.teacher)
    teacher = check_class_names(teacher, train, config.teacher, config.class_order)
    return check_image_shape(teacher, train, config.teacher)


def fill_logit_cache(config: Config, observer: Observer) -> Iterator[tuple[int, int]]:
    """Cache the logits of the given teacher for every view of the training images.

    Yields the number of views done, and of all views. Raises AbsldError.
    """
    if not config.teacher:
        raise UsageError(
            "teacher cache needs a teacher",
            "--teacher FILE, a run, hf:owner/name or package.module:factory",
        )
    device = resolve_device(config.device)
    placement = Placement(config.in_memory, device, observer)
    train = load_split(
        config.dataset, config.data, Form.of(config), "train", placement, Columns.of(config)
    )
    teacher = load_teacher(config, train, observer)
    for text in teacher.notes:
        observer.note(text)
    size = cache_size(config, train)
    if size > config.logit_cache_gib * 2**30:
        raise UsageError(
            f"a cache of {size / 2**30:.2g} GiB is more than --logit-cache-gib "
            f"{config.logit_cache_gib:g}",
            "a larger --logit-cache-gib, or no cache: the teacher then evaluates every batch",
        )
    observer.note(describe_cache(config, train))
    views = Views(train.to(device), config.padding)
    # As in a training, whose cache this is to be.
    techniques = choose_techniques(config, device)
    network = freeze_teacher(teacher.model.to(device), techniques)
    with float32_precision(techniques.precision):
        cache = open_logit_cache(
            cache_folder(config),
            network,
            views,
            flip=config.flip,
            precision=techniques.teacher_precision,
            batch_size=config.batch_size,
        )
        yield from fill(cached_teacher(network, cache, device), views, config.batch_size)


def cache_folder(config: Config) -> Path:
    """Return the folder of the caches. Raises CheckpointError if it is a link."""
    folder = Path(config.out) / "logit-caches"
    refuse_links(folder, Path(config.out))
    return folder


def cache_size(config: Config, train: ImageSet) -> int:
    """Return the size of the cache in bytes."""
    rows = cache_rows(len(train), config.padding, config.flip)
    return cache_bytes(rows, train.num_classes)


def describe_cache(config: Config, train: ImageSet) -> str:
    """Describe the cache: its size, and whether it is within the limit."""
    size = cache_size(config, train)
    text = f"teacher's logits of all views: {size / 2**20:,.1f} MiB"
    if size <= config.logit_cache_gib * 2**30:
        on_cpu = train.device.type == "cpu"
        when = "" if on_cpu else "; used once all are there: `absld teacher cache` fills it"
        return f"{text} in {cache_folder(config)}{when}"
    limit = f"--logit-cache-gib {config.logit_cache_gib:g}"
    return f"{text}, more than {limit}: the teacher evaluates every batch"
