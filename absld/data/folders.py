"""Folders of image files: which names are classes, which are images, and what is skipped."""

import os
from collections.abc import Iterator, Sequence
from typing import Literal

from absld.errors import DataError
from absld.text import first_of, printable

SHOWN = 10  # names in a message


def list_files(folder: str, skipped: list[str], seen: set[str]) -> list[str]:
    """List the regular files in a folder and the folders below, in the order of ImageFolder.

    Names that begin with a dot, and what is neither file nor folder, are added to `skipped`. Links
    are followed; DataError if they lead to a path of `seen`, to which all files and folders are
    added: no image counts twice.
    """
    return sorted(walk(folder, skipped, seen), key=os.path.split)


def walk(folder: str, skipped: list[str], seen: set[str]) -> Iterator[str]:
    """Yield the files of `list_files`, in any order."""
    here = os.path.realpath(folder)
    see(folder, here, seen)
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = kind_of(entry)
            if entry.name.startswith(".") or not kind:
                skipped.append(entry.path)
            elif kind == "folder":
                yield from walk(entry.path, skipped, seen)
            else:
                linked = entry.is_symlink()
                see(entry.path, os.path.realpath(entry) if linked else f"{here}/{entry.name}", seen)
                yield entry.path


def see(path: str, real: str, seen: set[str]) -> None:
    """Add the real path of a file or folder to `seen`. Raises DataError if it is there already."""
    if real in seen:
        raise DataError(
            f"{path} is reached twice, by a link to it or a link to a folder that holds it",
            "remove the link: its images would count twice",
        )
    seen.add(real)


def kind_of(entry: os.DirEntry[str]) -> Literal["file", "folder", ""]:
    """Return what a name is, or what its link leads to; empty for all else."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a link to itself, or through a file
        return ""


def list_classes(folder: str, skipped: list[str]) -> list[str]:
    """List the folders in a folder, sorted, which are its classes; all else is skipped."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    classes = {entry.name for entry in found if entry.name[0] != "." and kind_of(entry) == "folder"}
    skipped += [entry.path for entry in found if entry.name not in classes]
    for name in classes:
        check_utf8(os.path.join(folder, name))
    return sorted(classes)


def check_utf8(path: str) -> None:
    """Raise DataError for a path that no record or page could hold."""
    if path != path.encode(errors="replace").decode():
        raise DataError(f"{printable(path)}: this name is not UTF-8", "rename it")


def describe_skipped(part: str, folder: str, skipped: Sequence[str]) -> tuple[str, ...]:
    """Describe the names that were skipped in a folder; nothing if there are none."""
    if not skipped:
        return ()
    names = sorted(printable(os.path.relpath(path, folder)) for path in skipped)
    return (
        f"{part}: skipped {len(skipped)} names (hidden, not a file, outside of the classes, or not "
        f"listed): {first_of(names, SHOWN)}",
    )
