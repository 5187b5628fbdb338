"""What the benchmarks measure on: random models, pairs of given lengths, and the arithmetic they need.

Letters: p, a, b are the tokens of a pair's prompt, chosen and rejected response; T tokens, N scored tokens.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

PAD, EOS, UNKNOWN, FIRST_WORD = 0, 1, 2, 3  # token ids; every id from FIRST_WORD on is a word

Ids = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Lengths = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices."""
        kv = self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, kv),
            "v": (self.hidden, kv),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def body_parameters(self) -> int:
        """All but embeddings and head: the layers' matrices and norms, and the last norm."""
        matrices = sum(inputs * outputs for inputs, outputs in self.linears().values())
        return self.layers * (matrices + 2 * self.hidden) + self.hidden

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocabulary

    def config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )

    def __str__(self) -> str:
        return (
            f"{self.layers} layers x {self.hidden}, {self.heads} heads ({self.kv_heads} of keys and values), "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary:,}, embeddings "
            f"{'tied' if self.tied else 'not tied'} to the head"
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Pairs of one distribution of lengths, for one model."""

    name: str
    about: str
    shape: Shape
    lengths: Callable[[random.Random, float], Lengths]
    pairs: int  # a multiple of the global batch; fewer than the steps see, so that losses move
    longest: int  # tokens of prompt + response
    scale: float = 1.0  # of all lengths

    def draw(self, seed: int) -> list[Ids]:
        """The pairs' token ids; every response ends with EOS, and no two responses of a pair are equal."""
        rng = random.Random(f"{self.name} {seed}")

        def words(count: int) -> list[int]:
            return [rng.randrange(FIRST_WORD, self.shape.vocabulary) for _ in range(count)]

        found = []
        for _ in range(self.pairs):
            prompt, chosen, rejected = self.lengths(rng, self.scale)
            prompt = min(prompt, self.longest * 9 // 10)
            chosen, rejected = (max(3, min(n, self.longest - prompt)) for n in (chosen, rejected))
            found.append((words(prompt), [*words(chosen - 1), EOS], [*words(rejected - 1), EOS]))
        return found


# ------------------------------------------------------------------------------------------------------------ lengths


def chat_lengths(rng: random.Random, scale: float) -> Lengths:
    """The last answer to a conversation of one to six user turns.

    A prompt is its user turns (median 40 tokens, log-normal) and the answers between them (median 130); the two last
    answers have a median of 90. Over many pairs p + a + b is 0.60 of 2p + a + b.
    """

    def tokens(median: float, sigma: float) -> int:
        return max(3, round(scale * rng.lognormvariate(0.0, sigma) * median))

    earlier = rng.choices(range(6), weights=(4, 6, 6, 4, 2, 1))[0]
    prompt = sum(tokens(40, 0.7) + tokens(130, 0.6) for _ in range(earlier)) + tokens(40, 0.7)
    return prompt, tokens(90, 0.5), tokens(90, 0.5)


def long_answer_lengths(rng: random.Random, scale: float) -> Lengths:
    """Short conversations, long answers: the least that sharing a prompt can win. p + a + b is 0.77 of 2p + a + b."""

    def tokens(median: float, sigma: float) -> int:
        return max(3, round(scale * rng.lognormvariate(0.0, sigma) * median))

    return tokens(190, 0.9), tokens(300, 0.5), tokens(310, 0.5)


def around(prompt: int, response: int) -> Callable[[random.Random, float], Lengths]:
    """Lengths spread evenly from half to one and a half times these means."""

    def lengths(rng: random.Random, scale: float) -> Lengths:
        p, a, b = (round(scale * mean * rng.uniform(0.5, 1.5)) for mean in (prompt, response, response))
        return p, max(3, a), max(3, b)

    return lengths


def counts(pairs: Sequence[Ids]) -> dict[str, float]:
    """Means over pairs, and what sharing prompts leaves of the tokens."""
    prompt, chosen, rejected = (sum(len(pair[part]) for pair in pairs) for part in range(3))
    distinct, repeated = prompt + chosen + rejected, 2 * prompt + chosen + rejected
    return {
        "prompt": prompt / len(pairs),
        "chosen": chosen / len(pairs),
        "rejected": rejected / len(pairs),
        "longest": max(len(p) + max(len(a), len(b)) for p, a, b in pairs),
        "distinct_share": distinct / repeated,
        "scored_share": (chosen + rejected) / distinct,
        "distinct": distinct / len(pairs),
    }


def row_length(pair: Ids) -> int:
    """Tokens of the pair's longer row."""
    return len(pair[0]) + max(len(pair[1]), len(pair[2]))


# -------------------------------------------------------------------------------------------------------------- FLOPs


def visible_positions(pair: Ids) -> int:
    """(query, key) positions of causal attention if the prompt is there once and each response sees it and itself."""
    p, *responses = map(len, pair)
    return p * (p + 1) // 2 + sum(r * p + r * (r + 1) // 2 for r in responses)


def useful_flops(shape: Shape, pairs: Sequence[Ids], *, backward: bool = True) -> float:
    """FLOPs that these pairs need if every distinct token goes through the body; recomputation is not counted.

    It is the measure that trainers are compared by, not the least that is possible: open_po's last layer leaves out
    what nothing is predicted from, `skipped_flops`.

    Forward: 2 x body parameters x distinct tokens (p + a + b), 2 x head parameters x scored tokens (a + b), and for
    attention 4 x head_dim x heads x visible positions in every layer (two products, QK and AV). A training step is
    three times that: the backward pass has two products for each of the forward's.
    """
    distinct = sum(sum(map(len, pair)) for pair in pairs)
    scored = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)
    attention = 4 * shape.head_dim * shape.heads * shape.layers * sum(map(visible_positions, pairs))
    forward = 2.0 * shape.body_parameters * distinct + 2.0 * shape.head_parameters * scored + attention
    return forward * (3 if backward else 1)


