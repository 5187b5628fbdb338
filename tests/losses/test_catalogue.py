"""What the catalogue says of the losses in words is what docs/losses.md says."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from open_po.losses import DIVERGENCES, LOSSES, NOTATION, loss_spec
from tests import cli

PAGE = (cli.REPOSITORY / "docs" / "losses.md").read_text()


def test_the_page_has_each_loss_as_the_catalogue_describes_it() -> None:
    rows: dict[str, list[str]] = {}
    for line in PAGE.splitlines():
        if line.startswith("| `") and "`loss_type`" not in line:
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells)
    assert rows.keys() == LOSSES.keys()
    for name, (_, formula, _, _, rewards, paper) in rows.items():
        spec = LOSSES[name]
        assert (spec.formula, spec.rewards, spec.paper) == (formula, rewards, paper), name
        assert formula, name


def test_the_page_has_the_letters_and_the_divergences() -> None:
    words = " ".join(PAGE.split())
    assert f"Letters: {NOTATION}" in words
    for name, g in DIVERGENCES.items():
        assert f"`{g}` (`{name}`" in words


def test_a_loss_of_ones_own_is_described_by_what_it_says_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(policy: object, *, beta: float = 1.0) -> None:
        """log(1 + a | b): mine.

        More of it.
        """

    def silent(policy: object) -> None: ...

    module = ModuleType("own_losses")
    vars(module).update(said=said, silent=silent)
    monkeypatch.setitem(sys.modules, "own_losses", module)
    assert loss_spec("own_losses:said").formula == "log(1 + a | b): mine."
    assert loss_spec("own_losses:silent").formula == ""
