"""The pieces of benchmarks/against_trl: workloads, FLOPs, arguments, search, agreement, report."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from open_po.config import load_config
from open_po.data import PreferencePair
from open_po.model.layout_check import choose_layout
from open_po.model.scorer import Scorer
from open_po.packing import Sampler, pack
from tests import cli
from tests.scoring import FLOAT32

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FOLDERS = [str(BENCHMARKS), str(BENCHMARKS / "against_trl")]  # where Python finds them when a benchmark is run
NAMES = ["compare", "comparison_report", "measuring", "open_po_side", "presets", "trl_side", "workloads"]
sys.path[:0] = FOLDERS
compare, comparison_report, measuring, open_po_side, presets, trl_side, workloads = map(importlib.import_module, NAMES)
del sys.path[: len(FOLDERS)]

SHAPE = workloads.Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocabulary=50)
PAIR = ([3, 4, 5], [6, 1], [7, 8, 1])  # p = 3, a = 2, b = 3
EVERY = [
    pytest.param(preset, workload, id=f"{name}-{workload.name}")
    for name, make in presets.PRESETS.items()
    for preset in [make()]
    for workload in preset.workloads + preset.extra_workloads
]


def bench(preset: Any, workload: Any, folder: Path = Path("folder"), ids: Any = None) -> Any:
    ids = workload.draw(0) if ids is None else ids
    return measuring.Bench(preset=preset, workload=workload, ids=ids, folder=folder, seed=0, threads=1)


def measurement(**changes: Any) -> Any:
    plain: dict[str, Any] = {
        "reference_seconds": 2.0,
        "step_seconds": [9.0, 1.0, 2.0, 4.0],
        "peak_bytes": 10**9,
        "losses": [0.7, 0.6, 0.5, 0.4],
        "reference_logps": [[-400.0, -300.0], [-0.5, -2.0]],
    }
    return measuring.Measurement(**plain | changes)


# ----------------------------------------------------------------------------------------------- workloads and FLOPs


@pytest.mark.parametrize(("preset", "workload"), EVERY)
def test_pairs_are_what_a_workload_says(preset: Any, workload: Any) -> None:
    ids = workload.draw(0)
    assert ids == workload.draw(0) != workload.draw(1)
    assert len(ids) == workload.pairs
    assert workload.pairs % preset.global_batch == 0
    assert len({len(prompt) for prompt, _, _ in ids}) > 3
    for prompt, chosen, rejected in ids:
        assert chosen[-1] == rejected[-1] == workloads.EOS
        assert chosen != rejected
        assert prompt
        assert len(prompt) + max(len(chosen), len(rejected)) <= workload.longest
        words = [*prompt, *chosen[:-1], *rejected[:-1]]
        assert min(words) >= workloads.FIRST_WORD
        assert max(words) < workload.shape.vocabulary


def test_shares_of_distinct_tokens() -> None:
    found = {}
    for workload in [*presets.cpu_preset().workloads, *presets.cpu_preset().extra_workloads]:
        found[workload.name] = workloads.counts(replace(workload, pairs=4000).draw(0))["distinct_share"]
    expected = {"chat": 0.60, "long_prompts": 0.54, "short_pairs": 0.63, "vocab_65k": 0.63, "long_answers": 0.78}
    assert found == pytest.approx(expected, abs=0.01)


def test_body_parameters_are_the_models() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    total = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert SHAPE.body_parameters == total - 2 * 50 * 8
    assert SHAPE.head_parameters == 50 * 8


def test_useful_flops_by_hand() -> None:
    sees = 0
    for response in PAIR[1:]:  # by the definition: which position of prompt and response each response token reads
        sees += sum(len(PAIR[0]) + place + 1 for place in range(len(response)))
    sees += sum(place + 1 for place in range(len(PAIR[0])))
    assert workloads.visible_positions(PAIR) == sees == 6 + (4 + 5) + (4 + 5 + 6)
    attention = 3 * 4 * SHAPE.head_dim * SHAPE.heads * SHAPE.layers * sees
    expected = 6 * SHAPE.body_parameters * 8 + 6 * SHAPE.head_parameters * 5 + attention
    assert workloads.useful_flops(SHAPE, [PAIR]) == expected
    assert workloads.useful_flops(SHAPE, [PAIR, PAIR], backward=False) == pytest.approx(2 * expected / 3)


def test_skipped_flops_are_what_the_last_layer_leaves_out() -> None:
    """Counted by torch on the model itself, forward, whole and short; products of attention, which torch leaves out on
    a CPU, by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    scorer = Scorer(LlamaForCausalLM(SHAPE.config()), FLOAT32, {})
    pairs = [PreferencePair(*PAIR)]
    assert choose_layout(scorer, pairs, "on", longest=6, pad=0).layout == "shared"
    found = []
    for layer in (scorer.base.base_model.layers[-1], None):
        scorer.shorten_last_layer(layer)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            scorer.score(pack(pairs, layout="shared", pad_token_id=0))
        products = counter.get_flop_counts()["Global"]
        found.append(sum(count for name, count in products.items() if "mm" in str(name)))
    queries = 2 * 2 * SHAPE.hidden**2  # of the two prompt tokens that are not its last: computed, though useless
    attention = 4 * SHAPE.head_dim * SHAPE.heads * (1 + 2 + 5 + 6)
    assert found[1] - found[0] == workloads.skipped_flops(SHAPE, [PAIR], backward=False) - attention - queries
    assert workloads.skipped_flops(SHAPE, [PAIR]) == 3 * workloads.skipped_flops(SHAPE, [PAIR], backward=False)


