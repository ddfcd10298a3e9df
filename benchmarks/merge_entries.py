"""Entrywise merges of low-rank skills: time beside one pass over the dense entries, and memory.

python -m benchmarks.merge_entries                    the table; stored in benchmarks/results/merge_entries.jsonl
python -m benchmarks.merge_entries --quick            a small layer; stores nothing
python -m benchmarks.merge_entries --from-results     the stored table

T = 4 skills of rank 16 on one 4096 x 4096 layer, in float32, merged to the dense delta (`sb.dense_merge`). "pass" sums the T dense deltas, which are
made beforehand: the time of the memory. "entries" makes them from the factors, tile by tile, and sums them: what this way takes at least.
"dense" is a plain implementation on the dense deltas, without tiles. Memory is the peak of what a call allocates above what was there (RssAnon); the
result takes 64 MB of it, the dense deltas would take 256. Medians of repeats, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import skillbank as sb
from benchmarks import stored
from benchmarks.merge import skills
from benchmarks.merge_files import Peak
from skillbank.merge.tiles import Tiles

RESULTS = Path(__file__).parent / "results" / "merge_entries.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "magmax": {},
    "emr": {},
    "consensus": {},
    "magnitude": {"density": 0.2},
    "ties": {"density": 0.2},
    "breadcrumbs": {},
    "sce": {},
    "dare": {},
}


def trimmed(deltas: Tensor, density: float) -> Tensor:
    """Largest entries of every skill."""
    count = round(density * deltas[0].numel())
    flat = deltas.flatten(1).abs()
    least = flat.kthvalue(flat.shape[1] - count + 1).values
    return torch.where(deltas.abs() >= least[:, None, None], deltas, 0)


def ties(deltas: Tensor) -> Tensor:
    """TIES, dense."""
    cut = trimmed(deltas, 0.2)
    agrees = (cut.sign() == cut.sum(0).sign()) & (cut != 0)
    return (cut * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def emr(deltas: Tensor) -> Tensor:
    """EMR, dense."""
    sign = deltas.sum(0).sign()
    return sign * (deltas * sign).clamp_min(0).amax(0)


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "magmax": lambda deltas: deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0],
    "emr": emr,
    "magnitude": lambda deltas: trimmed(deltas, 0.2).sum(0),
    "ties": ties,
    "dare": lambda deltas: (torch.nn.functional.dropout(deltas, 0.5)).sum(0),
}


def entries(parts: list[sb.Skill]) -> Tensor:
    """Sum of the deltas, tile by tile."""
    return torch.cat([tile.sum(0) for tile in Tiles([part["layer"] for part in parts])])


def merged(parts: list[sb.Skill], method: str, options: dict[str, Any]) -> Tensor:
    """Dense merge."""
    return sb.dense_merge(parts, [1.0] * len(parts), method, **options).delta("layer")


def rows(width: int, repeats: int) -> list[dict[str, Any]]:
    """Values of the table, a method each."""
    parts = skills(4, 16, width)
    deltas = torch.stack([part.delta("layer") for part in parts])
    found = []
    for method, options in METHODS.items():
        runs: dict[str, Callable[[], Tensor]] = {
            "merge": partial(merged, parts, method, options),
            "pass": partial(torch.sum, deltas, 0),
            "entries": partial(entries, parts),
        }
        if method in DENSE:
            runs["dense"] = partial(DENSE[method], deltas)
        times: dict[str, list[float]] = {name: [] for name in runs}
        most = 0.0
        for turn in range(repeats + 1):
            for name, run in runs.items():
                peak = Peak()
                peak.start()
                started = time.perf_counter()
                run()
                seconds = time.perf_counter() - started
                peak.done.set()
                peak.join()
                if turn:
                    times[name].append(1e3 * seconds)
                    most = max(most, peak.most) if name == "merge" else most
        values = {f"{name}, ms": statistics.median(each) for name, each in times.items()}
        values["merge / pass"] = values["merge, ms"] / values["pass, ms"]
        values["merge / entries"] = values["merge, ms"] / values["entries, ms"]
        found.append({"method": method, "values": values | {"merge, MB": most}})
    return found


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "a small layer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    if options.from_results:
        found = stored.load(RESULTS)
    else:
        where = stored.where()
        for threads in options.threads:
            torch.set_num_threads(threads)
            found += [{"threads": threads, **each, **where} for each in rows(256 if options.quick else 4096, 1 if options.quick else 5)]
        if not options.quick:
            stored.store(RESULTS, found)
    print(stored.by_threads(found))


if __name__ == "__main__":
    main()
