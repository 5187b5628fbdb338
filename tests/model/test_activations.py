"""What is kept for the backward pass: less of it, in another place, or made again; values stay what they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from open_po.config import ModelConfig
from open_po.data import PreferencePair
from open_po.errors import UserError
from open_po.model import offload
from open_po.model.activations import checkpoint_gradients, keep_activations
from open_po.model.lora import attach_lora
from open_po.model.mlp_tiles import tile_mlps
from open_po.model.numerics import Numerics
from open_po.model.offload import HostOffload
from open_po.model.saved_tensors import SavedTensors
from open_po.model.scorer import Scorer
from open_po.packing import PackedBatch, pack
from tests import tiny
from tests.scoring import ALL, BFLOAT16, FLOAT32, LAYOUTS, choose, largest_gradient_error, load, score

# Of a layer that is measured, per token: hidden, key and value, and MLP's inner numbers; heads.
HIDDEN, KEYS, INNER, HEADS = 64, 32, 160, 4


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    tiny.make_model(folder, num_hidden_layers=3)
    return folder


def trained_scorer(folder: Path, numerics: Numerics = FLOAT32, lora: bool = False, **fields: Any) -> Scorer:
    """A scorer as a run has it that sets `fields`, in its best layout."""
    scorer = load(folder, numerics).train()
    config = ModelConfig(**fields)
    if config.gradient_checkpointing:
        checkpoint_gradients(scorer, config.gradient_checkpointing_every)
    if lora:
        torch.manual_seed(1)
        options = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.4}
        attach_lora(scorer, replace(config, **options, lora_target_modules=["all-linear"]))
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    keep_activations(scorer, config)
    choose(scorer)
    assert scorer.last_layer_is_short
    return scorer


def outcomes(scorer: Scorer) -> dict[str, Tensor]:
    """Scores and gradients in every layout, each from the same random state."""
    found = {}
    for layout in LAYOUTS:
        torch.manual_seed(3)
        scores, gradients = score(scorer, layout)
        found |= {f"{layout} scores": scores} | {f"{layout} {name}": value for name, value in gradients.items()}
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert different == []


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", 1)


WAYS: dict[str, dict[str, Any]] = {
    "all": {"gradient_checkpointing": True},
    "every second": {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    "offload": {"offload_activations": True},
    "all, offload": {"gradient_checkpointing": True, "offload_activations": True},
}


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    "numerics", [FLOAT32, pytest.param(BFLOAT16, marks=pytest.mark.slow)], ids=["float32", "autocast"]
)
@pytest.mark.parametrize(
    "lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["weights", "adapters with dropout"]
)
def test_values_do_not_change_by_a_bit(three_layers: Path, numerics: Numerics, lora: bool) -> None:
    plain = trained_scorer(three_layers, numerics, lora)
    plain.saving = nullcontext  # autograd's own way
    expected = outcomes(plain)
    for fields in WAYS.values():
        assert_same(outcomes(trained_scorer(three_layers, numerics, lora, **fields)), expected)
    assert_same(outcomes(trained_scorer(three_layers, numerics, lora)), expected)


@pytest.mark.parametrize(("every", "times"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1])])
def test_every_nth_layer_is_computed_again(three_layers: Path, every: int, times: list[int]) -> None:
    scorer = trained_scorer(three_layers, gradient_checkpointing=True, gradient_checkpointing_every=every)
    calls = [0, 0, 0]

    def count(number: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[number] += 1

        return hook

    for number, layer in enumerate(scorer.decoder_layers()):
        layer.mlp.register_forward_pre_hook(count(number))  # type: ignore[union-attr]
    score(scorer, "shared")
    assert calls == times


def test_layers_that_are_recomputed_all_or_none_are_told(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code that comes with a model may be written."""
    scorer = load(three_layers)
    monkeypatch.setattr(Scorer, "decoder_layers", lambda self: [nn.Linear(1, 1)])
    with pytest.raises(UserError, match="gradient_checkpointing_every: the layers of llama are recomputed all or"):
        checkpoint_gradients(scorer, 2)


# ------------------------------------------------------------------------------------------------- what a layer keeps


