"""What the reference cache costs: opening a large one, and a pass that fills one over the bare forward passes.

    python benchmarks/reference_cache.py [--responses 2000000] [--pairs 256] [--rounds 5] [--out FILE.md]

Opening: a store of so many made up responses, in files of 16,384 as a long pass writes them, opened by a fresh process
that then looks up 100,000 pairs; every file is read and checked against its hash. Memory is what the process holds more
afterwards than before.

The pass: pairs of about 125 + 45 + 45 tokens under a random Llama of 6 layers x 384 at a vocabulary of 16,384. In
turns: the packs' tensors and forward passes alone, and all that a run does about them: hashing the model's files,
planning, claims, forward passes, files, and looking every pair up. Both compute the same packs; their log-probs are
compared. The second ratio has the forward passes of the run itself below the line, without the packs' tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROWS_IN_A_FILE = 16_384
PAIRS_LOOKED_UP = 100_000


def resident() -> int:
    """Bytes of memory that this process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# -------------------------------------------------------------------------------------------------------------- opening


def make_store(folder: Path, responses: int) -> None:
    """Files of made up rows."""
    import numpy as np

    from open_po.reference.shards import Row, write_shard

    rng = np.random.default_rng(0)
    for start in range(0, responses, ROWS_IN_A_FILE):
        count = min(ROWS_IN_A_FILE, responses - start)
        keys, logps, tokens = rng.bytes(16 * count), rng.normal(-200, 50, count), rng.integers(1, 2000, count)
        rows = {keys[16 * i : 16 * i + 16]: Row(float(logps[i]), int(tokens[i]), None) for i in range(count)}
        write_shard(folder, rows, {})


