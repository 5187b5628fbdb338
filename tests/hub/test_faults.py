"""What a Hub may do to an upload: each fault at each request, and the same model arrives, once."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import huggingface_hub.constants
import pytest

from open_po.__main__ import main
from open_po.config import OutputConfig
from open_po.hub import background, retrying
from open_po.hub.background import HubUploader
from open_po.hub.publication import Publication
from open_po.output.console import make_console
from open_po.output.run_folder import RunFolder
from open_po.training.gradients import StepGradients
from tests import cli, tiny
from tests.hub.test_upload import FIELDS, assert_whole
from tests.hub_server import BROKEN, CUT, LOST, REQUESTS, STALL, TOKEN, Fault, Hub

PASSING: list[Fault] = [500, 503, 429, BROKEN, LOST, CUT, STALL]
UPLOADING = [name for name in REQUESTS if name not in ("tree", "commits", "resolve", "validate")]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is complete and was not to be uploaded."""
    folder = tmp_path_factory.mktemp("finished")
    model, data = tiny.make_model_folder(folder / "model"), tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(8))
    return cli.train(model, data, folder / "run", max_train_steps=1, reference_cache_dir=folder / "reference")


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing is given up sooner, by uploads in the background too."""
    monkeypatch.setattr(retrying, "SILENCE_SECONDS", 0.3)
    monkeypatch.setenv("OPEN_PO_HUB_TIMEOUT", "1")


def upload(output: Path, *more: str) -> int:
    return main(["upload", str(output), "--hf_repo_id", "a-model", "--hf_repo_revision", "a-run", *more])


@pytest.mark.parametrize(
    "fault", [pytest.param(each, marks=pytest.mark.slow) if each in (503, LOST) else each for each in PASSING], ids=str
)
def test_an_upload_gets_through_and_sends_nothing_twice(
    fault: Fault, hub: Hub, output: Path, waits: list[float], impatient: None, capsys: Capture
) -> None:
    """Each request of the protocol meets the fault once."""
    for name in UPLOADING:
        hub.faults[name] = iter([fault])
    assert upload(output) == 0
    shown = capsys.readouterr()
    assert "Uploaded to the Hub: someone/a-model, branch a-run" in shown.out
    assert TOKEN not in shown.out + shown.err
    assert all(next(faults, None) is None for faults in hub.faults.values()), "a fault never came"
    assert waits
    assert_whole(hub, output)
    assert len(hub.repositories["someone/a-model"]["a-run"]) == 2
    # An answer that is lost after the last byte has the client itself send that file once more.
    again = (output / "model.safetensors").stat().st_size if fault == LOST else 0
    assert hub.put_bytes == sum(len(content) for content in hub.objects.values()) + again > 10_000


@pytest.mark.parametrize(
    ("request_name", "status"), [*((name, 403) for name in UPLOADING), ("whoami", 401), ("commit", 404)]
)
def test_what_is_refused_is_told_and_the_same_command_completes_it(
    request_name: str, status: int, hub: Hub, output: Path, waits: list[float], capsys: Capture
) -> None:
    hub.faults[request_name] = repeat(status)
    before = {name: (output / name).read_bytes() for name in cli.files(output)}
    assert upload(output) == 1
    shown = capsys.readouterr()
    line = cli.only_error(shown.err)
    assert str(status) in line or "Invalid user token" in line
    assert TOKEN not in shown.out + shown.err
    assert before.items() <= {name: (output / name).read_bytes() for name in cli.files(output)}.items()
    hub.faults.clear()
    assert upload(output) == 0
    assert_whole(hub, output)
    sent = hub.put_bytes
    assert upload(output) == 0
    assert (hub.put_bytes, len(hub.repositories["someone/a-model"]["a-run"])) == (sent, 2)


def test_a_server_that_stays_down_is_given_up(hub: Hub, output: Path, capsys: Capture) -> None:
    hub.faults["info"] = repeat(503)
    assert upload(output, "--patience", "0") == 1
    line = cli.only_error(capsys.readouterr().err)
    assert "upload of final to someone/a-model, branch a-run failed" in line
    assert "503" in line


def test_what_the_server_asks_to_wait_is_waited(hub: Hub, output: Path, waits: list[float]) -> None:
    hub.faults["info"] = iter([429])
    hub.retry_after = 17
    assert upload(output) == 0
    assert 17 in waits


def test_a_folder_that_holds_no_run_is_refused(hub: Hub, tmp_path: Path, capsys: Capture) -> None:
    assert upload(tmp_path) == 1
    assert "holds no run" in cli.only_error(capsys.readouterr().err)


def test_a_run_that_was_not_to_be_uploaded_needs_a_name(hub: Hub, output: Path, capsys: Capture) -> None:
    assert main(["upload", str(output)]) == 1
    assert "--hf_repo_id" in cli.only_error(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ before training


@pytest.mark.parametrize("request_name", ["whoami", "create_repo", "create_branch", "commit"])
def test_what_is_not_allowed_is_found_before_training(
    request_name: str, hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    hub.faults[request_name] = repeat(403)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS)
    line = cli.failure(capsys, words)
    assert "push_to_hub" in line
    assert "403" in line
    assert TOKEN not in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "reference").exists()
    assert cli.summary(tmp_path / "run")["status"] == "failed"
    hub.faults.clear()
    if request_name == "commit":  # the folder is free again
        assert cli.main([*words, "--hub_strategy", "end", "--max_train_steps", "1"]) == 0


def test_a_token_that_may_only_read_is_found_before_training(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    hub.role = "read"
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS))
    assert "may only read" in line
    assert not hub.repositories


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "refused"])
def test_a_hub_that_cannot_be_reached_stops_the_run_before_training(
    offline: bool,
    hub: Hub,
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(background, "AT_START", 0.0)
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS))
    assert "push_to_hub" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_a_run_ends_with_the_same_weights_whatever_the_hub_does(
    fault: Fault, hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, impatient: None
) -> None:
    """The fault meets every request of the protocol in turn, those before training and those of each upload."""
    plain = cli.train(llama, pairs_file, tmp_path / "plain", max_train_steps=4, checkpointing_steps=2)
    for name in UPLOADING:
        hub.faults[name] = _every_other(fault, 2)
    fields = FIELDS | {"max_train_steps": 4, "checkpointing_steps": 2, "hub_strategy": "all_checkpoints"}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    assert cli.equal(cli.weights(output), cli.weights(plain))
    assert_whole(hub, output)
    assert hub.branch("a-run-step_000002").files["model.safetensors"]
    assert len(hub.repositories["someone/a-model"]["a-run"]) == 5
    sizes = [len(content) for content in hub.objects.values()]
    again = 2 * max(sizes) if fault == LOST else 0  # see above
    assert sum(sizes) <= hub.put_bytes <= sum(sizes) + again


def _every_other(fault: Fault, times: int) -> Iterator[Fault | None]:  # type: ignore[type-arg]
    for _ in range(times):
        yield fault
        yield None


def test_an_upload_that_fails_leaves_the_model_and_the_command_that_finishes_it(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS)
    capfd.readouterr()

    def revoked() -> Iterator[int | None]:
        yield None  # the commit before training
        yield from repeat(403)

    hub.faults["commit"] = revoked()  # type: ignore[assignment]
    assert cli.main(words) == 76
    line = cli.only_error(capfd.readouterr().err)
    command = f"python -m open_po upload {tmp_path / 'run'}"
    assert line.endswith(command)
    assert cli.summary(tmp_path / "run")["status"] == "completed"
    hub.faults.clear()
    assert main(command.split()[3:]) == 0
    assert_whole(hub, tmp_path / "run")
    assert "complete; nothing to do" in _said(capfd, [*words, "--resume_from_checkpoint", "auto"])


def _said(capfd: Capture, words: list[str]) -> str:
    capfd.readouterr()
    assert cli.main(words) == 0
    return capfd.readouterr().out


def test_an_upload_does_not_outlive_its_run(hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """It would take what it finds in the folder later for its own checkpoint."""
    hub.seconds = 3.0
    fields = FIELDS | {"hub_strategy": "checkpoint", "max_train_steps": 6, "checkpointing_steps": 3}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)

    def killed_while_uploading() -> None:
        written = HubUploader.checkpoint_written

        def then_killed(self: HubUploader, checkpoint: Path) -> None:
            written(self, checkpoint)
            while hub_is_idle(tmp_path / "run"):
                self.metrics_written({})
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

        HubUploader.checkpoint_written = then_killed  # type: ignore[method-assign]

    assert cli.forked(words, killed_while_uploading) == -signal.SIGKILL
    time.sleep(hub.seconds + 1)
    assert hub.branch("a-run").title == "Training begins"


def hub_is_idle(folder: Path) -> bool:
    """Whether no upload of a run has said how much it has to send."""
    events = folder / ".hub.events"
    return not events.exists() or "total" not in events.read_text()


def test_what_is_gone_from_the_disk_is_not_taken_from_the_hub(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    fields = FIELDS | {"hub_strategy": "checkpoint", "max_train_steps": 4, "checkpointing_steps": 4}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    publication = Publication.read(RunFolder(output))
    assert publication is not None
    before = hub.branch("a-run")
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(FileNotFoundError, match="step_000004 has no model any more"):
        publication.publish("step_000004", print)
    assert hub.branch("a-run") == before


def test_a_run_that_is_asked_to_stop_publishes_its_last_checkpoint(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    fields = FIELDS | {"hub_strategy": "checkpoint", "max_train_steps": 6, "checkpointing_steps": 5}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)

    def stop_in_step_3() -> None:
        backward = StepGradients.backward

        def signalled(self: StepGradients, *positional: object) -> object:
            if self.state.progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return backward(self, *positional)  # type: ignore[arg-type]

        StepGradients.backward = signalled  # type: ignore[method-assign, assignment]

    assert cli.forked(words, stop_in_step_3) == 75
    told = capfd.readouterr().out
    assert "Asked to stop: step_000003 still goes to the Hub; a second signal ends that" in told
    assert "On the Hub: step_000003 in someone/a-model, branch a-run" in told
    assert hub.branch("a-run").title == "The model after step 3"
    assert "last-checkpoint/trainer_state.json" in hub.branch("a-run").files


@pytest.mark.parametrize("damage", ["", "{", '{"branch": 1}', None])
def test_notes_that_cannot_be_read_hide_no_error_of_the_run(
    damage: str | None, hub: Hub, tmp_path: Path, capsys: Capture
) -> None:
    """What ended the run is on its way when this is told; and no checkpoint is removed that may not be there yet."""
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step_000001" / "model").mkdir(parents=True)
    folder.config.write_text("seed: 1\n")
    output = OutputConfig(
        push_to_hub=True, hf_repo_id="a-model", hf_repo_revision="a-run", hub_strategy="all_checkpoints"
    )
    uploader = HubUploader(folder, output, make_console())
    if damage is None:
        folder.hub.unlink()
    else:
        folder.hub.write_text(damage)
    capsys.readouterr()
    uploader.stopped(ValueError("what ended it"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"What is on the Hub cannot be told: {folder.hub}: ")
    assert uploader.needs(folder.checkpoints / "step_000001")


@pytest.mark.slow
def test_of_all_checkpoints_none_is_lost_to_a_failure(hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """What could not be uploaded when it was its turn stays on disk until it is, whatever is kept otherwise."""
    fields = FIELDS | {"hub_strategy": "all_checkpoints", "max_train_steps": 5, "keep_last_n_checkpoints": 1}
    hub.faults["batch"] = repeat(403)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)
    assert cli.main(words) == 76
    assert set(hub.repositories["someone/a-model"]) == {"main", "a-run"}
    assert len(cli.checkpoints(tmp_path / "run")) == 5
    hub.faults.clear()
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert {f"a-run-step_{step:06d}" for step in range(1, 6)} < set(hub.repositories["someone/a-model"])
    assert_whole(hub, tmp_path / "run")


@pytest.mark.slow
def test_another_run_under_the_same_names_leaves_its_own_models(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    fields = FIELDS | {"hub_strategy": "all_checkpoints", "max_train_steps": 1}
    run = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    first = hub.branch("a-run-step_000001").files["model.safetensors"]
    for path in run.iterdir():  # as `rm -rf run/*` does, which leaves hidden files
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cli.train(llama, pairs_file, run, **fields, seed=7, learning_rate=1e-2)
    assert_whole(hub, run)
    assert (
        hub.branch("a-run-step_000001").files["model.safetensors"] == (run / "model.safetensors").read_bytes() != first
    )


@pytest.mark.slow
def test_a_copy_elsewhere_is_not_the_runs_own_upload(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS | {"hub_strategy": "end"})
    hub.faults["batch"] = repeat(403)
    assert cli.main(words) == 76
    hub.faults.clear()
    assert main(["upload", str(tmp_path / "run"), "--hf_repo_id", "someone/other"]) == 0
    assert "model.safetensors" in hub.branch("main", "someone/other").files
    assert "model.safetensors" not in hub.branch("a-run").files
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert_whole(hub, tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["upload", str(tmp_path / "run"), "--hf_repo_revision", "main"])
    assert "needs --hf_repo_id" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_complete_on_the_hub_is_not_trained_again(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    fields = FIELDS | {"hub_strategy": "checkpoint", "max_train_steps": 1}
    cli.train(llama, pairs_file, tmp_path / "run", **fields)
    words = cli.arguments(llama, pairs_file, tmp_path / "elsewhere", **fields, resume_from_checkpoint="hub")
    assert "is complete" in cli.failure(capsys, words)


@pytest.mark.slow
def test_no_rank_leaves_before_the_last_upload_of_a_run_that_is_asked_to_stop(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Or a launcher would end rank 0, which waits for it."""
    hub.seconds = 4.0
    fields = FIELDS | {"max_train_steps": 6, "checkpointing_steps": 5, "per_device_train_batch_size": 2}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)

    def stop_in_step_3(rank: int) -> None:
        backward, stopped = StepGradients.backward, RunFolder.release

        def signalled(self: StepGradients, *positional: object) -> object:
            if rank == 1 and self.state.progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return backward(self, *positional)  # type: ignore[arg-type]

        def noted(self: RunFolder) -> None:  # on the way out
            (tmp_path / f"left_{rank}").write_text(hub_titles())
            stopped(self)

        def hub_titles() -> str:
            info = huggingface_hub.HfApi().list_repo_commits("someone/a-model", revision="a-run")
            return "\n".join(commit.title for commit in info)

        StepGradients.backward, RunFolder.release = signalled, noted  # type: ignore[method-assign, assignment]

    assert cli.forked_ranks(words, stop_in_step_3) == [75, 75]
    for rank in (0, 1):
        assert "The model after step 3" in (tmp_path / f"left_{rank}").read_text()