def test_flops_of_rows_by_hand() -> None:
    """Rows of 3 + 2 and 3 + 3 tokens."""
    attention = 3 * 4 * SHAPE.head_dim * SHAPE.heads * SHAPE.layers * (15 + 21)
    body = 6 * SHAPE.body_parameters * 11 + attention
    assert workloads.repeated_flops(SHAPE, [PAIR], score_prompts=False) == body + 6 * SHAPE.head_parameters * 5
    assert workloads.repeated_flops(SHAPE, [PAIR], score_prompts=True) == body + 6 * SHAPE.head_parameters * 11
    useful = workloads.useful_flops(SHAPE, [PAIR])
    ratios = [f"{(body + 6 * SHAPE.head_parameters * scored) / useful:.2f}" for scored in (5, 11)]
    assert re.findall(r"\d\.\d\d", comparison_report.work_line(SHAPE, [PAIR])) == ratios


def test_written_text_has_the_ids_for_trl(tmp_path: Path) -> None:
    """TRL appends EOS's text and tokenises prompt + response."""
    workloads.build_model(SHAPE, tmp_path / "model", seed=0)
    workloads.write_pairs([PAIR], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = json.loads((tmp_path / "pairs.jsonl").read_text())
    for response, ids in (("chosen", PAIR[1]), ("rejected", PAIR[2])):
        whole = tokenizer(text["prompt"] + text[response] + tokenizer.eos_token)["input_ids"]
        assert whole == PAIR[0] + ids
    assert tokenizer(text["prompt"])["input_ids"] == PAIR[0]


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("preset", "workload"), EVERY)
def test_every_setting_makes_valid_arguments(preset: Any, workload: Any) -> None:
    made = bench(preset, workload)
    for side in presets.sides_of(preset, workload):
        for settings in {s for stage in side.stages for s in compare.candidates(side.start, stage)} | {side.start}:
            if isinstance(settings, trl_side.TrlSettings):
                arguments = trl_side.config_arguments(made.trl_job(settings, preset.steps, "output"))
                pairs = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
                assert pairs == preset.global_batch
                assert arguments["bf16"] == (preset.device == "cuda")
            else:
                job = made.open_po_job(settings, preset.steps, "output")
                config = load_config(job.arguments())
                assert config.train.max_train_steps == preset.steps
                assert config.train.num_epochs * len(made.ids) >= preset.steps * preset.global_batch
                assert config.data.max_seq_length == workload.longest


