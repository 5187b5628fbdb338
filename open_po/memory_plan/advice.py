"""What to change where a run does not fit: each change is planned anew, so what it saves is counted, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from open_po.memory_plan.plan import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class Change:
    """A field with another value, and what it costs."""

    fields: dict[str, Any]
    slower: float  # share of a step's time that it adds, roughly
    reason: str  # of that
    several_ranks: bool = False
    another_training: bool = False  # it trains something else than all weights


CHANGES = (
    Change(fields={"optimizer_in_backward": "on"}, slower=0.0, reason="the same work in another order"),
    Change(
        fields={"weights_dtype": "bfloat16", "optimizer": "adamw_kahan"},
        slower=0.0,
        reason="fewer bytes to move; compensated, so that small updates count",
    ),
    Change(fields={"optimizer": "adamw_8bit"}, slower=0.02, reason="states are unpacked at each update"),
    Change(fields={"gradient_checkpointing": True}, slower=0.33, reason="one more forward pass of three"),
    Change(
        fields={"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
        slower=0.17,
        reason="one more forward pass, of every second layer",
    ),
    Change(fields={"offload_activations": True}, slower=0.15, reason="activations go to the host and back"),
    Change(fields={"mlp_tile_tokens": 2048}, slower=0.05, reason="smaller products"),
    Change(fields={"offload_optimizer": True}, slower=0.3, reason="the host updates, gradients go there"),
    Change(fields={"parallel": "zero1"}, slower=0.05, reason="weights are sent after each update", several_ranks=True),
    Change(fields={"parallel": "fsdp"}, slower=0.1, reason="weights are gathered for each pack", several_ranks=True),
    Change(fields={"use_lora": True}, slower=0.0, reason="trains adapters, not the weights", another_training=True),
    Change(
        fields={"use_lora": True, "use_qlora": True},
        slower=0.3,
        reason="4-bit weights are unpacked for each product; trains adapters",
        another_training=True,
    ),
)

# What is tried where no single change is enough.
TOGETHER = (
    Change(
        fields={"optimizer": "adamw_8bit", "gradient_checkpointing": True},
        slower=0.35,
        reason="one more forward pass of three; states are unpacked at each update",
    ),
    Change(
        fields={"gradient_checkpointing": True, "offload_optimizer": True},
        slower=0.6,
        reason="one more forward pass of three; the host updates, gradients go there",
    ),
    Change(
        fields={"use_lora": True, "gradient_checkpointing": True},
        slower=0.33,
        reason="one more forward pass of three; trains adapters, not the weights",
        another_training=True,
    ),
    Change(
        fields={"use_lora": True, "use_qlora": True, "gradient_checkpointing": True},
        slower=0.6,
        reason="one more forward pass of three; 4-bit weights are unpacked for each product; trains adapters",
        another_training=True,
    ),
)


@dataclass(frozen=True)
class Advice:
    """A change that saves memory."""

    change: Change
    plan: MemoryPlan  # with it
    saved: float  # bytes

    @property
    def words(self) -> str:
        """A line for each field."""
        return "\n".join(f"{name}: {str(value).lower()}" for name, value in self.change.fields.items())


def advice(
    now: MemoryPlan, values: dict[str, Any], replan: Callable[[Change], MemoryPlan | None], ranks: int, room: float
) -> list[Advice]:
    """Changes that save a hundredth of the plan or more: what fits first, then most bytes for the time they cost.

    Where none of them alone makes the plan fit into `room` (bytes), several together are among them. `values` are those
    of all fields; `replan` gives the plan after a change, or None where it cannot be made.
    """

    def tried(changes: Iterable[Change]) -> Iterator[Advice]:
        for change in changes:
            plan = replan(change)
            if plan is not None and now.peak - plan.peak >= 0.01 * now.peak:
                yield Advice(change, plan, now.peak - plan.peak)

    found = list(tried((*_smaller_packs(now), *_open(CHANGES, values, ranks))))
    if not any(item.plan.fits(room) for item in found):
        found += tried(_open(TOGETHER, values, ranks))

    def rank(item: Advice) -> tuple[bool, bool, float]:
        return not item.plan.fits(room), item.change.another_training, -item.saved / (item.change.slower + 0.02)

    return sorted(found, key=rank)


def _smaller_packs(now: MemoryPlan) -> Iterator[Change]:
    """The budget of one typical pair, below which packs do not get smaller."""
    least = now.shape.pair_tokens
    if least < now.shape.max_tokens:
        reason = "smaller packs: more passes over the weights"
        yield Change(fields={"max_tokens_per_batch": least}, slower=0.1, reason=reason)


def _open(changes: Iterable[Change], values: dict[str, Any], ranks: int) -> Iterator[Change]:
    """Those that would change something."""
    for change in changes:
        possible = ranks > 1 or not change.several_ranks
        if possible and any(values[name] != value for name, value in change.fields.items()):
            yield change
