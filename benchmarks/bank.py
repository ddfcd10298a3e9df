"""A bank of 100, 10,000 and 100,000 versions: what grows with it and what does not, beside the plain work that cannot be spared.

python -m benchmarks.bank                    the tables; stored in benchmarks/results/bank.jsonl
python -m benchmarks.bank --sizes 100 1000   other sizes; --sizes alone: the second table anew
python -m benchmarks.bank --quick            a small bank; stores nothing
python -m benchmarks.bank --from-results     the stored tables

Medians of repeats in one process, peers in turns, files in the page cache.
Limits are measured beside: `safetensors.safe_open` for get, writing, flushing and hashing the same bytes for put, SHA-256 alone for verify.
The peer is mttl's local library, where it can be imported (benchmarks/mttl_library.py says how).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import skillbank as sb
from benchmarks import mttl_library, stored
from skillbank.bank.card import content_hash
from skillbank.bank.sealed import file_digest
from skillbank.report import markdown

RESULTS = Path(__file__).parent / "results" / "bank.jsonl"
NAMES = 10
"""Versions per name."""


def skill(seed: int, width: int = 8, rank: int = 8, modules: int = 2) -> sb.Skill:
    """A skill on square layers."""
    generator = torch.Generator().manual_seed(seed)
    return sb.Skill({f"m{i}": (torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)) for i in range(modules)})


def median_ms(run: Callable[[], object], repeats: int = 9) -> float:
    """Median time of a call in milliseconds, after one that does not count; of the first call, where it is not repeated."""
    if repeats:
        run()
    times = []
    for _ in range(repeats or 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 9) -> tuple[float, float, float]:
    """Medians in milliseconds of two calls that take turns, and of the ratio of each pair: what else a machine does hits both."""
    ours(), theirs()
    pairs = [(median_ms(ours, 0), median_ms(theirs, 0)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def fill(bank: sb.Bank, size: int) -> None:
    """Copies of one version under many names and numbers, each with a content, a card and metrics of its own; not flushed to the disk."""
    ref = bank.put(skill(0), "seed")
    card, folder = bank.card(ref), bank.path(ref)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "card.json"}
    for i in range(size):
        weights = bytearray(files["adapter_model.safetensors"])
        weights[-4:] = i.to_bytes(4, "little")
        mine = {**files, "adapter_model.safetensors": bytes(weights)}
        entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in mine.items()}
        made = replace(card, files=entries, hash=content_hash(entries), metrics={"return": float(i)}, tags=(f"tag-{i % 7}",))
        target = bank.root / f"group-{i // NAMES % 13}" / f"skill-{i // NAMES}" / str(i % NAMES + 1)
        target.mkdir(parents=True)
        for name, data in {**mine, "card.json": made.to_bytes()}.items():
            (target / name).write_bytes(data)


def in_a_new_process(bank: sb.Bank, code: str) -> tuple[float, float]:
    """Time in ms of code that has `bank` and `ref`, and the memory in MB that it took."""
    whole = (
        "import resource, sys, time; import torch; from skillbank.bank import Bank; import skillbank.skill, skillbank.adapter; "
        "before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(); bank = Bank(sys.argv[1]); ref = sys.argv[2]; "
        f"{code}; print(1e3 * (time.perf_counter() - started), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    name, numbers = next(iter(bank.names()))
    done = subprocess.run([sys.executable, "-c", whole, str(bank.root), f"{name}@{numbers[0]}"], check=True, capture_output=True, text=True)
    milliseconds, megabytes = done.stdout.split()
    return float(milliseconds), float(megabytes)


def growth(size: int, folder: Path) -> dict[str, float]:
    """What the operations take in a bank of this size."""
    bank = sb.Bank(folder / str(size))
    fill(bank, size)
    started = time.perf_counter()
    bank.list()
    first = 1e3 * (time.perf_counter() - started)
    time.sleep(2.1)  # until time stamps are believed
    bank.list()
    ref = str(next(iter(bank.list(pattern="group-1/*"))).ref)
    middle = bank.card(ref).hash
    opened = [in_a_new_process(bank, "bank.get(bank.resolve(ref))") for _ in range(5)]
    new = iter(range(10**6, 10**7))
    found = {
        "open + resolve + get, ms": statistics.median(each[0] for each in opened),
        "memory of that, MB": statistics.median(each[1] for each in opened),
        "resolve a name, ms": median_ms(lambda: bank.resolve(ref.partition("@")[0])),
        "resolve a content, ms": median_ms(lambda: bank.resolve(f"@sha256:{middle[:20]}")),
        "list all, ms": median_ms(lambda: bank.list()),
        "list a tenth by metric, ms": median_ms(lambda: bank.list(where=[f"metrics.return < {size / 10}"])),
        "full text, ms": median_ms(lambda: bank.list(text="tag-3")),
        "put, ms": median_ms(lambda: bank.put(skill(next(new)), "new/skill")),
        "first index, s": first / 1e3,
    }
    assert len(bank.list(where=[f"metrics.return < {size / 10}"])) == -(-size // 10)
    return found | mttl_library.growth(size, folder, skill(0).factors)


def reading(width: int, rank: int, folder: Path) -> dict[str, float]:
    """Get beside safe_open, and put beside writing, flushing and hashing, for a skill of 16 modules of this size."""
    bank = sb.Bank(folder / f"width-{width}")
    thing = skill(1, width, rank, modules=16)
    ref = bank.put(thing, "skill")
    path = bank.path(ref) / "adapter_model.safetensors"
    time.sleep(2.1)
    bank.get(ref)

    def touch(tensors: list[torch.Tensor]) -> float:
        return sum(float(tensor.sum()) for tensor in tensors)

    def ours() -> float:
        read = bank.get(ref)
        assert isinstance(read, sb.Skill)
        return touch([tensor for pair in read.factors.values() for tensor in pair])

    def theirs() -> float:
        with safe_open(path, framework="pt") as file:
            return touch([file.get_tensor(name) for name in file.keys()])  # noqa: SIM118

    data = path.read_bytes()
    count = iter(range(10**6))

    def written() -> None:  # and kept, as a put is: a file in the memory of one that was removed is written several times as fast
        target = folder / f"bytes-{width}-{next(count)}"
        with target.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(data).hexdigest()

    skills = iter([skill(10 + i, width, rank, modules=16) for i in range(10)])
    get, opened, get_ratio = paired(ours, theirs)
    put, plain, put_ratio = paired(lambda: bank.put(next(skills), "more"), written)
    row = {
        "MB": len(data) / 1e6,
        "get and read, ms": get,
        "safe_open and read, ms": opened,
        "get / safe_open": get_ratio,
        "put, ms": put,
        "write + flush + hash, ms": plain,
        "put / (write + flush + hash)": put_ratio,
        "verify, MB/s": 0.0,
        "sha256 of the file, MB/s": len(data) / 1e3 / median_ms(lambda: file_digest(path)),
    }
    total = sum(each.stat().st_size for each in bank.root.rglob("*") if each.is_file()) / 1e6
    row["verify, MB/s"] = total / median_ms(lambda: bank.verify(workers=1), 5) * 1e3
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    texts = []
    for kind in ("growth", "bytes"):
        chosen = [{key: _short(value) for key, value in row["values"].items()} for row in rows if row["table"] == kind]
        if chosen:
            texts.append(markdown(chosen))
    return "\n\n".join(texts)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[100, 10_000, 100_000], help="numbers of versions; none leaves the first table as it was"
    )
    parser.add_argument("--quick", action="store_true", help="a small bank; stores nothing")
    parser.add_argument("--from-results", action="store_true", help="print what is stored and run nothing")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if options.from_results:
        print(tables(stored.load(RESULTS)))
        return
    torch.set_num_threads(1)
    sizes, shapes = ([60], [(64, 8)]) if options.quick else (options.sizes, [(512, 8), (4096, 8), (8192, 64)])
    where = stored.where() | {"threads": 1}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKILLBANK_CACHE"] = f"{folder}/cache"
        for size in sizes:
            rows.append({"table": "growth", "values": {"versions": size, **growth(size, Path(folder))}, **where})
        for width, rank in shapes:
            rows.append({"table": "bytes", "values": {"width": width, "rank": rank, **reading(width, rank, Path(folder))}, **where})
    print(tables(rows))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    if not options.quick:
        kept = [] if sizes else [row for row in stored.load(RESULTS) if row["table"] == "growth"]
        stored.store(RESULTS, [*kept, *rows])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