def measured(folder: Path, layers: int, numerics: Numerics, autograds_own: bool, fields: dict[str, Any]) -> Scorer:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS}
    tiny.make_model(folder, num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    scorer = trained_scorer(folder, numerics, **fields)
    scorer.shorten_last_layer(None)
    scorer.use_layout("unshared")
    if autograds_own:
        scorer.saving = nullcontext
    return scorer


def row_of(tokens: int) -> PackedBatch:
    """A pack of one response, so that keys are no copies."""
    pair = PreferencePair([3 + i % 300 for i in range(tokens - 10)], [5] * 10, [5] * 10)
    return pack([pair], layout="unshared", pad_token_id=2)


def held(scorer: Scorer, tokens: int) -> int:
    """Bytes that were allocated by a forward pass, and not given back, by PyTorch's own count."""
    batch = row_of(tokens)
    scorer._scored_states(batch)
    gc.collect()  # what other tests have left in circles would be counted as given back
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        states = scorer._scored_states(batch)
    del states
    return sum(event.self_cpu_memory_usage for event in profile.events())


def kept_by_a_layer(
    folder: Path, numerics: Numerics, *, autograds_own: bool = False, **fields: Any
) -> tuple[float, float]:
    """Bytes by token, and others: from two depths and two lengths."""
    found = {}
    for layers in (2, 4):
        scorer = measured(folder, layers, numerics, autograds_own, fields)
        found |= {(layers, tokens): held(scorer, tokens) for tokens in (100, 200)}
    by_token = (found[4, 200] - found[4, 100] - found[2, 200] + found[2, 100]) / 2 / 100
    return by_token, (found[4, 100] - found[2, 100]) / 2 - 100 * by_token


WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER  # of a layer's products
STATES = 4 * (HEADS + 2)  # softmax and norms, in float32
FULL = replace(FLOAT32, compute_dtype=torch.bfloat16, weights_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("numerics", "fields", "expected", "others"),
    [
        (FLOAT32, {}, 4 * (9 * HIDDEN + 2 * KEYS + 4 * INNER) + STATES, 0),
        pytest.param(FLOAT32, {"mlp_tile_tokens": 16}, 4 * (9 * HIDDEN + 2 * KEYS) + STATES, 0, marks=pytest.mark.slow),
        (FLOAT32, WAYS["all"], 4 * HIDDEN, None),
        (BFLOAT16, {}, 26 * HIDDEN + 4 * KEYS + 8 * INNER + STATES, 0),
        (BFLOAT16, {"autograds_own": True}, 32 * HIDDEN + 4 * KEYS + 8 * INNER + STATES, 2 * WEIGHTS),
        (FULL, {}, 22 * HIDDEN + 4 * KEYS + 8 * INNER + STATES, 0),
        pytest.param(FULL, WAYS["all"], 2 * HIDDEN, None, marks=pytest.mark.slow),
    ],
    ids=["float32", "tiles", "recomputed", "autocast", "autocast, autograd's own", "bfloat16", "bfloat16, recomputed"],
)
def test_what_a_layer_keeps(
    numerics: Numerics, fields: dict[str, Any], expected: int, others: int | None, tmp_path: Path
) -> None:
    by_token, rest = kept_by_a_layer(tmp_path, numerics, **fields)
    print(by_token, expected, rest)
    assert by_token == pytest.approx(expected, rel=0.01)
    if others is not None:
        assert rest == pytest.approx(others, rel=0.02, abs=2000)


# ------------------------------------------------------------------------------------------------------------ offload


class LateTraffic:
    """Copies that have not arrived before they are waited for, and then must be what was sent."""

    def __init__(self, device: torch.device) -> None:
        self.sent: list[Tensor] = []
        self.on_the_way = self.most = 0

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        host = torch.full_like(source, 255)
        self.sent.append(source)  # held, so that nothing else is made in its place
        return host, self._starts(host, source)

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        target = torch.full_like(host, 255)
        return target, self._starts(target, host)

    def wait(self, arrival: Any) -> None:
        target, source = arrival
        target.copy_(source)
        self.on_the_way -= target.nbytes

    def _starts(self, target: Tensor, source: Tensor) -> Any:
        self.on_the_way += target.nbytes
        self.most = max(self.most, self.on_the_way)
        return target, source


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_are_waited_for_and_few_are_on_the_way(
    three_layers: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcomes(trained_scorer(three_layers, gradient_checkpointing=checkpointing))
    scorer = trained_scorer(three_layers, gradient_checkpointing=checkpointing)
    traffic = LateTraffic(torch.device("cpu"))
    scorer.saving = SavedTensors(drop_casts=False, offload=HostOffload(lambda device: traffic))
    monkeypatch.setattr(offload, "_IN_FLIGHT_BYTES", 400_000)
    assert_same(outcomes(scorer), expected)
    largest = max(tensor.nbytes for tensor in traffic.sent)
    assert 2 * largest < 400_000 < sum(tensor.nbytes for tensor in traffic.sent)
    assert traffic.most <= 400_000 + 2 * largest


@pytest.mark.usefixtures("everything_is_large")
def test_of_layers_that_are_recomputed_their_inputs_are_sent(three_layers: Path) -> None:
    scorer = trained_scorer(three_layers, gradient_checkpointing=True)
    scorer.shorten_last_layer(None)
    store = HostOffload()
    scorer.saving = SavedTensors(drop_casts=False, offload=store)
    batch = pack(ALL, layout="shared", pad_token_id=2)
    scorer.score(batch)
    tokens = len(batch.input_ids)
    inputs = 3 * tokens * 32 * 4
    norm = tokens * 32 * 4 * 2 + tokens * 4  # the last, which is in no layer: its input, that normed, and the factors
    ids = tokens * 8
    assert store.sent_bytes == inputs + norm + ids


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16], ids=["float32", "autocast"])
def test_no_weight_is_sent_and_no_storage_twice(three_layers: Path, numerics: Numerics) -> None:
    scorer = trained_scorer(three_layers, numerics)
    traffic = LateTraffic(torch.device("cpu"))
    scorer.saving = SavedTensors(drop_casts=True, offload=HostOffload(lambda device: traffic))
    scorer.score(pack(ALL, layout="shared", pad_token_id=2))
    sent = {bytes(tensor.numpy()) for tensor in traffic.sent}
    kinds = [torch.float32, torch.bfloat16]
    weights = {bytes(w.detach().to(kind).view(torch.uint8).numpy()) for w in scorer.parameters() for kind in kinds}
    assert len(sent) > 30
    assert not sent & weights
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in traffic.sent]
    assert len(places) == len(set(places))


