"""The load balancing loss of mixture-of-experts models, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from open_po.model.activations import checkpoint_gradients
from open_po.packing import pack
from tests import cli, tiny
from tests.scoring import PAIRS, load

MOE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", MOE)
def test_a_pack_equals_transformers(architecture: str, checkpointing: bool, tmp_path: Path) -> None:
    """Value and gradients of the rows with their mask, in the model's own forward. `test_layouts` has other layouts."""
    folder = tiny.make_model_folder(tmp_path, architecture, **MOE[architecture])
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = batch.input_ids.view(len(batch.row_lengths), -1)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(batch.row_lengths)[:, None]).long()
    expected = plain(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    expected.backward()
    scorer = load(folder).train()
    scorer.balance_experts()
    if checkpointing:
        checkpoint_gradients(scorer)
    with scorer.as_reference():
        assert scorer.score(batch).load_balancing is None, "it is computed for gradients only"
    load_balancing = scorer.score(batch).load_balancing
    assert load_balancing is not None
    load_balancing.backward()
    torch.testing.assert_close(load_balancing, expected)
    compared = 0
    theirs = dict(plain.named_parameters())
    for name, parameter in scorer.base.named_parameters():
        if theirs[name].grad is not None and theirs[name].grad.any():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared > 4


def test_it_is_trained_and_logged_by_its_share(tmp_path: Path) -> None:
    """A first SGD step moves the router by the weighted gradient of the packs' losses, each by its share of tokens."""
    folder = tiny.make_model_folder(tmp_path / "model", "mixtral", **MOE["mixtral"])
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(1, seed=3))
    fields: dict[str, Any] = {"optimizer": "sgd", "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    fields |= {"max_grad_norm": 0, "learning_rate": 0.5, "loss_type": "dpo"}
    without = cli.train(folder, data, tmp_path / "without" / "run", **fields)
    more = {"load_balancing_loss": True, "load_balancing_weight": 0.2}
    balanced = cli.train(folder, data, tmp_path / "with" / "run", **(fields | more))
    (record,) = cli.steps(balanced)
    assert "aux_loss" not in cli.steps(without)[0]
    assert 1.5 < record["aux_loss"] < 4.0  # 2 where two of four experts get equal shares

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (row,) = tiny.text_rows(1, seed=3)
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    rows = [
        tokenizer(row["prompt"])["input_ids"] + [*tokenizer(row[side])["input_ids"], 1]
        for side in ("chosen", "rejected")
    ]
    width = max(map(len, rows))
    ids = torch.tensor([ids + [2] * (width - len(ids)) for ids in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
    aux = plain(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert record["aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    aux.backward()
    name = next(name for name, p in plain.named_parameters() if p.shape == (4, 32))
    moved = cli.weights(balanced)[_saved(name, balanced)] - cli.weights(without)[_saved(name, without)]
    torch.testing.assert_close(moved, -0.5 * 0.2 * dict(plain.named_parameters())[name].grad, rtol=1e-2, atol=1e-5)


def _saved(name: str, folder: Path) -> str:
    """The saved name of the first layer's router."""
    return next(key for key, value in cli.weights(folder).items() if value.shape == (4, 32) and ".0." in key)


def test_refusals(llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", load_balancing_loss=True)
    assert "load_balancing_loss: llama is no mixture-of-experts model" in cli.failure(capsys, words)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", load_balancing_weight=0.1)
    assert cli.main(words) == 2
    assert "load_balancing_weight: needs load_balancing_loss" in capsys.readouterr().err
