"""Merging adapters of a 7B model from file to file: time beside that of reading and writing the files, and memory.

python -m benchmarks.merge_files                    the table; stored in benchmarks/results/merge_files.jsonl
python -m benchmarks.merge_files --quick            two small layers; stores nothing
python -m benchmarks.merge_files --from-results     the stored table
python -m benchmarks.merge_files --gram             how long the Gram matrices of all modules take, and nothing else

T adapters of random factors on 7 modules of each of 32 layers (4096 wide, 11008 inside), r = 16, bfloat16, in PEFT's folders with a scale of 2. Each
line is a process of its own: "copy" reads every byte of every adapter and writes the result that stands in the line, in the same format; "merge"
is `sb.merge_adapters`. Medians of repeats, copy and merge in turns; files are in the page cache. Memory is the peak of what the process allocated
(RssAnon) above what it had after its imports; "module" is the size of the largest module's factors of all adapters in float64.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import skillbank as sb
from benchmarks import stored
from skillbank.adapter import CONFIG_FILE, WEIGHTS_FILE
from skillbank.tensors import load_tensors, save_tensors

RESULTS = Path(__file__).parent / "results" / "merge_files.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "stack": {"method": "stack"},
    "svd, rank 16": {"method": "svd", "rank": 16},
    "karcher, rank 16": {"method": "karcher", "rank": 16},
    "tsv_m, rank 16": {"method": "tsv_m", "rank": 16},
}


def modules(layers: int, width: int, inside: int) -> dict[str, tuple[int, int]]:
    """(out, in) of every module."""
    square = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (inside, width), "mlp.up_proj": (inside, width), "mlp.down_proj": (width, inside)}
    return {f"model.layers.{i}.{name}": size for i in range(layers) for name, size in (square | mlp).items()}


def write_adapters(folder: Path, count: int, rank: int, sizes: dict[str, tuple[int, int]]) -> list[Path]:
    """Adapters of random factors."""
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        factors = {
            name: (torch.randn(rank, i, generator=generator).bfloat16(), torch.randn(o, rank, generator=generator).bfloat16())
            for name, (o, i) in sizes.items()
        }
        sb.write_adapter(sb.Skill(factors), folder / str(k))
        config = json.loads((folder / str(k) / CONFIG_FILE).read_text())
        (folder / str(k) / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 2 * rank}))
    return [folder / str(k) for k in range(count)]


def allocated() -> float:
    """MB that this process has allocated now."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Highest of `allocated` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at, self.most, self.done = allocated(), 0.0, threading.Event()

    def run(self) -> None:
        """Look every two milliseconds."""
        while not self.done.wait(0.002):
            self.most = max(self.most, allocated() - self.start_at)


def copy(sources: list[Path], like: Path, target: Path) -> None:
    """Read every byte of the sources, and write as much as a merge writes."""
    for source in sources:
        for tensor in load_tensors(source / WEIGHTS_FILE, trusted=True)[0].values():
            tensor.view(torch.int32).amax()
    save_tensors(target / WEIGHTS_FILE, load_tensors(like / WEIGHTS_FILE, trusted=True)[0])


def child(task: dict[str, Any]) -> None:
    """One merge or one copy; prints its time and memory."""
    torch.set_num_threads(task["threads"])
    sources, target = [Path(each) for each in task["sources"]], Path(task["target"])
    sb.merge([sb.Skill({"a": (torch.ones(2, 3), torch.ones(3, 2))})], method="svd")  # loads what loads when it is needed
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    if task["like"]:
        copy(sources, Path(task["like"]), target)
    else:
        sb.merge_adapters(sources, target, **task["options"])
    seconds = time.perf_counter() - started
    peak.done.set()
    peak.join()
    print(json.dumps({"seconds": seconds, "peak": peak.most}))


def grams(count: int, rank: int, sizes: dict[str, tuple[int, int]]) -> float:
    """Seconds of the Gram matrices of both stacked factors of all modules, in float64, from memory."""
    ready = {size: torch.randn(size, count * rank, dtype=torch.float64) for pair in sizes.values() for size in pair}
    started = time.perf_counter()
    for pair in sizes.values():
        for size in pair:
            ready[size].mT @ ready[size]
    return time.perf_counter() - started


def row(name: str, options: dict[str, Any], sources: list[Path], threads: int, repeats: int) -> dict[str, float]:
    """One line of the table."""
    found: dict[str, list[dict[str, float]]] = {"merge": [], "copy": []}
    kept = sources[0].parent / "merged"
    shutil.rmtree(kept, ignore_errors=True)
    for turn in range(repeats):
        for what in ("merge", "copy"):
            target = kept if what == "merge" and turn == 0 else sources[0].parent / "again"
            shutil.rmtree(target, ignore_errors=True)
            if what == "copy":
                target.mkdir()
            task = {
                "sources": [str(each) for each in sources],
                "target": str(target),
                "threads": threads,
                "options": options,
                "like": str(kept) if what == "copy" else "",
            }
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.merge_files", "--task", json.dumps(task)], check=True, capture_output=True, text=True
            )
            found[what].append(json.loads(done.stdout))
    seconds = {what: statistics.median(each["seconds"] for each in runs) for what, runs in found.items()}
    written = (kept / WEIGHTS_FILE).stat().st_size / 2**20
    return {
        "written, MB": written,
        "copy, s": seconds["copy"],
        "merge, s": seconds["merge"],
        "merge / copy": seconds["merge"] / seconds["copy"],
        "merge, MB": max(each["peak"] for each in found["merge"]),
    }


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "two small layers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder without one")
    parser.add_argument("--gram", action="store_true", help="how long the Gram matrices of all modules take, and nothing else")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        child(json.loads(options.task))
        return
    if options.gram:
        for threads in options.threads:
            torch.set_num_threads(threads)
            times = [grams(8, 16, modules(32, 4096, 11008)) for _ in range(4)]
            print(f"{threads} threads: {statistics.median(times[1:]):.2f} s")
        return
    rows: list[dict[str, Any]] = []
    if options.from_results:
        rows = stored.load(RESULTS)
    else:
        count, rank, sizes = (3, 4, modules(2, 64, 160)) if options.quick else (8, 16, modules(32, 4096, 11008))
        where = stored.where()
        largest = max(o + i for o, i in sizes.values()) * rank * count * 8 / 2**20
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            sources = write_adapters(Path(folder), count, rank, sizes)
            read = sum((source / WEIGHTS_FILE).stat().st_size for source in sources) / 2**20
            for threads in options.threads:
                for name, each in METHODS.items():
                    values = {"read, MB": read, "module, MB": largest, **row(name, each, sources, threads, 1 if options.quick else 3)}
                    rows.append({"threads": threads, "method": name, "values": values, **where})
        if not options.quick:
            stored.store(RESULTS, rows)
    print(stored.by_threads(rows))


if __name__ == "__main__":
    main()
