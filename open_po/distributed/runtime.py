"""The process: device, ranks, seeds, console. The only place that sets process-wide state."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from torch.distributed import ProcessGroup

from open_po.config import RunConfig
from open_po.distributed.parallelism import LauncherWish, Parallelism, choose_parallelism
from open_po.distributed.stopping import StopRequest
from open_po.errors import StrandedError, UserError, user_line
from open_po.output.console import Output, make_console

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
_PATIENCE = timedelta(hours=6)  # for other ranks: rank 0 may tokenise for hours
_BOTH = "cuda:nccl,cpu:gloo"
# mallopt's M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD: nothing is mapped by itself, the heap grows by 256 MiB and never
# shrinks by itself.
_MALLOC = {-4: 0, -1: -1, -2: 2**28}


def _for_all(error: Exception) -> Exception:
    """`error` as one that every rank can raise."""
    line = user_line(error)
    if line is None:
        return error
    shared = error if isinstance(error, UserError) else UserError(line)
    shared.shared = True
    return shared


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What the parts of a run share: this process's place among the ranks, how models are spread, the console."""

    accelerator: Accelerator
    parallelism: Parallelism
    stop: StopRequest
    console: Output
    group: ProcessGroup | None = None  # of the ranks that this is about; None: all

    @staticmethod
    def start(seed: int, config: RunConfig | None = None) -> Runtime:
        """Join the other ranks, if any, seed every generator and quieten the libraries.

        Raises ConfigError if `config` and the program that launched this one do not go together.
        """
        _quieten_libraries()
        if not torch.cuda.is_available():
            _keep_freed_memory()
        stop = StopRequest(None if config is None else config.train.max_run_time)
        stop.listen()
        wish, ranks = LauncherWish.from_environment(), int(os.environ.get("WORLD_SIZE", "1"))
        parallelism = Parallelism(kind="single" if ranks == 1 else "ddp", is_free=ranks > 1)
        if config is not None:
            parallelism = choose_parallelism(config, wish, ranks)
        group: dict[str, Any] = {"timeout": _PATIENCE}
        if torch.cuda.is_available() and parallelism.offload_param:  # what is offloaded is gathered from CPUs
            group["backend"] = _BOTH
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the model casts by itself, alike in training, evaluation and the reference pass
            kwargs_handlers=[InitProcessGroupKwargs(**group)],
        )
        if parallelism.zero_stage or parallelism.kind == "fsdp":
            _prepare_engine(group)
        set_seed(seed)
        console = make_console(quiet=not accelerator.is_main_process)
        return Runtime(accelerator=accelerator, parallelism=parallelism, stop=stop, console=console)

    @property
    def device(self) -> torch.device:
        """The device that models run on."""
        return cast(torch.device, self.accelerator.device)

    @property
    def rank(self) -> int:
        """This process's number among the ranks."""
        return int(self.accelerator.process_index if self.group is None else torch.distributed.get_rank(self.group))

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return int(self.accelerator.num_processes if self.group is None else self.group.size())

    @property
    def replica(self) -> int:
        """The number of this rank's share of a step's packs: under tensor parallelism all ranks have the same."""
        return 0 if self.parallelism.kind == "tp" else self.rank

    @property
    def replicas(self) -> int:
        """How many shares there are."""
        return 1 if self.parallelism.kind == "tp" else self.world_size

    @property
    def counts(self) -> bool:
        """Whether this rank counts what its share comes to, as one of those that have it."""
        return self.is_main or self.replicas > 1

    @property
    def local_world_size(self) -> int:
        """How many of the ranks are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def is_node_first(self) -> bool:
        """Whether this is the first rank of its machine."""
        return bool(self.accelerator.is_local_main_process)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """One line on the main rank's console, never wrapped."""
        self.console.print(line, soft_wrap=True, markup=False)

    def say_here(self, line: str) -> None:
        """One line of this rank's, whichever it is."""
        if self.is_main:
            self.say(line)
        else:
            print(f"rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def on_main(self, action: Callable[Arguments, T], *args: Arguments.args, **named: Arguments.kwargs) -> T | None:
        """Run `action` on rank 0, which keeps the result; the others get None. Its error is raised on every rank."""
        if self.world_size == 1:
            return action(*args, **named)
        result: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = action(*args, **named)
            except StrandedError:
                raise
            except Exception as error:
                failure = _for_all(error)
        if (theirs := self._broadcast(failure)) is not None:
            raise theirs
        return result

    def from_main(self, action: Callable[Arguments, T], *args: Arguments.args, **named: Arguments.kwargs) -> T:
        """Run `action` on rank 0 and give its result, which must pickle, to every rank. Its error is raised on all."""
        return cast(T, self._broadcast(self.on_main(action, *args, **named)))

    def on_every_rank(self, action: Callable[Arguments, T], *args: Arguments.args, **named: Arguments.kwargs) -> T:
        """Run `action` on every rank; an error on one is raised on all, so that none waits for another forever."""
        if self.world_size == 1:
            return action(*args, **named)
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action(*args, **named)
        except StrandedError:
            raise
        except Exception as error:
            failure = _for_all(error)
        for theirs in self.gather(failure):
            if theirs is not None:
                raise theirs
        return cast(T, result)

    def main_first(self, action: Callable[Arguments, T], *args: Arguments.args, **named: Arguments.kwargs) -> T:
        """Run `action` on rank 0 and then on the others, who find on disk what it made. Errors are raised on all.

        Of other nodes, which may have disks of their own, one rank goes before the rest.
        """
        mine = self.on_main(action, *args, **named)
        done = self.is_main
        if self.local_world_size < self.world_size:
            first = self.is_node_first and not done
            found = self.on_every_rank(lambda: action(*args, **named) if first else None)
            mine, done = (found, True) if first else (mine, done)
        return self.on_every_rank(lambda: cast(T, mine) if done else action(*args, **named))

    def on_each_node(
        self, action: Callable[Arguments, object], *args: Arguments.args, **named: Arguments.kwargs
    ) -> None:
        """Run `action` on one rank of every node. Errors are raised on all ranks."""
        self.on_every_rank(lambda: action(*args, **named) if self.is_node_first else None)

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in the ranks' order."""
        if self.world_size == 1:
            return [mine]
        if self.group is None:
            return cast(list[T], gather_object([mine]))
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, mine, self.group)
        return found

    def _broadcast(self, mine: T) -> T:
        """Rank 0's value on every rank."""
        box = [mine]
        if self.world_size > 1 and self.group is None:
            broadcast_object_list(box)
        elif self.world_size > 1:
            torch.distributed.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    @property
    def nodes(self) -> int:
        """How many machines the ranks are on, the same number on each; 1 where the numbers differ."""
        return self.world_size // self.local_world_size if self.world_size % self.local_world_size == 0 else 1

    @property
    def teams(self) -> int:
        """How many groups like this one all ranks make."""
        return int(self.accelerator.num_processes) // self.world_size

    def of_node(self) -> Runtime:
        """The same for the ranks of this machine alone; all ranks call this."""
        count = self.local_world_size
        groups = [
            torch.distributed.new_group(range(first, first + count)) for first in range(0, self.world_size, count)
        ]
        return dataclasses.replace(self, group=cast(ProcessGroup, groups[self.rank // count]))

    def close(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # models that an engine has wrapped belong to the group, and go before it
            torch.distributed.destroy_process_group()


def _prepare_engine(group: dict[str, Any]) -> None:
    """What an engine that divides a model expects of its process: a group, be it of one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not torch.distributed.is_initialized():
        backend = {"backend": "nccl" if torch.cuda.is_available() else "gloo"} | group
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, **backend)


def _keep_freed_memory() -> None:
    """Have glibc keep what large tensors free for the next ones, instead of mapping and clearing pages each time.

    `release_memory` gives it back to the system all the same. Whoever has chosen an allocator, or settings of it, keeps
    them.
    """
    if any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def _quieten_libraries() -> None:
    if not torch.cuda.is_available():  # DeepSpeed, which transformers imports if it is there, looks for a GPU aloud
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Tokenisation forks one process per CPU, which is parallel enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|datasets|peft)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) > 0:
        datasets.disable_progress_bars()  # of downloads and the like; tokenising has one of ours