def test_steps_are_the_samplers(tmp_path: Path) -> None:
    preset = presets.tiny_preset()
    made = bench(preset, preset.workloads[0])
    sampler = Sampler(num_pairs=len(made.ids), global_batch=preset.global_batch, seed=0)
    steps = made.steps(3)
    assert steps == [sampler.step_pairs(step) for step in range(3)]
    assert sorted(steps[0] + steps[1]) == list(range(8))  # an epoch
    order = trl_side.train_order([[0, 1, 2], [2, 3]], [5, 9, 9, 7])
    assert order == [1, 2, 0, 2, 3]  # by length within a step, steps in order


def test_presets_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "has_gpu", lambda: False)
    compare.main(["--preset", "cuda"])
    said = capsys.readouterr().out
    assert "no GPU" in said
    assert "use_liger_kernel': True" in said
    assert "--max_tokens_per_batch 16384" in said
    assert "128,256" in said
    assert "trl-patched" not in said
    with pytest.raises(SystemExit):
        compare.main(["--workloads", "nonsense"])
    assert "there are chat, long_prompts" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ search and judgement


def test_search_keeps_the_best_of_each_stage() -> None:
    Settings, Trial = trl_side.TrlSettings, compare.Trial
    stages = [{"batch": [1, 2, 4], "reference_batch": [1, 2, 4]}, {"attention": ["sdpa", "eager"]}]
    asked = []

    def try_out(settings: Any) -> Any:
        asked.append(settings)
        if settings.batch == 4:
            return Trial(settings=settings, failure="out of memory")
        training = {1: 5.0, 2: 4.0}[settings.batch] + (settings.attention == "eager")
        reference = float(settings.reference_batch)
        return Trial(settings=settings, training=training, reference=reference, peak_bytes=1)

    side = presets.Side(name="trl", start=Settings(), stages=stages)
    best, trials = compare.search(side, try_out)
    assert best == Settings(batch=1, reference_batch=2, attention="eager")
    assert [trial.settings for trial in trials] == asked == list(dict.fromkeys(asked))
    assert len(asked) == 5
    with pytest.raises(measuring.MeasurementError, match="out of memory"):
        compare.search(
            replace(side, stages=stages[:1]), lambda settings: Trial(settings=settings, failure="out of memory")
        )


def test_of_settings_as_fast_the_leanest_is_taken() -> None:
    speeds = {1: (9.7, 3.0), 2: (9.9, 1.0), 4: (10.0, 2.0)}  # pairs/s, memory

    def try_out(settings: Any) -> Any:
        training, memory = speeds[settings.batch]
        return compare.Trial(settings=settings, training=training, reference=training, peak_bytes=memory)

    side = presets.Side(name="trl", start=trl_side.TrlSettings(), stages=[{"batch": [1, 2, 4]}])
    assert compare.search(side, try_out)[0].batch == 2


def test_rates_and_agreement() -> None:
    preset = presets.cpu_preset()
    first = measurement()
    assert first.training_rate(8) == 4.0  # steps of 1, 2 and 4 s: the first, of 9 s, does not count
    assert first.reference_rate() == 1.0
    assert first.share([1.0, 3.0, 3.0, 3.0], rate=2.0) == 0.75
    assert measuring.disagreement(first, first, preset) is None
    near = measurement(reference_logps=[[-400.03, -300.0], [-0.50005, -2.0]])  # 1e-4 x max(1, |x|) is 0.04 and 1e-4
    assert measuring.disagreement(near, first, preset) is None
    assert near.difference(first) == pytest.approx((7.5e-5, 0.0))
    for change in (
        {"reference_logps": [[-400.05, -300.0], [-0.5, -2.0]]},
        {"reference_logps": [[-400.0, -300.0], [-0.5003, -2.0]]},
        {"losses": [0.7, 0.6, 0.5, 0.4002]},
        {"losses": [0.7, 0.6, 0.5, math.nan]},
    ):
        assert "invalid" in str(measuring.disagreement(measurement(**change), first, preset))
    assert measurement(losses=[0.7, 0.6]).difference(first)[1] == 0.0  # a search has fewer steps