@pytest.mark.usefixtures("everything_is_large")
def test_views_of_one_storage_share_its_bytes_and_a_new_one_in_its_place_does_not() -> None:
    store = HostOffload()
    keep = SavedTensors(drop_casts=False, offload=store)
    x = torch.randn(6, 8, requires_grad=True)
    with keep():
        inner = x * 2
        both = (inner.exp(), inner.view(8, 6).sin(), inner[:, :5].cos(), inner.t().square())
        assert store.sent_bytes == 2 * 6 * 8 * 4  # `inner` once; `exp` keeps what it returns
        for number in range(20):  # freed and made again, mostly in the same place
            both = (*both, (torch.full((6, 8), float(number)) * x)[:3])
    total = sum(part.sum() for part in both)
    total.backward()
    y = x.detach().clone().requires_grad_()
    inner = y * 2
    own = inner.exp().sum() + inner.sin().sum() + inner[:, :5].cos().sum() + inner.square().sum()
    own = own + sum((float(number) * y)[:3].sum() for number in range(20))
    own.backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_graphs_that_are_dropped_leave_nothing_behind(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", 1)
    monkeypatch.setattr(offload, "_IN_FLIGHT_BYTES", 1000)
    scorer = trained_scorer(three_layers)
    store = HostOffload(LateTraffic)
    scorer.saving = SavedTensors(drop_casts=False, offload=store)
    for _ in range(3):
        scorer.score(pack(ALL, layout="shared", pad_token_id=2))  # as one that ends in an error
    alive = sum(copy() is not None for copy in store._order)
    assert alive <= 1, "of the last pass its last copy is on the way"
    expected = outcomes(trained_scorer(three_layers))
    assert_same(outcomes(scorer), expected)
    store.begin()
    assert store._order == []


# -------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "phi", "olmo2", "gpt2"])
def test_tiles_give_the_values_of_whole_mlps(architecture: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    plain, tiled = load(tmp_path).train(), load(tmp_path).train()
    widest: list[int] = []
    for layer in tiled.decoder_layers():
        inner = next(module for module in layer.mlp.modules() if type(module) in (nn.Linear, *_CONV))  # type: ignore[union-attr]
        inner.register_forward_hook(lambda module, args, output: widest.append(output[..., 0].numel()))
    tile_mlps(tiled, 16)
    for layout in ("shared", "rows"):
        widest.clear()
        (expected, theirs), (got, mine) = score(plain, layout), score(tiled, layout)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert largest_gradient_error(mine, theirs) <= 1e-5
        tokens = len(pack(ALL, layout=layout, pad_token_id=2).input_ids)  # type: ignore[arg-type]
        assert max(widest) == 16
        assert sum(widest) == 2 * 2 * tokens  # layers, passes


def _conv() -> Sequence[type]:
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


_CONV = _conv()


def test_tiles_train_adapters_with_dropout_alone(three_layers: Path) -> None:
    """The backward pass draws what the forward pass drew: the gradient is that of its values."""
    scorer = trained_scorer(three_layers, lora=True, mlp_tile_tokens=16, gradient_checkpointing=True)
    weights = {name: weight for name, weight in scorer.named_parameters() if weight.requires_grad}
    name = next(name for name in weights if "layers.1.mlp.up_proj.lora_A" in name)
    torch.manual_seed(3)
    score(scorer, "shared")
    assert all(weight.grad is not None for weight in weights.values())
    gradient = weights[name].grad
    assert gradient is not None
    direction, step = gradient / gradient.norm(), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weights[name] += sign * step * direction
        torch.manual_seed(3)
        values.append(score(scorer, "shared"))
        with torch.no_grad():
            weights[name] -= sign * step * direction
    from tests.scoring import WEIGHTS as COTANGENT

    slope = sum(s * (v * COTANGENT).double().sum() for s, (v, _) in zip((1, -1), values, strict=True)) / (2 * step)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_tiles_sum_the_gradients_of_bfloat16_weights_in_float32() -> None:
    torch.manual_seed(0)
    scorer: Any = nn.Module()
    layer: Any = nn.Module()
    layer.mlp = nn.Linear(8, 8, bias=True).bfloat16()
    scorer.decoder_layers = lambda: [layer]
    scorer.base = nn.Module()
    scorer.base.config = type("Config", (), {"model_type": "x", "get_text_config": lambda self, **_: self})()
    tile_mlps(scorer, 4)
    hidden = torch.randn(1, 1000, 8).bfloat16().requires_grad_()
    out = layer.mlp(hidden)
    cotangent = torch.rand_like(out)
    out.backward(cotangent)
    exact = torch.einsum("bto,bti->oi", cotangent.double(), hidden.detach().double())
    error = (layer.mlp.weight.grad.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-7
    bias = cotangent.double().sum((0, 1))
    assert ((layer.mlp.bias.grad.double() - bias).abs() / bias).max() < 2**-7  # 250 sums in bfloat16 would stop growing


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("mixtral", "mixtral sends tokens to experts"),
        ("opt", "the layers of opt have no module mlp that takes hidden states alone"),
        ("bloom", "the layers of bloom have no module mlp that takes hidden states alone"),
    ],
)
def test_models_without_such_mlps_are_refused(architecture: str, what: str, tmp_path: Path) -> None:
    settings = tiny.SHARING.get(architecture) or tiny.ROWS_ONLY[architecture]
    tiny.make_model(tmp_path, architecture, **settings)
    with pytest.raises(UserError) as found:
        tile_mlps(load(tmp_path), 16)
    assert str(found.value) == f"mlp_tile_tokens: {what}; leave it out"
