"""A hub of models on loopback, which speaks to huggingface_hub as Hugging Face's does."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants as hub_constants


class Repository:
    """Commits, each with its files as bytes by name; the branch main, and other branches and tags.

    gated, private: what the server says of it to those without `token`.
    """

    def __init__(self, files=None, *, gated=False, private=False, token="hf_allowed"):
        self.commits, self.branches = {}, {}
        self.gated, self.private, self.token = gated, private, token
        self.commit(files or {})

    def commit(self, files, branch="main"):
        """Add a commit with exactly these files at the top of a branch, and return its number."""
        number = str((branch, len(self.commits), sorted(files)))
        number = hashlib.sha1(number.encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        return number

    def resolve(self, revision):
        """Return the commit of a branch, a tag or a commit; None if there is none."""
        number = self.branches.get(revision, revision)
        return number if number in self.commits else None


class Hub:
    """The repositories of a server, its address, and the requests it got, as (method, path)."""

    def __init__(self):
        self.repositories, self.requests, self.url = {}, [], ""


class Refused(Exception):
    """An answer other than success: status, and the code in words that the client reads."""

    def __init__(self, status, code, message=""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """The endpoints by which models are read."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        hub, url = self.server.hub, urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        try:
            for pattern, respond in self.ROUTES:
                if match := re.fullmatch(pattern, url.path):
                    respond(self, *map(unquote, match.groups(default="")), parse_qs(url.query))
                    return
            raise Refused(404, "EntryNotFound")
        except Refused as error:
            self.reply(b"", error.status, error.headers)

    def reply(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value):
        self.reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def repository(self, name):
        """Return a repository that the client may read."""
        repository = self.server.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {getattr(repository, 'token', '')}"
        if repository is None or (repository.private and not known):
            raise Refused(401, "RepoNotFound", "Repository not found")
        return repository, known

    def model_info(self, name, revision, query):
        repository, _ = self.repository(name)
        number = repository.resolve(revision or "main")
        if number is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for path, content in repository.commits[number].items():
            entry = {"rfilename": path}
            if "blobs" in query:
                entry |= {"size": len(content), "blobId": git_id(content)}
            siblings.append(entry)
        self.reply_json(
            {"_id": "0", "id": name, "modelId": name, "sha": number, "siblings": siblings}
            | {"private": repository.private, "gated": repository.gated, "tags": []}
        )

    def file(self, name, revision, path, query):
        repository, known = self.repository(name)
        if repository.gated and not known:
            raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        number = repository.resolve(revision)
        if number is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": number}
        if path not in repository.commits[number]:
            error = Refused(404, "EntryNotFound", "Entry not found")
            error.headers |= headers
            raise error
        content = repository.commits[number][path]
        headers |= {"ETag": f'"{etag(path, content)}"', "X-Linked-Size": str(len(content))}
        self.reply(content, headers=headers)

    REPOSITORY = r"([^/]+/[^/]+)"
    ROUTES = (
        (f"/api/models/{REPOSITORY}(?:/revision/([^/]+))?", model_info),
        (f"/{REPOSITORY}/resolve/([^/]+)/(.+)", file),
    )


def git_id(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def etag(path, content):
    """The hub names large files, which it keeps apart, by their SHA-256, and others as git does."""
    if path.endswith((".json", ".md")):
        return git_id(content)
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server(handler=Handler):
    """Serve repositories until the end of the block; yields the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.hub, server.daemon_threads = Hub(), True
    server.hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch, url, cache, *, offline=False):
    """Let huggingface_hub, which is imported already, ask this address and keep files in `cache`."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    changes |= {"HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token")}
    for name, value in (changes | {"HF_HUB_OFFLINE": offline}).items():
        monkeypatch.setattr(hub_constants, name, value)
    huggingface_hub.close_session()  # which has been told whether it is offline


def hub_environment(url, home):
    """Return the variables of the environment that do the same in a new process."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home)}
