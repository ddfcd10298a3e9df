"""How long things take, one beside the other: rounds in which each of them runs, so that a noisy machine disturbs all alike.

In a round each runs twice and the second run counts, so that it finds its own numbers in the cache and not those of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles

from skillbank.memory import keep_freed_memory

__all__ = ["paired"]


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
