from __future__ import annotations

import time
from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from tests.hub_server import TOKEN, Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which this process and those that it starts believe to be the only one."""
    state = Hub()
    stop = serve(state)
    for name, value in {"ENDPOINT": state.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for variable, setting in {"HF_ENDPOINT": state.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(variable, setting)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    yield state
    close_session()
    stop()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept in this process, without sleeping."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 50, "no clock goes on here, so it would try for ever"

    monkeypatch.setattr(time, "sleep", sleep)
    return slept
