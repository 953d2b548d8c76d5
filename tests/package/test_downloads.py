"""Downloads of archives from a server on loopback: sources in order, faults, unpacking."""

import hashlib
import io
import multiprocessing
import socketserver
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event

import pytest
from filelock import FileLock
from helpers.image_files import make_cifar, publish
from helpers.program import main

from absld.data import archives, downloads
from absld.data.archives import ARCHIVES, provide, unpack_zip
from absld.data.sources import load_data
from absld.errors import DataError
from absld.progress import SILENT, Observer

CONTENT = bytes(range(256)) * 1024  # four chunks


class Answer(BaseHTTPRequestHandler):
    """Answers by the first part of the path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, f"send_{self.path.split('/')[1]}")()

    def log_message(self, *_):
        pass

    def send(self, content, *, status=200, claimed=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(content)

    def send_whole(self):
        self.send(CONTENT)

    def send_file(self):
        self.send(self.server.files[self.path.rsplit("/", 1)[1]])

    def send_missing(self):
        self.send(b"no", status=404)

    def send_failing(self):
        self.send(b"", status=503)

    def send_page(self):
        self.send(b"\n<!DOCTYPE html><html>log in</html>")

    def send_other(self):
        self.send(CONTENT[::-1])

    def send_short(self):
        self.send(CONTENT[:1000])

    def send_endless(self):
        self.send_response(200)
        self.end_headers()  # without a length: until the connection ends
        self.close_connection = True
        try:
            while True:
                self.wfile.write(CONTENT)
        except OSError:
            self.server.asked.append("gone")

    def send_truncated(self):
        self.close_connection = True
        self.send(CONTENT[:100_000], claimed=len(CONTENT))

    def send_once(self):
        """Break off once, as a bad connection does."""
        first = self.server.asked.count(self.path) == 1
        (self.send_truncated if first else self.send_whole)()

    def send_hanging(self):
        self.send(CONTENT[:100_000], claimed=len(CONTENT))
        self.server.over.wait(20)

    def send_silent(self):
        self.server.over.wait(20)

    def send_slow(self):
        time.sleep(0.5)
        self.send_whole()


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 16

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # that of HTTPServer asks for its own name
        self.server_name, self.server_port = self.server_address

    def handle_error(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Answer) as server:
        server.asked, server.files, server.over = [], {}, Event()
        server.url = "http://{}:{}".format(*server.server_address)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


class Notes(Observer):
    def __init__(self):
        self.notes, self.loads = [], []

    def note(self, text):
        self.notes.append(text)

    wait = note

    def load(self, *report):
        self.loads.append(report)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Publish CONTENT as an archive without a place; return a function that names its URLs."""
    (tmp_path / "x.mat").write_bytes(CONTENT)
    monkeypatch.delenv("ABSLD_DATA_MIRROR", raising=False)

    def at(*urls):
        publish("svhn-test", tmp_path / "x.mat", monkeypatch, *urls)
        return tmp_path / "data" / "x.mat"

    return at


def test_an_archive_is_downloaded_with_its_url_size_and_progress(server, archive):
    path, seen = archive(f"{server.url}/whole/x.mat"), Notes()
    provide(["svhn-test"], str(path.parent), seen)
    assert path.read_bytes() == CONTENT
    assert seen.notes == [f"downloading {server.url}/whole/x.mat (0.2 MiB) to {path}"]
    assert [done for _, done, *_ in seen.loads] == [2**16, 2**17, 3 * 2**16, 2**18, 2**18]
    provide(["svhn-test"], str(path.parent), seen)
    assert len(server.asked) == 1  # a file that is there is not downloaded again


FAULTS = {
    "missing": "HTTP 404 Not Found",
    "failing": "HTTP 503 Service Unavailable",
    "page": "an HTML page",
    "other": f"another file, of SHA-256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}",
    "short": "1,000 bytes, not 262,144",
    "endless": "more than 262,144 bytes",
    "truncated": "bytes read",
    "hanging": "timed out",
    "silent": "timed out",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_source_is_asked_when_one_fails(fault, server, archive, monkeypatch):
    if FAULTS[fault] == "timed out":
        monkeypatch.setattr(downloads, "TIMEOUT", (10.0, 1.0))
    path, seen = archive(f"{server.url}/{fault}/x.mat", f"{server.url}/whole/x.mat"), Notes()
    provide(["svhn-test"], str(path.parent), seen)
    assert path.read_bytes() == CONTENT
    assert (
        seen.notes[1].startswith(f"{server.url}/{fault}/x.mat: ") and FAULTS[fault] in seen.notes[1]
    )
    assert not [*path.parent.glob(".partial-*")]


def test_all_sources_with_their_causes_are_named_when_none_has_the_file(server, archive):
    urls = [f"{server.url}/{fault}/x.mat" for fault in ("missing", "page")]
    path = archive(*urls, "http://127.0.0.1:9/x.mat")
    path.parent.mkdir()
    path.write_bytes(b"half")
    with pytest.raises(DataError) as caught:
        provide(["svhn-test"], str(path.parent), SILENT)
    assert str(caught.value) == (
        f"cannot download x.mat (262,144 bytes, MD5 {hashlib.md5(CONTENT).hexdigest()}): "
        f"{path} is a different file; {urls[0]}: HTTP 404 Not Found; {urls[1]}: an HTML page; "
        "http://127.0.0.1:9/x.mat: Connection refused"
    )
    assert caught.value.hint.startswith(f"put it into {path.parent} by hand, or set ABSLD_DATA_MIR")
    assert path.read_bytes() == b"half"


def test_a_connection_that_breaks_off_is_tried_again(server, archive):
    path = archive(f"{server.url}/once/x.mat")
    provide(["svhn-test"], str(path.parent), SILENT)
    assert path.read_bytes() == CONTENT and len(server.asked) == 2


@pytest.mark.parametrize("kind", ["url", "folder", "file", "password"])
def test_the_mirror_of_the_environment_is_asked_first(kind, server, archive, tmp_path, monkeypatch):
    path, seen = archive(f"{server.url}/missing/x.mat"), Notes()
    url = server.url.replace("//", "//me:secret@") if kind == "password" else server.url
    mirrors = {"folder": str(tmp_path), "file": tmp_path.as_uri()}
    monkeypatch.setenv("ABSLD_DATA_MIRROR", mirrors.get(kind, f"{url}/whole/"))
    provide(["svhn-test"], str(path.parent), seen)
    assert path.read_bytes() == CONTENT
    assert server.asked == ([] if kind in mirrors else ["/whole/x.mat"])
    assert "secret" not in "".join(seen.notes)


def test_a_mirror_without_the_file_is_no_end(server, archive, tmp_path, monkeypatch):
    path, seen = archive(f"{server.url}/whole/x.mat"), Notes()
    monkeypatch.setenv("ABSLD_DATA_MIRROR", str(tmp_path / "none"))
    provide(["svhn-test"], str(path.parent), seen)
    assert path.read_bytes() == CONTENT
    assert seen.notes[1] == f"{tmp_path}/none/x.mat: No such file or directory"


def provide_in_another_process(folder, archive):
    ARCHIVES["svhn-test"] = archive
    provide(["svhn-test"], folder, SILENT)


def test_of_two_processes_one_downloads(server, archive):
    path = archive(f"{server.url}/slow/x.mat")
    arguments = (str(path.parent), ARCHIVES["svhn-test"])
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=provide_in_another_process, args=arguments) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert path.read_bytes() == CONTENT and len(server.asked) == 1


def test_a_wait_for_another_process_is_said(server, archive):
    path, waits, held, said = archive(f"{server.url}/whole/x.mat"), [], Event(), Event()
    path.parent.mkdir()

    class Waiting(Observer):
        def wait(self, text):
            waits.append(text)
            said.set()

    def hold():
        with FileLock(path.with_name(".x.mat.lock")):
            held.set()
            said.wait(60)

    threading.Thread(target=hold).start()
    held.wait()
    provide(["svhn-test"], str(path.parent), Waiting())
    assert waits == ["waiting for another process, which downloads x.mat"]


