"""The start of trackers, which is refused if it cannot succeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from absld.config.tracking import parse_trackers
from absld.errors import UsageError
from absld.progress import Observer, Observers
from absld.text import page_of
from absld.tracking.mlflow import MLflow
from absld.tracking.tensorboard import TensorBoard
from absld.tracking.tracker import Store, Tracker, told
from absld.tracking.trackio import Trackio
from absld.tracking.wandb import Wandb

STORES: dict[str, Callable[[], Store]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


@contextmanager
def tracked(
    names: str, out: str | Path, observer: Observer, *, is_main: bool = True
) -> Iterator[Observer]:
    """Yield an observer that reports to `observer` and to trackers, whose runs end with the block.

    Args:
        names: such as tensorboard or tensorboard,mlflow; empty for none.
        out: the folder of the runs.
        is_main: whether this process is the one of several that tracks.

    Raises:
        UsageError: a tracker is not installed, or its store cannot be reached.
    """
    trackers = [
        start_tracker(name, Path(out), observer) for name in parse_trackers(names) if is_main
    ]
    completed = False
    try:
        yield Observers(observer, *trackers) if trackers else observer
        completed = True
    finally:
        for tracker in trackers:
            tracker.close(completed=completed)


def start_tracker(name: str, out: Path, observer: Observer) -> Tracker:
    """Return a tracker that has reached its store, and note where it writes. Raises UsageError."""
    store = STORES[name]()
    try:
        place = store.start(out)
    except ImportError as error:
        raise UsageError(f"--track {name}: {error}", f"pip install 'absld[{name}]'") from error
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--track {name}: {told(error)}", f"{page_of('tracking')} says how its address is set"
        ) from error
    observer.warn(f"tracked by {name}: {place}")
    return Tracker(name, store, observer.warn)
