"""A hub on 127.0.0.1 that knows as much of Hugging Face's interface as a pool needs: to look at a repository,
to fetch its files by revision, to make one and to commit to it. What it holds is in memory."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

Files = dict[str, bytes]


class StubHub:
    """Repositories by name, each with its files by revision: by branch, and by the hash of a commit.

    `asked` lists requests, `tokens` has what those about repositories brought; `failing` is a status that
    every request gets instead, or None.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.failing: int | None = None
        self.url = ""

    def sha(self, name: str, revision: str) -> str:
        files = self.repositories[name][revision]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route({r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self.info, **self.files})

    def do_HEAD(self):
        self.route(self.files)

    def do_POST(self):
        self.route(
            {
                r"/api/repos/create": self.create,
                r"/api/validate-yaml": lambda: self.send(200, {"errors": [], "warnings": []}),
                r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self.preupload,
                r"/api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
            }
        )

    @property
    def files(self) -> dict:
        return {r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve}

    def route(self, routes: dict) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.path.startswith(("/api/models/", "/api/repos/")):
            self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.failing is not None:
            return self.send(self.hub.failing, {"error": "out of order"})
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, unquote(self.path).partition("?")[0]):
                return answer(*found.groups())
        return self.send(404, {"error": f"no such address: {self.path}"})

    def send(self, code: int, content, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        self.send(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def info(self, name: str, revision: str | None) -> None:
        if name not in self.hub.repositories:
            return self.missing("Repo")
        branch = revision or "main"
        if branch not in self.hub.repositories[name]:
            return self.missing("Revision")
        siblings = [{"rfilename": file} for file in self.hub.repositories[name][branch]]
        return self.send(200, {"id": name, "sha": self.hub.sha(name, branch), "siblings": siblings})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if revision not in self.hub.repositories.get(name, {}):
            return self.missing("Revision" if name in self.hub.repositories else "Repo")
        data = self.hub.repositories[name][revision].get(file)
        commit = {"X_Repo_Commit": self.hub.sha(name, revision)}
        if data is None:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)
        return self.send(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **commit)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {"main": {}})
        self.send(409 if known else 200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def preupload(self, _name: str, _revision: str) -> None:
        asked = json.loads(self.body)["files"]
        plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        self.send(200, {"files": [plain | {"path": each["path"]} for each in asked]})

    def commit(self, name: str, revision: str) -> None:
        changes = [json.loads(line) for line in self.body.splitlines()]
        found = [change["value"] for change in changes if change["key"] == "file"]
        new = {value["path"]: base64.b64decode(value["content"]) for value in found}
        repository = self.hub.repositories[name]
        repository[revision] = repository.get(revision, {}) | new
        sha = self.hub.sha(name, revision)
        repository[sha] = repository[revision]  # which stays when the branch moves on
        self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


@pytest.fixture
def stub_hub(monkeypatch, tmp_path) -> Iterator[StubHub]:
    """The stub, as the hub that this process asks, with an empty cache and nobody logged in."""
    from huggingface_hub import constants

    hub = StubHub()
    handler = type("Handler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    yield hub
    server.shutdown()
    server.server_close()
