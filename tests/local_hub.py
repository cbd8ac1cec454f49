"""A hub of our own in a thread: the few routes that huggingface_hub's client uses to fetch and to push a model.

Repositories are dictionaries of files by commit. It can answer as the real one does to a wrong name, revision or token,
and damage a file on its way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_good"
READ_ONLY = "hf_reader"
LARGE = (".safetensors", ".pth")
"""What is stored by sha256 (LFS); other files are git's."""


@dataclass
class Repository:
    """Files by commit, and the commits that branches and tags stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a state with the previous one's files below it; returns its name."""
        before = self.commits.get(self.refs.get("main", ""), {})
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = {**before, **files}
        self.refs |= dict.fromkeys(refs or ("main",), name)
        return name

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch."""
        return self.commits[self.refs["main"]]

    def at(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    """What the server knows, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    """Paths whose bytes are changed on the way."""
    cut: set[str] = field(default_factory=set)
    """Paths whose last bytes are lost on the way, and the connection with them."""
    asked: list[str] = field(default_factory=list)
    down: bool = False
    url: str = ""

    def put(self, name: str, folder: Path, *refs: str) -> str:
        """A folder as a commit of a repository."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, *refs)


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is set by `serve`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_PUT(self) -> None:
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = self._body()
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        self.hub.asked.append(f"POST {self.path}")
        parts = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        if self.hub.down:
            self._fail(503, "", "over capacity")
        elif parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif self._token() not in (TOKEN, READ_ONLY):
            self._fail(401, "", "Invalid credentials in Authorization header" if self._token() else "Unauthorized")
        elif self._token() == READ_ONLY:
            self._fail(403, "", "Forbidden: you need a token with write access")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif "preupload" in parts:
            self._preupload(json.loads(body))
        elif parts[-1] == "batch":
            self._batch(json.loads(body))
        else:
            self._commit("/".join(parts[2:4]), body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        known = name in self.hub.repositories
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private=private)).refs.setdefault("main", "")
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def _preupload(self, wanted: dict[str, Any]) -> None:
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for one in wanted["files"]
        ]
        self._json({"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}} for one in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.repositories[name].commit(files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _get(self, *, body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.strip("/").split("/")]
        of_the_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if of_the_api else parts[:2])
        rest = parts[4:] if of_the_api else parts[2:]
        repository = self.hub.repositories.get(name)
        if self.hub.down:
            self._fail(503, "", "over capacity")
        elif self._token() not in ("", TOKEN, READ_ONLY):
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not self._token()):
            self._fail(401 if not self._token() else 404, "RepoNotFound", "Repository not found")
        elif repository.gated and not self._token():
            self._fail(401, "GatedRepo", "Access to this repository is restricted")
        elif (commit := repository.at("/".join(rest[1:2]) if len(rest) > 1 else "main")) is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif of_the_api:
            self._describe(name, commit, repository.commits[commit], tree=rest[:1] == ["tree"])
        elif (data := repository.commits[commit].get("/".join(rest[2:]))) is None:
            self._fail(404, "EntryNotFound", "Entry not found", commit)
        else:
            self._file("/".join(rest[2:]), data, commit, body=body)

    def _describe(self, name: str, commit: str, files: dict[str, bytes], *, tree: bool) -> None:
        if not tree:
            self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
            return
        entries = []
        for path, data in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if path.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _file(self, path: str, data: bytes, commit: str, *, body: bool) -> None:
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_sha1(data)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(data)))
        if path.endswith(LARGE):
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.end_headers()
        if not body:
            return
        if path in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if path in self.hub.cut:
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _json(self, values: object, status: int = 200) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, code: str, message: str, commit: str = "") -> None:
        self.send_response(status)
        for key, value in (("X-Error-Code", code), ("X-Error-Message", message), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(key, value)
        data = b"" if self.command == "HEAD" else json.dumps({"error": message}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            data = b""
            while size := int(self.rfile.readline().strip(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def used(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A running hub that huggingface_hub's client in this process takes for the real one, with a cache in `folder`."""
    from huggingface_hub import constants

    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