def row(side: str, factor: float, invalid: str | None = None) -> Any:
    return comparison_report.Row(
        side=side,
        settings="settings",
        training=[factor, 1.1 * factor],
        reference=[factor, factor],
        peak_bytes=[int(1e9 / factor)] * 2,
        share=0.5,
        computed_share=0.45 if side == "open_po" else None,
        reference_share=0.4,
        logp_difference=1e-6,
        loss_difference=1e-7,
        others=0.0,
        invalid=invalid,
        losses=[0.7],
    )


def comparison(*rows: Any) -> Any:
    found = workloads.counts([PAIR])
    return comparison_report.Comparison(
        workload="chat",
        about="a workload",
        shape=str(SHAPE),
        counts=found,
        pairs=1,
        rates=[1e9, 2e9],
        rate_tokens=8,
        work="rows need twice the work",
        rows=list(rows),
        targets=comparison_report.Targets(stock=2.0, patched=1.4, memory=0.7, share=0.6),
    )


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_report, "machine", lambda *about: "a machine")
    report = comparison_report.Report(device="cpu", threads=2, global_batch=16, about="A test.")
    report.comparisons.append(comparison(row("trl", 1.0), row("trl-patched", 2.0), row("open_po", 2.5)))
    report.write(tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert (
        "| chat | trl | 2.50 (2.50 to 2.50), meets 2 | 2.50 (2.50 to 2.50), meets 2 | 0.40 (0.40 to 0.40), meets 0.7 |"
    ) in text
    assert "| chat | trl-patched | 1.25 (1.25 to 1.25), misses 1.4 | 1.25 (1.25 to 1.25), misses 1.4 |" in text
    assert "is predicted from): chat 50% (misses 60%, 45% without the skipped part)." in text


def test_an_invalid_row_has_no_ratio() -> None:
    found = comparison(row("trl", 1.0), row("open_po", 2.5, invalid="invalid: it differs"))
    assert comparison_report.ratio_rows(found) == []
    lines = comparison_report.result_rows(found)
    assert "| open_po | invalid: it differs | | | |" in lines[-1]
    assert "2.5" not in lines[-1]


def test_a_whole_run_with_measurements_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Search, rounds, report and settings file; the second run takes the first one's settings."""
    asked: list[Any] = []

    def measure(self: Any, settings: Any, steps: int) -> Any:
        asked.append(settings)
        if getattr(settings, "batch", 0) == 8:
            raise measuring.MeasurementError("RuntimeError: out of memory")
        ours = isinstance(settings, open_po_side.OpenPoSettings)
        seconds = 1.0 if ours else 2.0 + 0.1 * settings.batch
        return measurement(
            step_seconds=[seconds] * steps,
            losses=[0.5] * steps,
            reference_logps=[[-1.0, -2.0]] * len(self.ids),
            others=0.5 if ours else 0.0,
        )

    monkeypatch.setattr(measuring.Bench, "run", lambda self, command, allocator: "")
    monkeypatch.setattr(measuring.Bench, "measure", measure)
    monkeypatch.setattr(measuring.Bench, "matmul_rate", lambda self, tokens: (1e12, 0.0))
    monkeypatch.setattr(comparison_report, "machine", lambda *about: "a machine")
    out = tmp_path / "results" / "trl.md"
    assert compare.main(["--workloads", "chat", "--repeats", "2", "--out", str(out)]) == 0
    said, text = capsys.readouterr().out, out.read_text()
    assert "RuntimeError: out of memory" in said
    assert "other work took 50% of the CPUs' time" in said
    assert "| chat | trl | 2.10 (2.10 to 2.10), meets 2; disturbed, other work took 50% |" in text
    assert "a machine. A CPU, float32, a Llama of 6 layers x 384." in text
    assert "<summary>Search</summary>" in text
    settings = json.loads(out.with_suffix(".settings.json").read_text())["chat"]
    assert settings["trl"]["batch"] == settings["trl-patched"]["batch"] == 1
    asked.clear()
    again = ["--workloads", "chat", "--repeats", "1", "--settings", str(out.with_suffix(".settings.json"))]
    assert compare.main(again) == 0
    assert len(asked) == 3

    def broken(self: Any, settings: Any, steps: int) -> Any:
        raise measuring.MeasurementError("RuntimeError: broken")

    for bad, said in (("no.json", "cannot be read"), (str(out), "cannot be read")):
        with pytest.raises(SystemExit):
            compare.main([*again[:-1], bad])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--workloads", "short_pairs", *again[2:]])
    assert "says nothing of short_pairs" in capsys.readouterr().err

    monkeypatch.setattr(measuring.Bench, "measure", broken)
    assert compare.main(again) == 1
    assert "chat is left out: RuntimeError: broken" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ for real


@pytest.fixture
def built() -> Iterator[Any]:
    preset = presets.tiny_preset()
    with measuring.built(preset, preset.workloads[0], seed=0, threads=1) as made:
        yield made


@pytest.mark.slow
def test_open_po_is_measured(built: Any) -> None:
    settings = presets.sides_of(built.preset, built.workload)[-1].start
    found = built.measure(settings, 3)
    model = AutoModelForCausalLM.from_pretrained(built.folder / "model")
    for pair, logps in zip(built.ids, found.reference_logps, strict=True):
        for response, logp in zip(pair[1:], logps, strict=True):
            ids = torch.tensor([pair[0] + response])
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert logp == pytest.approx(scores[len(pair[0]) - 1 :].sum().item(), rel=1e-5)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(found.step_seconds) == len(found.losses) == 3
    assert found.peak_bytes > 1e8


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_all_sides_agree(built: Any) -> None:
    sides = presets.sides_of(built.preset, built.workload)
    stock, *others = (built.measure(side.start, 3) for side in sides)
    tiles = built.measure(replace(sides[1].start, head="tiles", batch=2), 3)
    for other in [*others, tiles]:
        assert measuring.disagreement(other, stock, built.preset) is None
    assert stock.losses[2] != pytest.approx(math.log(2), abs=1e-3)  # the second epoch: training has moved them


def test_a_failing_child_says_why(built: Any) -> None:
    with pytest.raises(measuring.MeasurementError, match="ValueError: it broke"):
        built.run([sys.executable, "-c", "raise ValueError('it broke')"], "default")


def test_matmul_rate_runs() -> None:
    code = (
        "import torch, matmul_rate as m, workloads as w; m.SECONDS_PER_PRODUCT = 1e-4;"
        "s = w.Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocabulary=50);"
        "print(m.matmul_rate(s, 32, 8, torch.device('cpu'), torch.float32) > 0)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


@pytest.mark.slow
def test_the_cost_of_the_reference_cache_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "cache.md"
    script = Path(__file__).parents[1] / "benchmarks" / "reference_cache.py"
    words = ["--responses", "40000", "--pairs", "6", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=cli.environment())
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert re.search(r"Opening 40,000 responses in 3 files \(1 MB\), 2 times: 0\.\d+ ", text)
    assert re.search(r"A pass over 6 pairs \(\d packs?\), 2 rounds in turns: forward passes alone \d", text)


@pytest.mark.slow
def test_a_start_is_measured_by_phase(tmp_path: Path) -> None:
    out = tmp_path / "startup.md"
    script = BENCHMARKS / "startup.py"
    done = subprocess.run(
        [sys.executable, script, "--pairs", "32", "--rounds", "1", "--out", str(out)],
        capture_output=True,
        text=True,
        env=cli.environment(),
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    medians = {name: [float(cell.split()[0]) for cell in cells] for name, *cells in rows if "(" in cells[0]}
    parts, total = list(medians)[:11], medians["to the end of the first step"]
    assert parts[-1] == "the rest"
    for column, whole in enumerate(total):
        assert sum(medians[name][column] for name in parts) == pytest.approx(whole, abs=0.01 * len(parts))
    for phase in ("imports", "loading the policy", "reference log-probs", "first step"):
        assert medians[phase][0] > 0, phase
    assert medians["imports"][1] > 1, "the processor's seconds"
    assert medians["reference log-probs"][3] < medians["reference log-probs"][1], "they are there the second time"
    assert max(medians[what][1] for what in list(medians)[12:]) < 0.7
