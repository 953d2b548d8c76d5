"""`absld push`: a run's student on the Hugging Face Hub."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from absld.cli.options import AsJson
from absld.cli.output import SAME_COMMAND, command_output
from absld.cli.printing import say

Public = Annotated[
    bool,
    typer.Option(
        "--public", help=r"make the repository public, or use a public one \[default: private]"
    ),
]
License = Annotated[
    str,
    typer.Option(
        "--license", metavar="ID", help="licence of the network, such as mit or cc-by-4.0"
    ),
]
EvaluationFile = Annotated[
    str,
    typer.Option(
        "--evaluation",
        metavar="FILE",
        help=r"evaluation.json that the card shows \[default: the one of lowest robust average on all test images]",
    ),
]
Folder = Annotated[
    str, typer.Option("--out", metavar="DIR", help="write the files there, and upload nothing")
]


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="directory of a finished run")],
    target: Annotated[str, typer.Argument(metavar="hf:OWNER/NAME", help="repository on the hub")],
    *,
    public: Public = False,
    license_id: License = "",
    evaluation: EvaluationFile = "",
    out: Folder = "",
    as_json: AsJson = False,
) -> None:
    """Upload a run's student to the hub, with a card made of its evaluation.

    [bold]Examples[/]

    [cyan]absld push RUN hf:owner/name --out DIR[/]       look at the files first
    [cyan]absld push RUN hf:owner/name --license mit[/]   into a private repository

    Four files in one commit: model.safetensors, config.json, evaluation.json and
    README.md, the model card. The token is that of `hf auth login` or HF_TOKEN.
    `absld evaluate hf:owner/name` and absld.Classifier.from_pretrained load it.
    """
    from absld.runs import publishing, uploading

    repository = uploading.parse_repository(target)
    license_of_hub = uploading.parse_license(license_id)
    if not out:
        uploading.require_token()
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    shown = Path(evaluation) if evaluation else None
    with command_output(as_json, continue_with=SAME_COMMAND) as output, folder_for(out) as folder:
        prepared = publishing.write_files(Path(run), repository, folder, license_of_hub, shown)
        for note in (f"evaluation: {prepared.evaluation}", *prepared.notes):
            say(note, output.stream)
        files = [file._asdict() for file in prepared.files]
        lines = [f"{file.name:18} {file.bytes:>12,}  {file.sha256}" for file in prepared.files]
        results = {"evaluation": str(prepared.evaluation), "files": files}
        if out:
            output.present({"folder": out, **results}, [*lines, out])
            return
        if not sys.stderr.isatty():
            disable_progress_bars()
        done = uploading.upload(folder, publishing.FILES, repository, public=public)
        kind = "private" if done.private else "public"
        results = {"repository": repository, **done._asdict(), **results}
        output.present(results, [*lines, f"{done.url} ({kind})"])


@contextmanager
def folder_for(out: str) -> Iterator[Path]:
    """Yield the folder that the user gave, else one that is there until the end."""
    if out:
        yield Path(out)
    else:
        with tempfile.TemporaryDirectory(prefix="absld-push-") as folder:
            yield Path(folder)
