"""How long things take, one beside the other: rounds in which each of them runs, so that a noisy machine disturbs all alike.

In a round each runs twice and the second run counts, so that it finds its own numbers in the cache and not those of the one before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks import stored
from skillbank.memory import keep_freed_memory

__all__ = ["paired", "run_pinned"]


def paired(contenders: Mapping[str, Callable[[], object]], *, rounds: int = 40, warm: int = 5) -> dict[str, dict[str, float]]:
    """Median, and quartiles `low` and `high`, of the seconds of one call, by name; freed memory is kept, as `load` and `fit` do."""
    keep_freed_memory()
    for _ in range(warm):
        for call in contenders.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, each in seconds.items():
        low, _, high = quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        found[name] = {"seconds": median(each), "low": low, "high": high}
    return found


def run_pinned(
    doc: str | None,
    quick: str,
    module: str,
    results: Path,
    measure: Callable[[bool, int], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Command line of a benchmark that runs once on one processor and once on two, each time in a process that may use no other.

    Args:
        doc: of the benchmark.
        quick: help of `--quick`.
        module: the benchmark's.
        results: where rows are stored.
        measure: rows, given whether it is to be quick and the number of threads.
        show: rows as tables.

    """
    parser = stored.parser(doc, quick)
    parser.add_argument("--rows", action="store_true", help="measure in this process, on the processors it may use, and print rows as JSON")
    options = parser.parse_args()
    if options.rows:
        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        for row in measure(options.quick, threads):
            print(json.dumps(row))
        return
    if options.from_results:
        rows = stored.load(results)
    else:
        where, extra = stored.where(), ["--quick"] if options.quick else []
        each = [_pinned(module, threads, "--rows", *extra) for threads in ((1,) if options.quick else (1, 2))]
        rows = [row | where for some in each for row in some]
        if not options.quick:
            stored.store(results, rows)
    print(show(rows))


def _pinned(module: str, threads: int, *arguments: str) -> list[dict[str, Any]]:
    """Rows of a run of a benchmark on this many processors, as JSON lines on its standard output."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
