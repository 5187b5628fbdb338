"""Layers compiled by torch.compile: the values of layers that are not, for packs of every size without new code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from open_po.config import ModelConfig
from open_po.data import PreferencePair
from open_po.errors import UserError
from open_po.model import compiled
from open_po.model.activations import checkpoint_gradients, keep_activations
from open_po.model.compiled import compile_layers, refuse_rows
from tests import tiny
from tests.scoring import ALL, FLOAT32, choose, largest_gradient_error, load, score

COMPILED = replace(FLOAT32, compiled=True)


@pytest.fixture(autouse=True)
def _from_the_start() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled runs as it was traced, operation by operation: the same bits, and no C++ compiler's time."""
    monkeypatch.setattr(compiled, "_HOW", {"backend": "eager"})


def longer(pairs: list[PreferencePair], by: int) -> list[PreferencePair]:
    return [PreferencePair(pair.prompt_ids + [9] * by, pair.chosen_ids, pair.rejected_ids) for pair in pairs]


def pair_of_scorers(folder: Path, **fields: Any) -> tuple[Any, Any]:
    scorers = []
    for numerics in (FLOAT32, COMPILED):
        scorer = load(folder, numerics).train()
        config = ModelConfig(**fields)
        if config.gradient_checkpointing:
            checkpoint_gradients(scorer, config.gradient_checkpointing_every)
        keep_activations(scorer, config)
        choose(scorer)
        assert scorer.last_layer_is_short
        scorers.append(scorer)
    return scorers[0], scorers[1]


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_every": 2,
            "offload_activations": True,
        },
    ],
    ids=["alone", "with the others"],
)
def test_packs_of_many_sizes_are_compiled_once(fields: dict[str, Any], tmp_path: Path) -> None:
    tiny.make_model(tmp_path, num_hidden_layers=3)
    plain, scorer = pair_of_scorers(tmp_path, **fields)
    for number, by in enumerate((0, 3, 17, 40)):
        pairs = longer(ALL[: 9 - 2 * number], by)
        for layout in ("shared", "unshared"):
            (expected, theirs), (got, mine) = score(plain, layout, pairs), score(scorer, layout, pairs)  # type: ignore[arg-type]
            assert torch.equal(got, expected)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 8
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["unimplemented"]  # a limit of recompilations that was reached, for one
    assert {name for name, _ in scorer.named_parameters()} == {name for name, _ in plain.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_code_gives_the_values_of_the_model(architecture: str, checkpointing: bool, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    plain, scorer = pair_of_scorers(tmp_path, gradient_checkpointing=checkpointing)
    for pairs in (ALL, longer(ALL[:4], 30)):
        (expected, theirs), (got, mine) = score(plain, "shared", pairs), score(scorer, "shared", pairs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert largest_gradient_error(mine, theirs) <= 2e-5
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"] > 0


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    other = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with other, pytest.raises(UserError) as found:
        compile_layers(load(llama))
    line = str(found.value)
    assert line.startswith("torch_compile: nothing can be compiled here (")
    assert line.endswith("); leave it out")
    assert "no-such-compiler" in line
    assert "\n" not in line


def test_rows_are_refused(llama: Path) -> None:
    scorer = load(llama, COMPILED)
    scorer.use_layout("shared")
    refuse_rows(scorer)
    scorer.use_layout("rows")
    with pytest.raises(UserError, match="torch_compile: llama is computed in rows"):
        refuse_rows(scorer)