def skipped_flops(shape: Shape, pairs: Sequence[Ids], *, backward: bool = True) -> float:
    """The part of `useful_flops` that open_po's last layer leaves out.

    Of a prompt's tokens but the last all but keys and values (their queries are computed forward, but are of no use),
    of a response's last token everything.
    """
    linears = {name: inputs * outputs for name, (inputs, outputs) in shape.linears().items()}
    forward = 0.0
    for prompt, *responses in pairs:
        context = len(prompt) - 1
        forward += 2.0 * context * sum(linears[name] for name in ("q", "o", "gate", "up", "down"))
        forward += 2.0 * len(responses) * sum(linears.values())
        visible = context * (context + 1) // 2 + sum(len(prompt) + len(response) for response in responses)
        forward += 4.0 * shape.head_dim * shape.heads * visible
    return forward * (3 if backward else 1)


def repeated_flops(shape: Shape, pairs: Sequence[Ids], *, score_prompts: bool) -> float:
    """FLOPs of a training step on the same pairs as rows [prompt | response] without padding.

    With `score_prompts` every position goes through the head, not only those of responses.
    """
    rows = [(len(prompt), len(response)) for prompt, *responses in pairs for response in responses]
    tokens = sum(prompt + response for prompt, response in rows)
    scored = tokens if score_prompts else sum(response for _, response in rows)
    visible = sum((prompt + response) * (prompt + response + 1) // 2 for prompt, response in rows)
    attention = 4 * shape.head_dim * shape.heads * shape.layers * visible
    return 3.0 * (2.0 * shape.body_parameters * tokens + 2.0 * shape.head_parameters * scored + attention)


# -------------------------------------------------------------------------------------------------------------- files


def write_pairs(pairs: Sequence[Ids], folder: Path) -> None:
    """`pairs.jsonl` as text for both trainers, and `ids.json`, the ids that both must make of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.jsonl", "w") as file:
        for prompt, chosen, rejected in pairs:
            texts = (" ".join(f"w{i}" for i in ids) for ids in (prompt, chosen[:-1], rejected[:-1]))
            text = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            text["chosen"], text["rejected"] = f" {text['chosen']}", f" {text['rejected']}"
            file.write(json.dumps(text) + "\n")
    (folder / "ids.json").write_text(json.dumps(pairs))


def build_model(shape: Shape, folder: Path, seed: int) -> None:
    """A random Llama in float32 and a tokenizer whose word `w123` is the id 123, in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}
    words |= {f"w{i}": i for i in range(FIRST_WORD, shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(shape.config()).save_pretrained(folder)


def build_command(shape: Shape, folder: Path, seed: int) -> list[str]:
    """Build the model in a process of its own, so that its memory is not counted as anybody's."""
    job: dict[str, Any] = {"shape": asdict(shape), "folder": str(folder), "seed": seed}
    return [sys.executable, __file__, json.dumps(job)]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    build_model(Shape(**request["shape"]), Path(request["folder"]), request["seed"])
