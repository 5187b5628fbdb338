"""What generates answers: transformers, on every rank a share, or vLLM."""

from __future__ import annotations

import gc
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch

from open_po.distributed.runtime import Runtime
from open_po.errors import UserError, first_line
from open_po.evaluation.generation import Greedy
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource

EngineName = Literal["transformers", "vllm"]
_VLLM_PROMPTS = 1024  # that vLLM gets at a time: their answers are on disk before the next


class AnswerEngine(ABC):
    """A model that answers prompts."""

    @abstractmethod
    def rounds(self, prompts: Sequence[Sequence[int]]) -> Iterator[dict[int, list[int]]]:
        """Answers by the prompt's number, some at a time; all ranks go through this together and get all of them."""


class TransformersEngine(AnswerEngine):
    """transformers' own `generate`, each rank with a whole model and every so many-th batch."""

    def __init__(self, scorer: Scorer, greedy: Greedy, runtime: Runtime) -> None:
        self._scorer, self._greedy, self._runtime = scorer, greedy, runtime

    def rounds(self, prompts: Sequence[Sequence[int]]) -> Iterator[dict[int, list[int]]]:
        scorer, greedy, runtime = self._scorer, self._greedy, self._runtime
        scorer.check_ids(max(chain.from_iterable(prompts)))
        batches = greedy.batches(scorer, [len(prompt) for prompt in prompts])
        for start in range(0, len(batches), runtime.world_size):
            found = {}
            for batch in batches[start + runtime.rank : start + runtime.rank + 1]:
                answers = greedy.answer(scorer, [prompts[index] for index in batch.indices], batch.max_new_tokens)
                found = dict(zip(batch.indices, answers, strict=True))
            yield dict(chain.from_iterable(part.items() for part in runtime.gather(found)))


class VllmEngine(AnswerEngine):
    """vLLM on all GPUs of this machine, by one process."""

    def __init__(self, source: ModelSource, numerics: Numerics, greedy: Greedy) -> None:
        """Raises UserError if vLLM does not take the model."""
        import vllm

        self._greedy, self._vllm = greedy, vllm
        gpus = max(1, torch.cuda.device_count())
        try:
            self._llm: Any = vllm.LLM(
                model=str(source.folder()),
                skip_tokenizer_init=True,  # it gets token ids and gives some
                dtype=str(numerics.compute_dtype).removeprefix("torch."),
                trust_remote_code=source.trust_remote_code,
                tensor_parallel_size=2 ** (gpus.bit_length() - 1),  # heads divide by powers of two
                generation_config="vllm",  # no penalty or temperature that comes with the model
            )
        except Exception as error:  # vLLM's own, of CUDA, or of a model that it does not know
            said = first_line(error)
            raise UserError(f"--engine vllm: {source.name} cannot be loaded ({said}); use transformers") from error

    def rounds(self, prompts: Sequence[Sequence[int]]) -> Iterator[dict[int, list[int]]]:
        greedy = self._greedy
        sampling = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=greedy.max_new_tokens, stop_token_ids=list(greedy.ends), detokenize=False
        )
        try:
            for start in range(0, len(prompts), _VLLM_PROMPTS):
                asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts[start : start + _VLLM_PROMPTS]]
                try:
                    outputs = self._llm.generate(asked, sampling, use_tqdm=False)
                except ValueError as error:  # a prompt that is longer than the model's positions
                    raise UserError(f"--engine vllm: {first_line(error)}; lower max_prompt_length") from error
                answers = ([*output.outputs[0].token_ids] for output in outputs)
                yield {start + number: _cut(answer, greedy.ends) for number, answer in enumerate(answers)}
        finally:  # it holds the GPUs' memory, which the next model needs
            del self._llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Without the token that ended it."""
    return answer[:-1] if answer and answer[-1] in ends else answer


def choose_engine(wanted: str, runtime: Runtime, *, whole_model: bool) -> EngineName:
    """What answers: vLLM by itself where it is installed, there is a GPU and the model is a whole one in a folder.

    Raises UserError if vLLM is asked for and cannot be.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if wanted != "vllm":
        free = installed and torch.cuda.is_available() and whole_model and runtime.world_size == 1
        return "vllm" if wanted == "auto" and free else "transformers"
    if not installed:
        raise UserError("--engine vllm: is not installed; pip install vllm, or use transformers")
    if not whole_model:
        raise UserError("--engine vllm: takes whole models, no adapters, checkpoints or 4 bits; use transformers")
    if runtime.world_size > 1:
        raise UserError(f"--engine vllm: is one process, these are {runtime.world_size}; start one")
    return "vllm"
