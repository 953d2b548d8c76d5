"""The hub on loopback, for those who write to it."""

import base64
import hashlib
import json
from contextlib import contextmanager

from helpers.hub_server import Handler, Refused, Repository, hub_server

TOKEN, OWNER = "hf_of_me", "me"


class UploadHandler(Handler):
    """The endpoints by which a repository is made and filled: large files apart, then a commit."""

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while length := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    do_PUT = do_POST

    def allow(self, owner=OWNER):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "", "Invalid username or password.")
        if owner != OWNER:
            raise Refused(403, "", "You don't have the rights to create a model here")

    def create(self, query):
        asked = json.loads(self.body)
        self.allow(asked["organization"])
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.server.hub.repositories
        if not exists:
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.hub.repositories[name] = Repository(private=private, token=TOKEN)
        body = {"url": f"{self.server.hub.url}/{name}", "name": name}
        self.reply(json.dumps(body).encode(), 409 if exists else 200)

    def validate(self, query):
        refused = "license: refused-1.0" in json.loads(self.body)["content"]
        body = {
            "errors": [{"message": '"license" must be one of a list'}] * refused,
            "warnings": [],
        }
        headers = {"Content-Type": "application/json"}
        self.reply(json.dumps(body).encode(), 400 if refused else 200, headers)

    def modes(self, name, revision, query):
        self.allow(name.split("/")[0])
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply_json({"files": files})

    def batch(self, name, query):
        self.allow(name.split("/")[0])
        hub = self.server.hub
        objects = [
            {**each, "actions": {"upload": {"href": f"{hub.url}/storage/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.reply_json({"transfer": "basic", "objects": objects})

    def store(self, oid, query):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.stored[oid] = self.body
        self.reply(b"")

    def commit(self, name, revision, query):
        self.allow(name.split("/")[0])
        _, *lines = map(json.loads, self.body.splitlines())
        repository = self.server.hub.repositories[name]
        files = dict(repository.commits[repository.resolve(revision)])
        for line in lines:
            value = line["value"]
            small = line["key"] == "file"
            content = base64.b64decode(value["content"]) if small else None
            files[value["path"]] = content if small else self.server.stored[value["oid"]]
        number = repository.commit(files, revision)
        url = f"{self.server.hub.url}/{name}/commit/{number}"
        self.reply_json({"success": True, "commitOid": number, "commitUrl": url})

    ROUTES = (
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate),
        (f"/api/models/{Handler.REPOSITORY}/preupload/([^/]+)", modes),
        (f"/{Handler.REPOSITORY}[.]git/info/lfs/objects/batch", batch),
        ("/storage/(.+)", store),
        (f"/api/models/{Handler.REPOSITORY}/commit/([^/]+)", commit),
        *Handler.ROUTES,
    )


@contextmanager
def writable_hub():
    """Serve repositories that the holder of TOKEN may make and fill; yields the Hub."""

    class WithStorage(UploadHandler):
        def setup(self):
            if not hasattr(self.server, "stored"):
                self.server.stored = {}
            super().setup()

    with hub_server(WithStorage) as hub:
        yield hub
