"""The setting of trackers. Imports none of them."""

from dataclasses import dataclass

from absld.config.fields import Settings, setting
from absld.config.parsing import did_you_mean
from absld.errors import UsageError
from absld.text import page_of

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class TrackingSettings(Settings):
    """Where to report what is trained and evaluated; it decides nothing that is computed."""

    track: str = setting(
        "",
        "Run",
        f"trackers to report to, separated by commas: {', '.join(TRACKERS)} "
        f"(see {page_of('tracking')}) [default: none]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_trackers(self.track)


def parse_trackers(text: str) -> list[str]:
    """Return the trackers in a text such as tensorboard,mlflow, each once. Raises UsageError."""
    names = [name for part in text.split(",") if (name := part.strip())]
    for name in names:
        if name not in TRACKERS:
            raise UsageError(
                f"track takes {', '.join(TRACKERS)}, not {name!r}", did_you_mean(name, TRACKERS)
            )
    return list(dict.fromkeys(names))
