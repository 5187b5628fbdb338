"""The model card: what it says is what the run's files say, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt

import open_po.training.run
from open_po.config import load_config
from open_po.losses import LOSSES, NOTATION
from open_po.model_files import ModelSource
from open_po.output.card import write_card
from open_po.output.card_facts import BaseModel, CardFacts
from open_po.output.metrics import Metrics, read_metrics
from open_po.training.card_facts import base_model
from tests import cli, tiny

NAME = 'a "run": of | `ü` #1 <b>'
DATA = 'pa|ir "s": ü.jsonl'
TOKEN = "hf_" + "Ab1" * 10
SAID = MarkdownIt("commonmark").enable("table")


class Run(NamedTuple):
    """A finished run, and what its card was written from."""

    folder: Path
    words: list[str]
    facts: CardFacts
    records: Sequence[Metrics]

    def card(self, folder: Path, *, records: Sequence[Metrics] | None = None, **changes: Any) -> ModelCard:
        """The card, written into `folder` from other facts, and read by the Hub's own class."""
        write_card(folder, dataclasses.replace(self.facts, **changes), self.records if records is None else records)
        return ModelCard.load(folder / "README.md")


def finished(words: list[str], folder: Path) -> Run:
    caught: list[tuple[CardFacts, Sequence[Metrics]]] = []

    def write(target: Path, facts: CardFacts, records: Sequence[Metrics]) -> None:
        caught.append((facts, records))
        write_card(target, facts, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_po.training.run, "write_card", write)
        assert cli.main(words) == 0
    return Run(folder, words, *caught[0])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A mix of two losses on two files and held-out data, from a folder with a card of its own; awkward names."""
    folder = tmp_path_factory.mktemp("mixed")
    base = tiny.make_model_folder(folder / "ba|se")
    metadata = {"license": "other", "license_name": "own: one", "license_link": "LICENSE", "base_model": "org/a-base"}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# Base\n")
    rows = [*tiny.text_rows(9), {"prompt": "x", "chosen": " same", "rejected": " same"}]
    first = tiny.write_jsonl(folder / DATA, rows)
    second = tiny.write_jsonl(folder / "second.jsonl", tiny.text_rows(20, seed=5))
    held_out = tiny.write_jsonl(folder / "held out.jsonl", tiny.text_rows(5, seed=9))
    words = cli.arguments(
        base,
        first,
        folder / "run",
        mixer_list=[first, "1.0", second, "3"],
        eval_mixer_list=[held_out, "1.0"],
        eval_steps=2,
        exp_name=NAME,
        loss_type=["dpo_norm", "sft"],
        loss_weights=[1.0, 0.25],
        beta=["3", "null"],
        learning_rate=1e-3,
    )
    return finished(words, folder / "run")


@pytest.fixture(scope="module")
def adapted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Adapters, a chat template, a loss without a reference, no held-out data."""
    folder = tmp_path_factory.mktemp("adapted")
    data = tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(8))
    fields = {"use_lora": True, "lora_rank": 2, "chat_template_name": "tulu", "learning_rate": 1e-2}
    return finished(cli.arguments(llama, data, folder / "run", loss_type="simpo", **fields), folder / "run")


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a Markdown text, as cells without their markup."""
    rows: list[list[str]] = []
    for token in SAID.parse(text):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level > 2 and rows:
            rows[-1].append("".join(child.content for child in token.children or ()))
        elif token.type == "table_close":
            yield rows


def table(text: str, corner: str) -> dict[str, list[str]]:
    """The rows, by their first cells, of the one table with a head cell `corner`; the head is under ""."""
    (found,) = [rows for rows in tables(text) if corner in rows[0]]
    return {"": found[0][1:]} | {row[0]: row[1:] for row in found[1:]}


def blocks(text: str, language: str) -> str:
    """The only block of code in a language."""
    (found,) = [token.content for token in SAID.parse(text) if token.type == "fence" and token.info == language]
    return found


def test_the_metadata_is_the_runs(mixed: Run) -> None:
    metadata = metadata_load(mixed.folder / "README.md")
    last = cli.metrics(mixed.folder)[-1]
    assert last["training_step"] == 3
    results = metadata.pop("model-index")
    assert metadata == {
        "base_model": "org/a-base",
        "library_name": "transformers",
        "license": "other",
        "license_name": "own: one",
        "pipeline_tag": "text-generation",
        "tags": ["open_po", "preference-optimization", "dpo_norm", "sft"],
    }
    ((index,), name) = results[0]["results"], results[0]["name"]
    assert name == NAME
    assert index["task"]["type"] == "text-generation"
    assert index["dataset"] == {"name": "held out.jsonl", "type": "held_out.jsonl"}
    assert {metric["type"]: metric["value"] for metric in index["metrics"]} == {
        "accuracy": last["eval/rewards/accuracy"],
        "reward_margin": last["eval/rewards/margin"],
        "loss": last["eval/loss"],
    }
    card = ModelCard.load(mixed.folder / "README.md")
    assert card.data.model_name == NAME
    assert {result.metric_value for result in card.data.eval_results} == {m["value"] for m in index["metrics"]}


def test_the_tables_are_the_runs(mixed: Run) -> None:
    text = ModelCard.load(mixed.folder / "README.md").text
    records = cli.metrics(mixed.folder)
    before, after = records[0], records[-1]
    training = cli.steps(mixed.folder)[-1]
    figures = table(text, "training, step 3")
    assert figures[""] == ["training, step 3", "held out, step 0", "held out, step 3"]
    shown = {"reward margin": "rewards/margin", "log-prob of a chosen response": "logps/chosen"}
    shown |= {"loss of dpo_norm": "loss/dpo_norm", "loss of sft": "loss/sft"}
    for label, name in shown.items():
        values = [training[name], before[f"eval/{name}"], after[f"eval/{name}"]]
        assert [float(cell) for cell in figures[label]] == pytest.approx(values, rel=1e-3, abs=1e-9)
    accuracy = [float(cell.rstrip("%")) / 100 for cell in figures["reward accuracy"]]
    expected = [training["rewards/accuracy"], before["eval/rewards/accuracy"], after["eval/rewards/accuracy"]]
    assert accuracy == pytest.approx(expected, abs=5.1e-4)
    exact = [rows for rows in tables(text) if rows[0] == ["name", "value"]]
    assert [{name: float(value) for name, value in rows[1:]} for rows in exact] == [training, after]
    data = next(rows for rows in tables(text) if "data set" in rows[0])
    assert data[1:] == [
        ["training", DATA, "train", "all", "9"],
        ["training", "second.jsonl", "train", "3", "3"],
        ["held out", "held out.jsonl", "train", "all", "5"],
    ]
    assert "Training: rows left out: 1, " in text
    assert cli.summary(mixed.folder)["data"]["by_source"] == {
        str(mixed.folder.parent / DATA): 9,
        str(mixed.folder.parent / "second.jsonl"): 3,
    }
    assert table(text, "field")["learning_rate"] == ["0.001"]
    assert "beta" not in table(text, "field")
    run = table(text, "what")
    (key,) = [path.parent.name for path in mixed.folder.parent.glob("reference/*/manifest.json")]
    assert key in run["reference"][0]
    assert run["steps"] == ["3 of 3, of 4 pairs each"]
    assert cli.summary(mixed.folder)["train"]["tokens"] == int(run["seen"][0].split()[2].replace(",", ""))
    assert table(text, "package")["torch"] == [torch.__version__]


def test_the_loss_has_its_formula_and_parameters(mixed: Run) -> None:
    text = ModelCard.load(mixed.folder / "README.md").text
    assert f"- 1 x `dpo_norm`: {LOSSES['dpo_norm'].formula}; with `beta` 3, `label_smoothing` 0;" in text
    assert f"- 0.25 x `sft`: {LOSSES['sft'].formula}; with `convention` token_mean;" in text
    assert NOTATION in text


def test_awkward_names_are_shown_as_they_are(mixed: Run) -> None:
    heading = next(token for token in SAID.parse(ModelCard.load(mixed.folder / "README.md").text) if token.children)
    assert "".join(child.content for child in heading.children or ()) == NAME
    text = (mixed.folder / "README.md").read_text()
    assert "`ba|se`" in text
    assert "(training_curves.png)" in text
    assert (mixed.folder / "training_curves.png").is_file()


@pytest.mark.parametrize("name", ["mixed", "adapted"])
def test_the_command_and_the_configuration_are_the_runs_without_folders(
    name: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    text = ModelCard.load(run.folder / "README.md").text
    cut = [re.sub("^/.*/", ".../", word) for word in run.words]
    assert cut != run.words
    assert shlex.split(blocks(text, "bash")) == ["python", "dpo_tune_cache.py", *cut]
    shown, written = yaml.safe_load(blocks(text, "yaml")), yaml.safe_load((run.folder / "config.yaml").read_text())
    paths = {"model_name_or_path", "mixer_list", "eval_mixer_list", "output_dir", "reference_cache_dir"}
    assert {key: shown[key] for key in shown if key not in paths} == {
        key: written[key] for key in written if key not in paths
    }
    assert shown["output_dir"] == ".../run"
    for path in [run.folder / "README.md", *run.folder.glob("adapter/README.md")]:
        for folder in (run.folder.parent, run.folder.parent.parent, Path.home(), cli.REPOSITORY):
            assert str(folder) not in path.read_text()


def test_paths_within_a_word_are_cut_and_those_below_here_are_kept(mixed: Run, tmp_path: Path) -> None:
    words = ["~/runs/my.yaml", "--dataset_mixer={/data/alice/a b.jsonl: 1.0}", "--output_dir=output/x", "--exp_name=y"]
    words.append("--reference_cache_dir=../alice/cache")
    config = load_config(["--model_name_or_path", "/models/alice/m", *words[1:]])
    command = shlex.split(blocks(mixed.card(tmp_path, config=config, command=words).text, "bash"))[2:]
    assert command == [
        ".../my.yaml",
        "--dataset_mixer={.../a b.jsonl: 1.0}",
        "--output_dir=output/x",
        "--exp_name=y",
        "--reference_cache_dir=.../cache",
    ]
    assert "alice" not in (tmp_path / "README.md").read_text()


def test_no_token_gets_into_a_card(mixed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd-token-of-mine")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    words = ["--exp_name", f"x {TOKEN} odd-token-of-mine 0123456789abcdef"]
    words += ["--mixer_list", "https://me:letmein@host/pairs.jsonl", "1.0"]
    config = load_config(["--model_name_or_path", "m", *words])
    assert TOKEN in config.to_yaml()
    card = mixed.card(tmp_path, config=config, command=words)
    text = (tmp_path / "README.md").read_text()
    for secret in (TOKEN, "odd-token-of-mine", "0123456789abcdef", "letmein"):
        assert secret not in text
    assert card.text.startswith("\n# x (hidden) (hidden) (hidden)\n")


def test_names_of_the_hub_are_in_the_metadata(mixed: Run, tmp_path: Path) -> None:
    words = ["--model_name_or_path", "org/base", "--mixer_list", "org/one", "0.5", "x.jsonl", "7", "org/one", "9"]
    words += ["--mixer_list_splits", "train[:50%]", "train", "train[50%:]"]
    config = load_config([*words, "--eval_mixer_list", "org/two", "1.0", "--eval_mixer_list_splits", "test"])
    result = mixed.facts.result
    data = dataclasses.replace(result.data, by_source={"org/one": 20, "x.jsonl": 7})
    assert mixed.facts.held_out is not None
    card = mixed.card(
        tmp_path,
        config=config,
        result=dataclasses.replace(result, data=data),
        held_out=dataclasses.replace(mixed.facts.held_out, by_source={"org/two": 5}),
        base=BaseModel(name="org/base", hub_name="org/base", license={"license": "apache-2.0"}),
        hub_datasets={"org/one", "org/two"},
        repository="me/model",
        revision="a run",
    )
    metadata = card.data.to_dict()
    assert (metadata["base_model"], metadata["datasets"], metadata["license"]) == (
        "org/base",
        ["org/one"],
        "apache-2.0",
    )
    dataset = metadata["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "org/two", "type": "org/two", "split": "test"}
    (rows,) = [rows for rows in tables(card.text) if "data set" in rows[0]]
    assert rows[1] == ["training", "org/one", "train[:50%], train[50%:]", "0.5 of all, 9", "20"]
    assert 'from_pretrained(name, revision="a run")' in blocks(card.text, "python")
    assert 'name = "me/model"' in blocks(card.text, "python")


def test_a_checkpoint_has_the_figures_of_its_step(mixed: Run, tmp_path: Path) -> None:
    records = [record for record in read_metrics(mixed.folder / "metrics.jsonl") if record["training_step"] <= 2]
    result = mixed.facts.result
    at_two = dataclasses.replace(result, train=dataclasses.replace(result.train, steps=2))
    (tmp_path / "two").mkdir()
    card = mixed.card(tmp_path / "two", records=records, result=at_two)
    assert card.data.eval_results[0].metric_value == records[-1]["eval/rewards/accuracy"]
    assert "step 2 of 3" in card.text
    assert table(card.text, "training, step 2")[""][-1] == "held out, step 2"
    assert (tmp_path / "two" / "training_curves.png").read_bytes() != (
        mixed.folder / "training_curves.png"
    ).read_bytes()
    # Between two evaluations the last one is shown with its step, and is no result of this model's.
    early = [record for record in records if record["training_step"] < 2]
    at_one = dataclasses.replace(result, train=dataclasses.replace(result.train, steps=1))
    card = mixed.card(tmp_path, records=early, result=at_one)
    assert "model-index" not in card.data.to_dict()
    assert table(card.text, "training, step 1")[""] == ["training, step 1", "held out, step 0"]


def test_without_evaluation_and_reference(adapted: Run) -> None:
    card = ModelCard.load(adapted.folder / "README.md")
    assert "model-index" not in card.data.to_dict()
    assert "base_model" not in card.data.to_dict()
    assert "The run had no held-out data." in card.text
    assert table(card.text, "what")["reference"] == ["none, the loss needs none"]
    assert card.data.tags == ["open_po", "preference-optimization", "simpo", "lora"]


@pytest.mark.parametrize("place", [".", "adapter"])
def test_what_the_card_says_of_loading_works(
    place: str,
    adapted: Run,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = ModelCard.load(adapted.folder / place / "README.md")
    assert card.data.library_name == ("transformers" if place == "." else "peft")
    picture = re.search(r"!\[.*\]\((.*)\)", card.text)
    assert picture is not None
    assert (adapted.folder / place / picture[1]).is_file()
    for folder in (adapted.folder, llama):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks(card.text, "python"), names)
    assert "<|user|>" in capsys.readouterr().out
    model = names["model"] if place == "." else names["model"].merge_and_unload()
    saved = cli.weights(adapted.folder)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, saved[name], rtol=1e-5, atol=1e-6)
    assert cli.distance(saved, cli.weights(llama)) > 0.05


def test_adapters_alone_get_a_card_of_adapters(adapted: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    words = ["--model_name_or_path", "org/base", "--model_revision", "v1", "--mixer_list", "org/one", "1.0"]
    base = BaseModel(name="org/base", hub_name="org/base", license={})
    card = adapted.card(tmp_path, repository="me/adapters", config=load_config(words), base=base)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "org/base"
    assert 'from_pretrained("org/base", revision="v1")' in blocks(card.text, "python")
    assert "PeftModel.from_pretrained(base, name)" in blocks(card.text, "python")
    assert "(training_curves.png)" in card.text


def test_the_base_model_is_what_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tiny.make_model_folder(tmp_path / "local")
    config = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps(config | {"_name_or_path": "output/sft"}))
    plain = ModelSource(name=str(local))
    assert base_model(plain) == BaseModel(name="local", hub_name=None, license={})
    for content in ("", "---\n: [\n---\n", "---\n- a\n---\n", "---\nbase_model: /home/me/x\nlicense: [a]\n---\n"):
        (local / "README.md").write_text(content)
        assert base_model(plain) == BaseModel(name="local", hub_name=None, license={}), content
    (local / "README.md").write_text("---\nbase_model: [org/a]\nlicense: mit\n---\n")
    assert base_model(plain) == BaseModel(name="local", hub_name="org/a", license={"license": "mit"})
    monkeypatch.setattr(ModelSource, "folder", lambda self: local)
    assert base_model(ModelSource(name="org/model")) == BaseModel(
        name="org/model", hub_name="org/model", license={"license": "mit"}
    )


def test_a_loss_of_ones_own_is_shown_as_it_describes_itself(
    mixed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card_losses.py").write_text('def own(policy, *, width=2.0):\n    """log | of `a`.\n\n    More."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model_name_or_path", "m", "--mixer_list", "a.jsonl", "1.0", "--loss_type", "card_losses:own"]
    card = mixed.card(tmp_path, config=load_config(words))
    assert "- `card_losses:own`: ``log | of `a`.``; with `width` 2." in card.text
    assert NOTATION not in card.text
    assert card.data.tags == ["open_po", "preference-optimization"]
    words[-1] = "f_dpo"
    text = mixed.card(tmp_path, config=load_config([*words, "--f_divergence_type", "forward_kl"])).text
    assert "`g(x) = 1 - exp(-x)`" in text