def open_store(folder: Path) -> dict[str, float]:
    """Seconds and bytes of opening a store, and seconds of finding pairs in it."""
    import numpy as np

    from open_po.data.tokenization import KEY_DTYPE
    from open_po.reference.shards import read_shard, shard_files
    from open_po.reference.store import ReferenceStore

    some = [read_shard(path).keys[:: ROWS_IN_A_FILE // 4096] for path in shard_files(folder)]
    wanted = np.random.default_rng(1).permutation(np.concatenate(some))[: 2 * PAIRS_LOOKED_UP].astype(KEY_DTYPE)
    del some
    before, start = resident(), time.perf_counter()
    store = ReferenceStore(folder, warn=print)
    store.find(wanted[:1])
    opened = time.perf_counter()
    rows = store.find(wanted)
    store._values(rows)
    found = time.perf_counter()
    assert (rows >= 0).all()
    return {"open": opened - start, "find": found - opened, "bytes": resident() - before, "pairs": len(wanted) / 2}


def measure_opening(responses: int, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        make_store(Path(name), responses)
        files, size = len(list(Path(name).iterdir())), sum(path.stat().st_size for path in Path(name).iterdir())
        results: list[dict[str, float]] = []
        for _ in range(rounds):
            child = subprocess.run(
                [sys.executable, __file__, "--open", name], capture_output=True, text=True, check=True
            )
            results.append(json.loads(child.stdout.splitlines()[-1]))
    seconds, finding = ([result[name] for result in results] for name in ("open", "find"))
    memory, pairs = max(result["bytes"] for result in results), results[0]["pairs"]
    return (
        f"Opening {responses:,} responses in {files} files ({size / 1e6:.0f} MB), {rounds} times: {spread(seconds)} s "
        f"and at most {memory / 1e6:.0f} MB (targets: below 2 s and 300 MB); finding {pairs:,.0f} pairs in it: "
        f"{spread(finding)} s."
    )


# ------------------------------------------------------------------------------------------------------------- the pass


def measure_pass(pairs: int, rounds: int) -> str:
    import numpy as np
    import torch
    from workloads import Shape, build_model, write_pairs

    from open_po.config import load_config
    from open_po.data.run_data import prepare_data
    from open_po.distributed.runtime import Runtime
    from open_po.model.load import load_scorer
    from open_po.model.numerics import policy_numerics
    from open_po.model.prepare import set_layout
    from open_po.model_files import model_identity, policy_source
    from open_po.reference import ensure_reference
    from open_po.reference.fill import PackPlanner, Responses

    shape = Shape(hidden=384, layers=6, heads=6, kv_heads=6, intermediate=1024, vocabulary=16_384)
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(60, 190), rng.integers(20, 70), rng.integers(20, 70)) for _ in range(pairs)]
    ids = [tuple(rng.integers(3, shape.vocabulary, length).tolist() for length in row) for row in lengths]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs([(p, [*a, 1], [*b, 1]) for p, a, b in ids], folder)
        build_model(shape, folder / "model", 0)
        words = ["--model_name_or_path", str(folder / "model"), "--mixer_list", str(folder / "pairs.jsonl"), "1.0"]
        words += ["--max_tokens_per_batch", "2048", "--max_seq_length", "1024"]
        config = load_config([*words, "--reference_cache_dir", str(folder / "unused")])
        runtime = Runtime.start(0)
        source = policy_source(config)
        numerics = policy_numerics(config, runtime.device)
        scorer = load_scorer(source, numerics, runtime.device)
        with redirect_stdout(StringIO()):
            data = prepare_data(config, runtime)
            set_layout(scorer, data, "auto", "Model", runtime)
        planner = PackPlanner(responses=Responses(data.train), layout=scorer.layout, budget=2048, pad=data.pad)
        packs = planner.plan(1)

        def bare() -> torch.Tensor:
            with scorer.as_reference():
                return torch.cat([scorer.token_logprobs(planner.batch(pack)) for pack in packs])

        def whole(number: int) -> Any:
            cache = folder / f"cache {number}"
            cache.mkdir()
            own = load_config([*words, "--reference_cache_dir", str(cache)])
            identity = model_identity(source, cache)
            reference = ensure_reference(lambda: scorer, source, identity, numerics, own, runtime, data)
            assert reference.totals.responses_computed == sum(len(pack.numbers) for pack in packs)
            return reference.store.logps_of(data.train)

        bare()
        scoring = 0.0  # seconds
        score = type(scorer).token_logprobs

        def timed(*positional: Any) -> torch.Tensor:
            nonlocal scoring
            start = time.perf_counter()
            logps = score(*positional)
            scoring += time.perf_counter() - start
            return logps

        alone, run, shares = [], [], []
        for number in range(rounds):
            start = time.perf_counter()
            logps = bare()
            middle = time.perf_counter()
            scoring = 0.0
            with redirect_stdout(StringIO()), patch.object(type(scorer), "token_logprobs", timed):
                found = whole(number)
            alone.append(middle - start)
            run.append(time.perf_counter() - middle)
            shares.append(run[-1] / scoring)
        total = float(logps.double().sum())
        assert abs(float((found.chosen.double() + found.rejected.double()).sum()) - total) < 1e-5 * abs(total)
    ratios = [mine / theirs for mine, theirs in zip(run, alone, strict=True)]
    return (
        f"A pass over {pairs} pairs ({len(packs)} packs), {rounds} rounds in turns: forward passes alone "
        f"{spread(alone)} s, the pass with hashing, planning, claims, files and lookup {spread(run)} s, "
        f"{spread(ratios, '.4f')} times as long (target: below 1.02). By the clock within these passes, which the "
        f"machine's noise disturbs less, they take {spread(shares, '.4f')} times as long as the forward passes in them."
    )


def spread(values: list[float], form: str = ".3f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2_000_000)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # in the processes that open a store
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(open_store(arguments.open)))
        return
    lines = [measure_opening(arguments.responses, arguments.rounds), measure_pass(arguments.pairs, arguments.rounds)]
    print("\n".join(lines))
    if arguments.out:
        import torch
        from machine import machine

        about = f"Made by `python benchmarks/reference_cache.py`. {machine('cpu', torch.get_num_threads())}."
        arguments.out.write_text("\n\n".join([about, *lines]) + "\n")


if __name__ == "__main__":
    main()
