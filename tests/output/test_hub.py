"""Uploads, to a server on this machine that speaks as much of the Hub's API as they take."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from tests import cli

FIELDS = {"push_to_hub": True, "hf_repo_id": "someone/a-model", "max_train_steps": 2, "checkpointing_steps": 1}
BROKEN_LINE = 0  # instead of a status: the connection ends without an answer


class Hub:
    """What the server was asked and given, and how it is to fail."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, Any]] = []  # path, and the body's first JSON line
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.revisions: set[str] = set()
        self.failures: dict[str, Iterator[int]] = defaultdict(lambda: iter(()))  # statuses by part of the path

    def count(self, part: str) -> int:
        """How many requests had `part` in their path."""
        return sum(part in path for path, _ in self.requests)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to one request."""
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((path, lines[0] if lines else None))
        for part, statuses in self.failures.items():
            if part in path and (status := next(statuses, None)) is not None:
                return status, {"error": f"this is a made up {status}"}
        if "/preupload/" in path:
            names = [file["path"] for file in lines[0]["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if "/commit/" in path:
            self.revisions.add(path.split("/commit/")[1].split("?")[0])
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in added}
            return 200, {
                "commitUrl": f"{self.url}/someone/a-model/commit/{1:040}",
                "commitOid": "1" * 40,
                "success": True,
            }
        if "/repos/create" in path:
            return 200, {"url": f"{self.url}/{lines[0]['organization'] or 'me'}/{lines[0]['name']}"}
        if "/branch/" in path:
            return 200, {}
        return 200, {"id": "someone/a-model", "sha": "1" * 40, "siblings": [], "private": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine, which this process believes to be the only one."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/agent-harnesses":  # huggingface_hub's own, once a day and without a token
                status, content = 404, {}
            else:
                state.tokens.add(self.headers.get("Authorization"))
                status, content = state.answer(self.path, body)
            if status == BROKEN_LINE:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    close_session()
    yield state
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def uploaded(folder: Path) -> set[str]:
    """The files of a run's folder that belong on the Hub."""
    return {name for name in cli.files(folder) if not name.startswith(("checkpoints/", "wandb/", "."))}


def assert_whole(hub: Hub, folder: Path) -> None:
    assert set(hub.files) == uploaded(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    for name, content in hub.files.items():
        if name != "run_summary.json":  # which notes the upload afterwards
            assert content == (folder / name).read_bytes(), name
    assert json.loads(hub.files["run_summary.json"]).items() < cli.summary(folder).items()
    assert cli.summary(folder)["uploaded_to"]


@pytest.mark.parametrize("xet", [False, True], ids=["http", "xet"])
def test_the_model_is_uploaded_and_nothing_else(
    xet: bool,
    hub: Hub,
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet)
    output = cli.train(llama, pairs_file, tmp_path / "run", with_tracking=True, **FIELDS)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Uploaded to the Hub: someone/a-model" in shown.out
    assert len(cli.checkpoints(output)) == 2
    assert list(output.glob("wandb/*"))
    assert_whole(hub, output)
    assert hub.revisions == {"main"}
    assert hub.tokens == {"Bearer hf_made_up"}
    created = hub.requests[0][1]
    assert (created["organization"], created["name"]) == ("someone", "a-model")
    assert created.get("private", created.get("visibility")) in (True, "private")
    assert cli.summary(output)["status"] == "completed"
    assert json.loads(hub.files["run_summary.json"])["status"] == "completed"


def test_the_adapter_is_uploaded_with_the_model(hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", use_lora=True, **FIELDS)
    assert_whole(hub, output)
    assert "adapter/adapter_model.safetensors" in hub.files


def test_a_public_repository_and_a_branch_of_the_users_own(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    fields = FIELDS | {"hf_repo_id": None, "exp_name": "tulu", "hf_private": False, "hf_repo_revision": "seed-1"}
    cli.train(llama, pairs_file, tmp_path / "run", **fields)
    created = hub.requests[0][1]
    assert (created["organization"], created["name"]) == (None, "tulu")
    assert created.get("private", created.get("visibility")) in (False, "public")
    assert hub.count("/api/models/me/tulu/branch/seed-1") == 1
    assert hub.revisions == {"seed-1"}


@pytest.mark.parametrize("part", ["/preupload/", "/commit/"])
@pytest.mark.parametrize("fault", [503, 429, BROKEN_LINE], ids=["503", "429", "broken"])
def test_a_server_that_recovers_gets_the_upload(
    part: str, fault: int, hub: Hub, waits: list[float], llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    hub.failures[part] = iter([fault, fault])
    output = cli.train(llama, pairs_file, tmp_path / "run", **FIELDS)
    assert hub.count(part) >= 3
    assert len(waits) >= 2
    assert_whole(hub, output)
    assert cli.summary(output)["status"] == "completed"


def test_a_bad_token_stops_the_run_before_training(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failures["/api"] = repeat(401)
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS))
    assert "push_to_hub" in line
    assert "someone/a-model" in line
    assert "401" in line
    assert "hf_made_up" not in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "reference").exists()
    assert cli.summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "refused"])
def test_a_hub_that_cannot_be_reached_stops_the_run_before_training(
    offline: bool,
    hub: Hub,
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS))
    assert "push_to_hub" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("status", "patience"), [(500, True), (403, False)])
def test_an_upload_that_fails_keeps_the_model_and_says_where(
    status: int,
    patience: bool,
    hub: Hub,
    waits: list[float],
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    hub.failures["/commit/"] = repeat(status)
    words = cli.arguments(llama, pairs_file, output, **FIELDS)
    assert cli.main(words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "someone/a-model" in errors[0]
    assert str(status) in errors[0]
    assert f"the model is in {output}" in errors[0]
    own = [seconds for seconds in waits if seconds in (5.0, 25.0)]  # the client's own, shorter ones come in between
    assert own == ([5.0, 25.0] if patience else [])
    content = cli.summary(output)
    assert content["status"] == "completed"
    assert "uploaded_to" not in content
    written = (output / "model.safetensors").stat().st_mtime_ns

    hub.failures.clear()  # the same command with `auto` uploads what is there, and trains nothing
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert_whole(hub, output)
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    capsys.readouterr()
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert "is complete; nothing to do" in capsys.readouterr().out
