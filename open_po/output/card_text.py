"""What a person reads on a model card, section by section."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence

import yaml
from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME as HUB

from open_po.config import FIELDS, FOUR_BIT
from open_po.losses import DIVERGENCES, LOSSES, NOTATION, Loss, Value
from open_po.output import markdown
from open_po.output.card_facts import CardFacts, Place
from open_po.output.metrics import (
    CHOSEN_LOGPS,
    HELD_OUT,
    LOSS,
    REJECTED_LOGPS,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    STEP,
    TRAIN_LOSS,
    Metrics,
    evaluations,
)
from open_po.output.private import command_without_folders, without_folders
from open_po.output.summary import DataTotals

_FIGURES = {
    LOSS: "loss",
    REWARD_ACCURACY: "reward accuracy",
    REWARD_MARGIN: "reward margin",
    CHOSEN_LOGPS: "log-prob of a chosen response",
    REJECTED_LOGPS: "log-prob of a rejected response",
}
# Told elsewhere on the card.
_NO_SETTINGS = ("model_name_or_path", "mixer_list", "mixer_list_splits", "mixture", "reference_model_name_or_path")


def card_text(facts: CardFacts, records: Sequence[Metrics], place: Place) -> str:
    """The card below its metadata."""
    name = markdown.plain(facts.config.output.exp_name) + (", adapters" if place.is_adapter else "")
    parts = [
        f"# {name}",
        _introduction(facts),
        _figures(facts, records),
        "" if place.curves is None else f"![Curves of training and of held-out data]({place.curves})",
        f"## How to load it\n\n{_loading(facts, place)}",
        f"## Data\n\n{_data(facts)}",
        f"## Loss\n\n{_loss(facts)}",
        f"## Settings\n\n{_settings(facts)}",
        f"## Run\n\n{_run(facts)}",
        *_details(facts, records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(facts: CardFacts) -> str:
    train = facts.result.train
    pairs = facts.result.data.pairs
    paired = facts.config.loss.mix().needs_rejected
    data = f"{pairs:,} preference pairs" if paired else f"the chosen responses of {pairs:,} rows"
    whole = f"[{markdown.plain(facts.base.name)}]({HUB}{facts.base.hub_name})"
    base = whole if facts.base.name == facts.base.hub_name else markdown.code(facts.base.name)
    if facts.base.name == facts.base.hub_name and facts.config.model.model_revision is not None:
        base += f" (revision {markdown.code(facts.config.model.model_revision)})"
    said = f"{base}, trained on {data} with {' + '.join(map(markdown.code, facts.config.loss.names))} by open_po"
    if facts.config.model.use_lora:
        said += ", as LoRA adapters" + ("" if facts.is_final else " so far")
    if facts.base.hub_name not in (None, facts.base.name):
        said += (
            f". The card of {markdown.code(facts.base.name)} names {markdown.code(str(facts.base.hub_name))} as base"
        )
    step = f"its last step, {train.steps:,}" if facts.is_final else f"step {train.steps:,} of {facts.steps:,}"
    return f"{said}. This is the model of {step}."


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(facts: CardFacts, records: Sequence[Metrics]) -> str:
    """Training's last figures beside the first and the last of the held-out data."""
    columns: dict[str, Metrics] = {}
    if training := _training(records):
        columns[f"training, step {int(training[STEP]):,}"] = {**training, LOSS: training[TRAIN_LOSS]}
    held_out = evaluations(records)
    for record in [*held_out[:1], *held_out[1:][-1:]]:
        columns[f"held out, step {int(record[STEP]):,}"] = record
    parts = dict.fromkeys(name for record in columns.values() for name in record if name.startswith(f"{LOSS}/"))
    of_parts = {name: f"loss of {markdown.code(name.removeprefix(f'{LOSS}/'))}" for name in parts}
    names = {LOSS: _FIGURES[LOSS], **of_parts, **_FIGURES}
    rows = [
        [said, *(_figure(name, record) for record in columns.values())]
        for name, said in names.items()
        if any(name in record for record in columns.values())
    ]
    if not rows:
        return ""
    note = "" if held_out else "\n\nThe run had no held-out data."
    return markdown.table(["", *columns], rows, right=len(columns)) + note


def _training(records: Sequence[Metrics]) -> Metrics:
    """The last record of training; empty if there is none."""
    return next((record for record in reversed(records) if TRAIN_LOSS in record), {})


def _figure(name: str, record: Metrics) -> str:
    if name not in record:
        return ""
    return f"{record[name]:.1%}" if name == REWARD_ACCURACY else f"{record[name]:.4g}"


# -------------------------------------------------------------------------------------------------------------- loading


