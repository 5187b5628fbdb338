"""Which tokens of a pair are scored where that is not simply its responses: all of the assistant's turns.

A turn is what the assistant adds to the rendered conversation: the tokens behind the generation prompt, up to and with
what the template ends an answer with. So open-instruct's preference transform has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from open_po.data.formats import Message, RowError, common_prefix_length

Runs = tuple[tuple[int, int], ...]  # of tokens, each from its first to behind its last, in order and apart


class Turns(NamedTuple):
    """What of a pair is scored besides its responses, and what of these is not."""

    prompt: Runs = ()  # scored
    chosen: Runs = ()  # not scored
    rejected: Runs = ()  # not scored

    def flat(self) -> list[list[int]]:
        """The ends of the runs, as lists."""
        return [[end for run in runs for end in run] for runs in self]

    @staticmethod
    def of(flat: Sequence[Sequence[int]]) -> Turns:
        """The turns that `flat` gives back."""
        return Turns(*(tuple(zip(ends[::2], ends[1::2], strict=True)) for ends in flat))


RESPONSES = Turns()  # what is scored is the responses


def within(runs: Runs, start: int, end: int, *, counted_from: int) -> Runs:
    """What of `runs` lies between `start` and `end`, its places counted from `counted_from` on."""
    cut = ((max(first, start), min(behind, end)) for first, behind in runs)
    return tuple((first - counted_from, behind - counted_from) for first, behind in cut if first < behind)


def tokens_in(runs: Runs) -> int:
    """How many tokens `runs` hold."""
    return sum(behind - first for first, behind in runs)


class _Place(NamedTuple):
    """A place in a rendered conversation."""

    character: int
    token: int


@dataclass(frozen=True)
class Conversation:
    """A prompt's messages and an answer's, as text and as tokens, and what made these."""

    messages: Sequence[Message]
    text: str
    ids: Sequence[int]
    render: Callable[[Sequence[Message], bool], str]  # of messages, with or without a generation prompt behind them
    encode: Callable[[str], list[int]]

    def assistant_turns(self, answer: int, boundary: int, *, earlier: bool) -> Runs:
        """The tokens of the assistant's turns, those before the answer only if `earlier`.

        The answer's messages are those from `answer` on, and its tokens those from `boundary` on. Raises RowError where
        the template does not let an earlier turn be told.
        """
        runs: list[tuple[int, int]] = []
        first = 0 if earlier else answer
        end = _Place(0, 0 if earlier else boundary)
        for number in range(first, len(self.messages)):
            if self.messages[number]["role"] != "assistant":
                continue
            if number == first or self.messages[number - 1]["role"] == "assistant":
                start = end  # nobody else spoke in between
            elif number == answer:
                start = _Place(0, boundary)
            else:
                start = self._start(number)
            end = self._end(number, start)
            if runs and runs[-1][1] == start.token:
                start = _Place(0, runs.pop()[0])
            runs.append((start.token, end.token))
        return tuple(runs)

    def _start(self, number: int) -> _Place:
        """Where the turn begins that message `number` is: behind the generation prompt."""
        opening = self.render(self.messages[:number], True)
        shared = _shared(self.text, opening)
        # Some templates render the last of the user's turns otherwise, with the system prompt in it for example.
        before = (self.messages[number - 1].get("content") or "").strip()
        place = opening.rfind(before)
        if shared < (len(opening) if place < 0 else place + len(before)):
            raise self._untold(number)
        return _Place(shared, common_prefix_length(self.ids, self.encode(opening)))

    def _end(self, number: int, start: _Place) -> _Place:
        if number == len(self.messages) - 1:
            return _Place(len(self.text), len(self.ids))
        ended = self.render(self.messages[: number + 1], False)
        stop = len(ended) if self.text.startswith(ended) else self._behind_content(number, start, ended)
        return _Place(stop, common_prefix_length(self.ids, self.encode(self.text[:stop])))

    def _behind_content(self, number: int, start: _Place, ended: str) -> int:
        """Where a turn ends that is rendered otherwise when it is the last, with room for thoughts for example.

        That is behind its content and what stands behind an answer, as `ended` has it, the conversation up to there.
        """
        content = (self.messages[number].get("content") or "").strip()
        here, there = self.text.find(content, start.character), ended.rfind(content)
        if not content or here < 0 or there < 0:
            raise self._untold(number)
        behind = here + len(content)
        return behind + _shared(self.text[behind:], ended[there + len(content) :])

    def _untold(self, number: int) -> RowError:
        return RowError(
            f"has an assistant's turn, message {number + 1}, that the chat template renders otherwise when it is the "
            "last one, so that its tokens cannot be told; use scored_turns last or another chat_template_name"
        )


def all_turns(answer: int, boundary: int, chosen: Conversation, rejected: Conversation | None = None) -> Turns:
    """Every turn of the assistant. Raises RowError.

    The prompt's messages end at `answer` and its tokens at `boundary`, in both conversations.
    """
    with_earlier = chosen.assistant_turns(answer, boundary, earlier=True)
    of_rejected: Runs = ()
    if rejected is not None:
        runs = rejected.assistant_turns(answer, boundary, earlier=False)
        of_rejected = tuple(_rest(runs, boundary, len(rejected.ids)))
    return Turns(
        prompt=within(with_earlier, 1, boundary, counted_from=0),  # a prompt's first token is predicted by nothing
        chosen=tuple(_rest(with_earlier, boundary, len(chosen.ids))),
        rejected=of_rejected,
    )


def _rest(runs: Runs, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What between `start` and `end` is in none of `runs`, counted from `start` on."""
    place = 0
    for first, behind in (*within(runs, start, end, counted_from=start), (end - start, end - start)):
        if place < first:
            yield place, first
        place = behind


def _shared(text: str, other: str) -> int:
    """How many leading characters two texts share."""
    return len(other) if text.startswith(other) else common_prefix_length(text, other)
