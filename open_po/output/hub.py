"""Upload to the Hugging Face Hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from open_po.config import OutputConfig
from open_po.errors import UserError
from open_po.output.observers import RunObserver
from open_po.output.run_folder import RunFolder
from open_po.output.summary import RunSummary

_WAITS = (1.0, 5.0, 25.0)  # seconds before each retry


class HubUploader(RunObserver):
    """Uploads the model of a run that is complete."""

    def __init__(self, folder: RunFolder, output: OutputConfig, say: Callable[[str], object]) -> None:
        """Makes the repository, if need be, so that a bad token is found before training. Raises UserError."""
        self._folder, self._revision, self._say = folder, output.hf_repo_revision, say
        self.repository = create_repository(output)

    def completed(self, summary: RunSummary) -> None:
        upload(self._folder.path, self.repository, self._revision)
        self._folder.record_upload(self.repository)
        self._say(f"Uploaded to the Hub: {self.repository}")


def create_repository(output: OutputConfig) -> str:
    """The full name of the run's repository, made if need be. Raises UserError."""
    private = True if output.hf_private is None else output.hf_private
    name = output.hf_repo_id or output.exp_name
    try:
        url = HfApi().create_repo(name, private=private, exist_ok=True)
        if output.hf_repo_revision is not None:
            HfApi().create_branch(url.repo_id, branch=output.hf_repo_revision, exist_ok=True)
    except Exception as error:  # the client's own errors, or those of the HTTP library it is built on
        raise UserError(f"push_to_hub: repository {name} cannot be made or reached ({_reason(error)})") from error
    return url.repo_id


def upload(folder: Path, repository: str, revision: str | None) -> None:
    """Upload the model of `folder`, trying again after server and connection errors. Raises UserError."""
    for wait in (*_WAITS, None):
        try:
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message="Model trained with open_po",
                ignore_patterns=["checkpoints/*", "wandb/*", ".*"],
            )
            return
        except Exception as error:  # see create_repository
            if wait is None or not _may_pass(error):
                raise UserError(
                    f"push_to_hub: the upload to {repository} failed ({_reason(error)}); the model is in {folder}"
                ) from error
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: the server was busy or broken, or did not answer at all."""
    if not isinstance(error, HfHubHTTPError):
        return True
    status = error.response.status_code
    return status >= 500 or status in (408, 429)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