def test_a_file_system_without_locks_is_enough(server, archive, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    path = archive(f"{server.url}/whole/x.mat")
    provide(["svhn-test"], str(path.parent), SILENT)
    assert path.read_bytes() == CONTENT


def test_cifar_is_downloaded_and_unpacked(server, tmp_path, monkeypatch):
    make_cifar(tmp_path / "mirror", "cifar10", monkeypatch)
    before = load_data("cifar10", str(tmp_path / "mirror"))
    (name,) = [p.name for p in (tmp_path / "mirror").iterdir() if p.suffix == ".gz"]
    server.files[name] = (tmp_path / "mirror" / name).read_bytes()
    monkeypatch.setenv("ABSLD_DATA_MIRROR", f"{server.url}/file")
    data = load_data("cifar10", str(tmp_path / "data"))
    assert data.train.digest() == before.train.digest()
    batch = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])  # damaged: unpacked again
    assert load_data("cifar10", str(tmp_path / "data")).train.digest() == data.train.digest()
    assert len(server.asked) == 1


def test_only_the_files_of_the_table_are_unpacked_from_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name in ("top/a", "top/b", "top/below/a", "../a", "/a", "a"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("top/c")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    archives.unpack_tar(tmp_path / "x.tar.gz", "top", ["a", "c"])
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["top/a", "x.tar.gz"]


def make_zip(path, *members):
    with zipfile.ZipFile(path, "w") as file:
        for member in members:
            file.writestr(member, b"content")
    return path


def link_member(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize(
    "member", ["../x", "top/../../x", "/top/x", "other/x", "top\\..\\..\\x", link_member("top/x")]
)
def test_a_zip_with_names_elsewhere_or_links_is_refused(member, tmp_path):
    path = make_zip(tmp_path / "x.zip", "top/first", member)
    with pytest.raises(DataError, match="a link or is not in top/"):
        unpack_zip(path, "top", SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_a_zip_that_is_too_large_unpacked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_UNPACKED", 10)
    with pytest.raises(DataError, match="takes more than"):
        unpack_zip(make_zip(tmp_path / "x.zip", "top/a", "top/b"), "top", SILENT)


def test_an_interrupted_unpacking_begins_again(tmp_path):
    path, seen = make_zip(tmp_path / "x.zip", "top/a", "top/below/b"), Notes()
    (tmp_path / ".top.partial").mkdir()
    (tmp_path / ".top.partial" / "remains").touch()
    unpack_zip(path, "top", seen)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["top/a", "top/below/b", "x.zip"]
    assert seen.loads[-1] == ("unpacking x.zip", 2, 2, "files")
    unpack_zip(path, "top", seen)  # by another process, which waited
    assert len(seen.loads) == 2


def test_nothing_is_unpacked_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".top.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link"):
        unpack_zip(make_zip(tmp_path / "x.zip", "top/a"), "top", SILENT)
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_a_command_says_what_it_downloads_and_keeps_stdout_clean(
    server, archive, tmp_path, monkeypatch, capfd
):
    archive(f"{server.url}/missing/x.mat")
    flags = ["--dataset", "svhn", "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    monkeypatch.setitem(ARCHIVES, "svhn-train", ARCHIVES["svhn-test"])
    assert main("train", "--json", *flags) == 3
    out, err = capfd.readouterr()
    assert out == "" and f"downloading {server.url}/missing/x.mat" in err
    assert "\nerror: cannot download x.mat (262,144 bytes" in err and "\nput it into" in err


def test_hashes_and_urls_of_the_archives():
    for archive in ARCHIVES.values():
        assert (len(archive.md5), len(archive.sha256)) == (32, 64)
        int(archive.md5 + archive.sha256, 16)
        assert archive.name in archive.urls[0]
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    assert ARCHIVES["cifar10"].md5 == CIFAR10.tgz_md5
    assert ARCHIVES["cifar100"].md5 == CIFAR100.tgz_md5
    assert [ARCHIVES[f"svhn-{part}"].md5 for part in ("train", "test")] == [
        SVHN.split_list[part][2] for part in ("train", "test")
    ]
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for archive in ARCHIVES.values():
        row = f"| `{archive.name}` | {archive.size:,} | `{archive.md5}`, `{archive.sha256}` |"
        assert row in page
