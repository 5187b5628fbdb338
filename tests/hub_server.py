"""A Hub on this machine: what its client asks for of repositories of models, kept in memory, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_up_for_tests"
BROKEN = "broken"  # the connection ends without an answer, and nothing was done
LOST = "lost"  # it was done, but the connection ends before the answer
CUT = "cut"  # the connection ends in the middle of what is sent
STALL = "stall"  # no answer for as long as the server lives
Fault = int | str  # a status, or one of these
# A request is known by the first of these that its method and path match.
REQUESTS = {
    "whoami": r"GET /api/whoami-v2",
    "create_repo": r"POST /api/repos/create",
    "create_branch": r"POST /api/models/[^/]+/[^/]+/branch/.+",
    "preupload": r"POST /api/models/[^/]+/[^/]+/preupload/.+",
    "commit": r"POST /api/models/[^/]+/[^/]+/commit/.+",
    "commits": r"GET /api/models/[^/]+/[^/]+/commits/.+",
    "tree": r"GET /api/models/[^/]+/[^/]+/tree/.+",
    "info": r"GET /api/models/.+",
    "validate": r"POST /api/validate-yaml",
    "batch": r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/.+",
    "verify": r"POST /lfs-verify",
    "resolve": r"(GET|HEAD) /[^/]+/[^/]+/resolve/.+",
}


@dataclass(frozen=True)
class Commit:
    """The files of a repository after a commit."""

    oid: str
    title: str
    files: dict[str, bytes]
    large: frozenset[str]  # those that git has a pointer to


@dataclass
class Answer:
    """What a request gets."""

    status: int
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of content


class Hub:
    """The repositories, what was asked, and how it is to fail."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, list[Commit]]] = {}  # commits by branch, the oldest first
        self.created: list[dict[str, Any]] = []  # what was asked of each new repository
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.put_bytes = 0
        self.role = "write"
        self.retry_after: int | None = None  # seconds, beside a status that is made up
        self.large = 10_000  # bytes; larger files are kept by LFS
        self.seconds = 0.0  # that an upload of a large file takes
        self.faults: dict[str, Iterator[Fault | None]] = {}  # by the name of a request
        self._closed = threading.Event()

    def branch(self, name: str = "main", repository: str = "someone/a-model") -> Commit:
        """The newest commit of a branch."""
        return self.repositories[repository][name][-1]

    def fault(self, name: str) -> Fault | None:
        """How the next request of that name is to fail."""
        return next(self.faults.get(name, iter(())), None)

    # ------------------------------------------------------------------------------------------------ answers by name

    def whoami(self, path: str, body: bytes) -> Answer:
        return Answer(200, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": self.role}}})

    def create_repo(self, path: str, body: bytes) -> Answer:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.created.append(asked)
        self.repositories[name] = {"main": [Commit(_oid(name), "initial commit", {".gitattributes": b""}, frozenset())]}
        return Answer(200, {"url": f"{self.url}/{name}", "name": name})

    def create_branch(self, path: str, body: bytes) -> Answer:
        _, _, _, owner, name, _, branch = path.split("/", 6)
        branches = self.repositories[f"{owner}/{name}"]
        if unquote(branch) in branches:
            return Answer(409, {"error": "Reference already exists"})
        start = json.loads(body or b"{}").get("startingPoint", "main")
        branches[unquote(branch)] = self._history(f"{owner}/{name}", start)
        return Answer(200, {})

    def preupload(self, path: str, body: bytes) -> Answer:
        repository, revision = _names(path, "preupload")
        there = self._history(repository, revision)[-1]
        files = []
        for asked in json.loads(body)["files"]:
            name = asked["path"]
            mode = "lfs" if asked["size"] > self.large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": there_oid(there, name)})
        return Answer(200, {"files": files})

    def batch(self, path: str, body: bytes) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            one: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.objects:
                one["actions"] = {
                    "upload": {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}},
                    "verify": {"href": f"{self.url}/lfs-verify", "header": {}},
                }
            objects.append(one)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, path: str, body: bytes) -> Answer:
        self._closed.wait(self.seconds)
        self.put_bytes += len(body)
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return Answer(400, {"error": "content does not match its hash"})
        self.objects[oid] = body
        return Answer(200, {})

    def verify(self, path: str, body: bytes) -> Answer:
        return Answer(200 if json.loads(body)["oid"] in self.objects else 404, {})

    def commit(self, path: str, body: bytes) -> Answer:
        repository, revision = _names(path, "commit")
        commits = self.repositories[repository][revision]
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, commits[-1].oid):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files, large = dict(commits[-1].files), set(commits[-1].large)
        for line in lines[1:]:
            name = line["value"]["path"]
            large.discard(name)
            if line["key"] == "deletedFile":
                del files[name]
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.objects:
                    return Answer(400, {"error": f"{name} was not uploaded"})
                files[name] = self.objects[line["value"]["oid"]]
                large.add(name)
            else:
                files[name] = base64.b64decode(line["value"]["content"])
        oid = _oid(f"{repository}/{revision}/{len(commits)}/{body!r}")
        commits.append(Commit(oid, header["summary"], files, frozenset(large)))
        return Answer(200, {"commitUrl": f"{self.url}/{repository}/commit/{oid}", "commitOid": oid, "success": True})

    def commits(self, path: str, body: bytes) -> Answer:
        repository, revision = _names(path, "commits")
        found = [
            {"id": one.oid, "title": one.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for one in reversed(self._history(repository, revision))
        ]
        return Answer(200, found)

    def tree(self, path: str, body: bytes) -> Answer:
        repository, revision = _names(path, "tree")
        commit = self._history(repository, revision)[-1]
        found = []
        for name, content in commit.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": there_oid(commit, name)}
            if name in commit.large:
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
            found.append(entry)
        return Answer(200, found)

    def info(self, path: str, body: bytes) -> Answer:
        repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        commit = self._history(repository, unquote(revision) or "main")[-1]
        siblings = []
        for name, content in commit.files.items():
            file: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": there_oid(commit, name)}
            if name in commit.large:
                file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(file)
        return Answer(200, {"id": repository, "sha": commit.oid, "siblings": siblings, "private": True})

    def validate(self, path: str, body: bytes) -> Answer:
        return Answer(200, {"errors": [], "warnings": []})

    def resolve(self, path: str, body: bytes) -> Answer:
        repository, rest = path[1:].split("/resolve/")
        revision, name = (unquote(part) for part in rest.split("/", 1))
        commit = self._history(repository, revision)[-1]
        if name not in commit.files:
            return Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = commit.files[name]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return Answer(200, headers=headers, body=content)

    def _history(self, repository: str, revision: str) -> list[Commit]:
        """The commits up to a branch or a commit. Raises KeyError."""
        branches = self.repositories[repository]
        if revision in branches:
            return list(branches[revision])
        for commits in branches.values():
            for number, commit in enumerate(commits, start=1):
                if commit.oid == revision:
                    return commits[:number]
        raise KeyError(revision)

    def close(self) -> None:
        self._closed.set()

    def wait_closed(self) -> None:
        self._closed.wait()


def there_oid(commit: Commit, name: str) -> str | None:
    """Git's hash of a file, or of the pointer to it."""
    if name not in commit.files:
        return None
    content = commit.files[name]
    if name in commit.large:
        sha = hashlib.sha256(content).hexdigest()
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _names(path: str, word: str) -> tuple[str, str]:
    repository, _, revision = path.removeprefix("/api/models/").partition(f"/{word}/")
    return repository, unquote(revision)


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def serve(hub: Hub) -> Callable[[], None]:
    """Start answering; returns what ends it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            line = f"{self.command} {path}"
            name = next((name for name, pattern in REQUESTS.items() if re.fullmatch(pattern, line)), None)
            if name is None:
                self._send(Answer(404, {"error": f"unknown here: {line}"}))
                return
            with lock:
                hub.requests[name] += 1
                if name != "put":  # a place with a key in its address, on the real Hub another server's
                    hub.tokens.add(self.headers.get("Authorization"))
                fault = hub.fault(name)
            body = self._body(half=fault == CUT)
            if fault == STALL:
                hub.wait_closed()
            if fault in (BROKEN, CUT, STALL):
                self._hang_up()
                return
            if isinstance(fault, int):
                asked = {} if hub.retry_after is None else {"Retry-After": str(hub.retry_after)}
                self._send(Answer(fault, {"error": f"this is a made up {fault}"}, asked))
                return
            try:
                if name == "put":
                    answer = getattr(hub, name)(path, body)
                else:
                    with lock:
                        answer = getattr(hub, name)(path, body)
            except KeyError as error:
                answer = Answer(404, {"error": f"not found: {error}"}, {"X-Error-Code": "RevisionNotFound"})
            if fault == LOST:
                self._hang_up()
                return
            self._send(answer)

        do_HEAD = do_POST = do_PUT = do_GET

        def _body(self, half: bool) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                length = int(self.headers.get("Content-Length", 0))
                return self.rfile.read(length // 2 if half else length)
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    return body
            self.rfile.readline()
            return body

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _send(self, answer: Answer) -> None:
            body = json.dumps(answer.content).encode() if answer.body is None else answer.body
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # or closing takes half a second
    hub.url = f"http://127.0.0.1:{server.server_port}"

    def stop() -> None:
        hub.close()
        server.shutdown()
        server.server_close()

    return stop
