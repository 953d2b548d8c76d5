"""Folders of image files: which names are classes, which are images, and what is skipped."""

import os
from collections.abc import Iterator, Sequence

from absld.errors import DataError
from absld.text import printable

SHOWN = 10  # names in a message


def list_files(folder: str, skipped: list[str], seen: set[str]) -> list[str]:
    """List the regular files in a folder and the folders below, in the order of ImageFolder.

    Names that begin with a dot, and what is neither file nor folder, are added to `skipped`. Links
    are followed; DataError if they lead to a folder of `seen`, to which all folders are added.
    """
    return sorted(walk(folder, skipped, seen), key=os.path.split)


def walk(folder: str, skipped: list[str], seen: set[str]) -> Iterator[str]:
    """Yield the files of `list_files`, in any order."""
    here = os.path.realpath(folder)
    if here in seen:
        raise DataError(
            f"{folder} is reached twice, by a link to it or a link to a folder that holds it",
            "remove the link: its images would count twice",
        )
    seen.add(here)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not (entry.is_dir() or entry.is_file()):
                skipped.append(entry.path)
            elif entry.is_dir():
                yield from walk(entry.path, skipped, seen)
            else:
                yield entry.path


def list_classes(folder: str, skipped: list[str]) -> list[str]:
    """List the folders in a folder, sorted, which are its classes; all else is skipped."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    classes = [entry.name for entry in found if entry.is_dir() and entry.name[0] != "."]
    skipped += [entry.path for entry in found if entry.name not in classes]
    for name in classes:
        check_utf8(os.path.join(folder, name))
    return classes


def check_utf8(path: str) -> None:
    """Raise DataError for a path that no record or page could hold."""
    if path != path.encode(errors="replace").decode():
        raise DataError(f"{printable(path)}: this name is not UTF-8", "rename it")


def describe_skipped(part: str, folder: str, skipped: Sequence[str]) -> tuple[str, ...]:
    """Describe the names that were skipped in a folder; nothing if there are none."""
    if not skipped:
        return ()
    names = sorted(printable(os.path.relpath(path, folder)) for path in skipped)
    more = ", ..." if len(skipped) > SHOWN else ""
    return (
        f"{part}: skipped {len(skipped)} names that begin with a dot, are no files or are beside "
        f"the classes: {', '.join(names[:SHOWN])}{more}",
    )
