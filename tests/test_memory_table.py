"""The README's table of what a card trains is the one that the benchmark's script makes of the memory plan."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests import cli


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = cli.REPOSITORY / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, memory)  # dataclasses look their module up
    spec.loader.exec_module(memory)
    text = (cli.REPOSITORY / "README.md").read_text().split("<!-- table: cards -->\n")[1]
    assert text.split("\n\n")[0].strip() == memory.card_table().strip()
