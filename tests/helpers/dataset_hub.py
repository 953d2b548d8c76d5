"""A hub of data sets on loopback, as `datasets` reads it: information, lists of files, and files."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers for one commit of each repository in `server.repositories`: files by name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([^/]+)/(.+?)/?)?", path):
            repository, what, rest = match.groups()
            if files := self.server.repositories.get(repository):
                return self.inform(repository, files, what, rest or "", body)
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = match.groups()
            files = self.server.repositories.get(repository)
            if files is None:
                return self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", COMMIT, "v1"):
                return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            if name in files:
                return self.send(files[name])
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def inform(self, repository, files, what, rest, body):
        if what in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.send_json(about | {"disabled": False, "tags": [], "gated": False})
        _, _, folder = rest.partition("/")
        if what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths")
            return self.send_json([e for e in self.entries(files) if e["path"] in asked])
        deep = "true" in parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower()
        start = f"{folder}/" if folder else ""
        below = [e for e in self.entries(files) if e["path"].startswith(start)]
        return self.send_json([e for e in below if deep or "/" not in e["path"][len(start) :]])

    def entries(self, files):
        parents = (str(parent) for name in files for parent in PurePosixPath(name).parents)
        for folder in sorted({*parents} - {"."}):
            yield {"type": "directory", "path": folder, "oid": "0", "size": 0}
        for name, content in files.items():
            oid = hashlib.sha1(content).hexdigest()
            yield {"type": "file", "path": name, "oid": oid, "size": len(content)}

    def send_json(self, value):
        self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(self, content):
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.reply(content, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def reply(self, body, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def dataset_hub():
    """Serve data sets; yields the server, with `repositories`, `requests` and `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repositories, server.requests = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_dataset_hub(monkeypatch, url, cache, *, offline=False):
    """Let `datasets` read from a hub, or from its cache alone, in this process."""
    import datasets
    import fsspec
    import huggingface_hub

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache / "hub")),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    for name, value in (
        ("HF_ENDPOINT", url),
        ("HF_DATASETS_CACHE", str(cache / "datasets")),
        ("HF_HUB_OFFLINE", offline),
    ):
        monkeypatch.setattr(datasets.config, name, value)
    datasets.disable_progress_bars()
    huggingface_hub.close_session()  # which has been told whether it is offline
    fsspec.get_filesystem_class("hf").clear_instance_cache()