def _loading(facts: CardFacts, place: Place) -> str:
    where = json.dumps(facts.repository or facts.folder, ensure_ascii=False)
    more = _revision(facts.revision if facts.repository else None)
    trust = ", trust_remote_code=True" if facts.config.model.trust_remote_code else ""
    model: list[str] = []
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    inside = ""
    if place.is_adapter:
        imports.insert(0, "from peft import PeftModel")
        inside = "" if place.subfolder is None else f', subfolder="{place.subfolder}"'
        whole, revision = facts.adapters_on or (facts.base.name, facts.config.model.model_revision)
        base, of_base = json.dumps(whole, ensure_ascii=False), _revision(revision)
        if facts.config.model.use_qlora:  # on whole weights the adapters score differently than they did in training
            imports[-1] += ", BitsAndBytesConfig"
            settings = ", ".join(f"{name}={value!r}" for name, value in FOUR_BIT.items())
            compute = facts.result.numerics["compute_dtype"]
            of_base += f', quantization_config=four_bit, dtype="{compute}"'
            model = [f'four_bit = BitsAndBytesConfig({settings}, bnb_4bit_compute_dtype="{compute}")']
        model += [
            f"base = AutoModelForCausalLM.from_pretrained({base}{of_base}{trust})",
            f"model = PeftModel.from_pretrained(base, name{inside}{more})",
        ]
    else:
        model = [f"model = AutoModelForCausalLM.from_pretrained(name{more}{trust})"]
    lines = [*imports, "", f"name = {where}", f"tokenizer = AutoTokenizer.from_pretrained(name{more}{trust})", *model]
    if facts.has_chat_template:
        lines += [
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("The sky is", return_tensors="pt")')
    lines += [
        'answer = model.generate(inputs["input_ids"], max_new_tokens=100)',
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
    ]
    return markdown.block("\n".join(lines), "python")


def _revision(name: str | None) -> str:
    return "" if name is None else f", revision={json.dumps(name, ensure_ascii=False)}"


# ------------------------------------------------------------------------------------------------------- data and loss


def _data(facts: CardFacts) -> str:
    data = facts.config.data
    rows = []
    for part_of, mixture, totals in (
        ("training", data.training_mixture, facts.result.data),
        ("held out", data.held_out_mixture, facts.held_out),
    ):
        for name, pairs in totals.by_source.items() if totals is not None else ():
            parts = [part for part in mixture if part.dataset == name]
            asked = ", ".join(_amount(part.amount) for part in parts)
            splits = ", ".join(part.split for part in parts)
            shown = markdown.code(facts.data_name(name))
            if name in facts.hub_datasets:
                shown = f"[{markdown.plain(name)}]({HUB}datasets/{name})"
            rows.append([part_of, shown, markdown.code(splits), asked, f"{pairs:,}"])
    lines = [markdown.table(["", "data set", "split", "rows asked for", "pairs used"], rows, right=1)]
    lines += [f"{what}: {said}." for what, totals in _totals(facts) if (said := "; ".join(_losses_of_rows(totals)))]
    return "\n\n".join(lines)


def _totals(facts: CardFacts) -> list[tuple[str, DataTotals]]:
    training = [("Training", facts.result.data)]
    return training if facts.held_out is None else [*training, ("Held out", facts.held_out)]


def _amount(amount: int | float) -> str:
    if isinstance(amount, int):
        return f"{amount:,}"
    return "all" if amount == 1 else f"{amount:.4g} of all"


def _losses_of_rows(totals: DataTotals) -> Iterator[str]:
    """What became of rows that are not trained on as they are."""
    for reason, count in totals.left_out.items():
        yield f"rows left out: {count:,}, {markdown.plain(reason)}"
    if totals.truncated_prompts or totals.truncated_responses:
        yield f"cut to length: {totals.truncated_prompts:,} prompts, responses of {totals.truncated_responses:,} pairs"


def _loss(facts: CardFacts) -> str:
    loss, mix = facts.config.loss, facts.config.loss.mix()
    single = len(mix.parts) == 1
    lines = [_one_loss(part, single) for part in mix.parts]
    if not single:
        lines.insert(0, "A weighted sum; each part is divided by its own count, of pairs or of tokens.\n")
    if mix.ld_alpha != 1.0:
        lines.append(f"- LD-DPO: `ld_alpha` {mix.ld_alpha:g} weighs a longer response's tokens in every log-prob.")
    if loss.load_balancing_loss:
        lines.append(f"- Plus {loss.load_balancing_weight:g} x the load balancing loss of the experts.")
    if any(part.spec.name in LOSSES for part in mix.parts):
        lines.append(f"\nLetters: {NOTATION}")
    return "\n".join(lines)


def _one_loss(loss: Loss, single: bool) -> str:
    spec = loss.spec
    weight = "" if single else f"{loss.weight:g} x "
    described = spec.formula if spec.name in LOSSES else markdown.code(spec.formula)
    said = [f"- {weight}{markdown.code(spec.name)}: {described or 'a loss of its own'}"]
    if values := ", ".join(f"`{name}` {_value(value)}" for name, value in loss.parameters.items()):
        said.append(f"with {values}")
    divergence = loss.parameters.get("f_divergence_type")
    if divergence is not None and (divergence != "reverse_kl" or "g(" in spec.formula):
        alpha = ", `alpha` its coefficient" if divergence == "alpha_divergence" else ""
        said.append(f"`D` is `g(a) - g(d)`, `g(x) = {DIVERGENCES[str(divergence)]}`{alpha}")
    said += [f"rewards {spec.rewards}"] * bool(spec.rewards) + [f"paper {spec.paper}"] * bool(spec.paper)
    return "; ".join(said) + "."


def _value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------- settings and the run


def _settings(facts: CardFacts) -> str:
    """What shapes the result and is not as it is by default; the loss's own are with the loss."""
    rows = []
    for name, value in facts.config.result_fields().items():
        field = FIELDS[name]
        if field.section != "loss" and name not in _NO_SETTINGS and value not in (field.default, None):
            shown = " ".join(map(str, value)) if isinstance(value, list) else _value(without_folders(value))
            rows.append([f"`{name}`", markdown.code(shown)])
    if not rows:
        return "All as they are by default."
    return (
        markdown.table(["field", "value"], rows) + "\n\nAll other fields that shape the result are at their defaults."
    )


def _run(facts: CardFacts) -> str:
    train = facts.result.train
    processes = facts.result.run.processes
    numerics = facts.result.numerics
    rows = [
        ["steps", f"{train.steps:,} of {facts.steps:,}, of {facts.global_batch:,} pairs each"],
        ["seen", f"{train.pairs:,} pairs, {train.tokens:,} tokens, {train.response_tokens:,} of them scored"],
        ["time", f"{_duration(train.seconds)} of training steps{_reference_time(facts)}"],
        ["reference", _reference(facts)],
        ["hardware", f"{markdown.plain(facts.hardware)}; {processes} process{'es' if processes > 1 else ''}"],
        ["peak memory", f"{facts.result.peak_memory_bytes / 1e9:.2f} GB"],
        ["precision", f"{numerics['compute_dtype']}, weights in {numerics['weights_dtype']}{_four_bit(facts)}"],
        ["layout", f"`{train.layout}`, engine `{facts.parallel}`"],
    ]
    words = shlex.join(["python", "dpo_tune_cache.py", *command_without_folders(facts.command, facts.config)])
    started = "" if processes == 1 else f", by {processes} processes of a launcher,"
    return f"{markdown.table(['what', 'value'], rows)}\n\nStarted{started} as\n\n{markdown.block(words, 'bash')}"


def _four_bit(facts: CardFacts) -> str:
    if not facts.config.model.use_qlora:
        return ""
    return ", those of linear layers in 4 bits; a merged model has what they stand for"


def _reference(facts: CardFacts) -> str:
    if facts.reference_key is None:
        return "none, the loss needs none"
    other = facts.reference_name
    name = "the weights before the first step" if other is None else markdown.code(other)
    return f"{name}; key of its log-probs {markdown.code(facts.reference_key)}"


def _reference_time(facts: CardFacts) -> str:
    reference = facts.result.reference
    if reference is None:
        return ""
    if not reference.pairs_computed:
        return "; reference log-probs were in the cache"
    return f", {_duration(reference.seconds)} for reference log-probs"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _details(facts: CardFacts, records: Sequence[Metrics]) -> Iterator[str]:
    """What few will read: every figure of the last step, versions, and the whole configuration."""
    held_out = next((record for record in reversed(records) if HELD_OUT + LOSS in record), {})
    for what, record in (("training", _training(records)), ("held-out data", held_out)):
        if record:
            rows = [[markdown.code(name), repr(value)] for name, value in record.items()]
            yield markdown.folded(f"All last figures of {what}", markdown.table(["name", "value"], rows, right=1))
    versions = [[name, markdown.plain(version)] for name, version in facts.result.versions.items()]
    yield markdown.folded("Versions", markdown.table(["package", "version"], versions))
    config = without_folders(yaml.safe_load(facts.config.to_yaml()))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    yield markdown.folded("Whole configuration", markdown.block(text, "yaml"))
