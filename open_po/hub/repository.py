"""One branch of a repository on the Hub: made and tried before training, looked into, and given files in one commit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoSibling

from open_po.config import OutputConfig
from open_po.errors import UserError
from open_po.hub import retrying
from open_po.hub.retrying import Say, persistently

_MAIN = "main"
_READ_BYTES = 2**20
Sent = Callable[[int], object]  # is told how many bytes are there


@dataclass(frozen=True)
class Branch:
    """A branch of a model's repository."""

    repository: str  # USER/NAME
    revision: str

    def __str__(self) -> str:
        return self.repository if self.revision == _MAIN else f"{self.repository}, branch {self.revision}"

    @property
    def address(self) -> str:
        """Where it can be looked at."""
        return f"{HfApi().endpoint}/{self.repository}/tree/{self.revision}"

    @staticmethod
    def of(output: OutputConfig, *, patience: float, say: Say) -> Branch:
        """The branch that a run uploads to, made if need be. Raises UserError.

        That the token may make it does not show that it may commit to it: only a commit does.
        """
        api = HfApi()
        user: dict[str, Any] = persistently(
            "push_to_hub: logging in to the Hub", api.whoami, patience=patience, say=say
        )
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(
                f"push_to_hub: the token of {user.get('name')} may only read; make one that may write "
                "(hf auth login, or HF_TOKEN)"
            )
        name = output.hf_repo_id or repository_name(output.exp_name)
        if "/" not in name:
            name = f"{output.hf_entity or user['name']}/{name}"
        branch = Branch(name, output.hf_repo_revision or branch_name(output.exp_name))
        private = True if output.hf_private is None else output.hf_private

        def make() -> None:
            api.create_repo(name, private=private, exist_ok=True)
            if branch.revision != _MAIN:
                api.create_branch(name, branch=branch.revision, exist_ok=True)

        persistently(f"push_to_hub: making {branch}", make, patience=patience, say=say)
        return branch

    def publish(
        self, files: Mapping[str, Path], message: str, *, stale: Callable[[str], bool], sent: Sent = lambda count: None
    ) -> str:
        """Make the branch hold `files`, by their names in it, in one commit; returns the branch's newest commit.

        What it holds already is not sent, and if that is all of it, no commit is made: this may be done again after a
        failure of any kind. Other files whose name is `stale` are removed. Raises whatever the client does.
        """
        api = HfApi()
        branch = api.model_info(
            self.repository, revision=self.revision, files_metadata=True, timeout=retrying.SILENCE_SECONDS
        )
        there = {file.rfilename: file for file in branch.siblings or ()}
        additions, arrived = [], 0
        for name, path in sorted(files.items()):
            if name in there and _same(path, there[name]):
                arrived += path.stat().st_size
            else:
                additions.append(CommitOperationAdd(name, path))
        sent(arrived)
        deletions = [CommitOperationDelete(name) for name in there if name not in files and stale(name)]
        if not additions and not deletions:
            return str(branch.sha)
        for addition in additions:  # one by one: the client tells nothing of how far it is
            api.preupload_lfs_files(self.repository, [addition], revision=self.revision, free_memory=False)
            arrived += addition.upload_info.size
            sent(arrived)
        # As long as it has to follow that one, a commit whose answer is lost cannot be made twice.
        return api.create_commit(
            self.repository,
            [*deletions, *additions],
            commit_message=message,
            revision=self.revision,
            parent_commit=branch.sha,
        ).oid

    def starting_at(self, revision: str, commit: str) -> Branch:
        """Another branch, which holds what this one held at `commit` unless it is there already."""
        HfApi().create_branch(self.repository, branch=revision, revision=commit, exist_ok=True)
        return Branch(self.repository, revision)


def repository_name(run: str) -> str:
    """A run's name, as far as a repository may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")[:96] or "open_po"


def branch_name(run: str) -> str:
    """A run's name, as far as a branch may have it."""
    return repository_name(re.sub(r"\.{2,}|\.lock$", "-", run))


def _same(path: Path, there: RepoSibling) -> bool:
    """Whether a file's content is that of one on the Hub, which has SHA-256 of large files and git's hash of others."""
    size = path.stat().st_size
    if size != there.size:
        return False
    if there.lfs is not None:
        return _hash("sha256", _chunks(path)) == str(there.lfs["sha256"])
    return _hash("sha1", iter([f"blob {size}\0".encode(), path.read_bytes()])) == there.blob_id


def _hash(kind: str, chunks: Iterator[bytes]) -> str:
    digest = hashlib.new(kind)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk
