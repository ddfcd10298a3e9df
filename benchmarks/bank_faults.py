"""A bank under faults: every operation fails at every one of its file operations, in many ways, and is killed at random moments.

python -m benchmarks.bank_faults                    all tables, those of bank_disk, bank_damage and bank_stress too
python -m benchmarks.bank_faults --quick            a little of each; stores nothing
python -m benchmarks.bank_faults --from-results     the tables of benchmarks/results/bank_faults.jsonl

After each fault the bank must verify, hold every version that it held, to the byte, and show a new one whole or not at all; what was said to be done
must be done, or it is lost. Then `gc` runs and the operation is repeated, which must succeed. `faults.py` says what the faults are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import skillbank as sb
from benchmarks import stored
from benchmarks.bank_damage import clock, damage
from benchmarks.bank_stress import stress
from benchmarks.faults import ENDED, FAULTS, HUNG, ODD, SURVIVED, Fault, apart, attempt, suffer
from skillbank.report import markdown

RESULTS = Path(__file__).parent / "results" / "bank_faults.jsonl"
Row = dict[str, Any]


class Operation(NamedTuple):
    """Something to do with a bank, and whether it is done."""

    run: Callable[[sb.Bank], object]
    done: Callable[[sb.Bank], bool]


@dataclass
class Outcome:
    """What happened to one operation under one fault: how often it was met, and what was found afterwards."""

    met: int = 0
    damaged: int = 0
    lost: int = 0
    stuck: int = 0
    odd: int = 0

    def row(self, operation: str, fault: str) -> Row:
        """Row of the table."""
        counts = {"damaged": self.damaged, "lost": self.lost, "repeat failed": self.stuck, "other errors": self.odd}
        return {"operation": operation, "fault": fault, "met": self.met, **counts}


def skill(seed: int) -> sb.Skill:
    """A small skill."""
    generator = torch.Generator().manual_seed(seed)
    return sb.Skill({name: (torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)) for name in ("a", "b")})


def prepare(root: Path) -> sb.Bank:
    """A bank with a base, three versions of a skill and an alias; beside it another one to push to and pull from."""
    bank = sb.Bank(root / "bank")
    bank.put(sb.Base({"_target_": "torch.nn.Linear"}, {f"net.{name}.weight": torch.ones(4, 6) for name in ("a", "b")}), "base")
    for seed in range(3):
        bank.put(skill(seed), "walk", card={"base": "base"})
    bank.alias("walk", "best", 1)
    other = sb.Bank(root / "other")
    other.pull(str(bank.root))
    other.put(skill(9), "run", card={"base": "base"})
    other.put(skill(8), "run", card={"base": "base"})
    other.alias("run", "best", 2)
    (bank.root / ".tmp-left").mkdir()
    return bank


def _arrived(bank: sb.Bank) -> bool:
    return bank.versions("run") == [1, 2] and bank.aliases("run") == {"best": 2}


OPERATIONS: dict[str, Operation] = {
    "put": Operation(lambda bank: bank.put(skill(7), "walk", card={"base": "base"}), lambda bank: bank.versions("walk") == [1, 2, 3, 4]),
    "put again": Operation(lambda bank: bank.put(skill(2), "walk", card={"base": "base"}), lambda bank: bank.versions("walk") == [1, 2, 3]),
    "put a name": Operation(lambda bank: bank.put(skill(7), "new/deep", card={"base": "base"}), lambda bank: bank.versions("new/deep") == [1]),
    "alias": Operation(lambda bank: bank.alias("walk", "best", 2), lambda bank: bank.aliases("walk") == {"best": 2}),
    "remove": Operation(lambda bank: 2 in bank.versions("walk") and bank.remove("walk@2"), lambda bank: bank.versions("walk") == [1, 3]),
    "gc": Operation(lambda bank: bank.gc(), lambda bank: not list(bank.root.glob(".tmp-*"))),
    "push": Operation(lambda bank: sb.Bank(bank.root.parent / "other").push(str(bank.root)), _arrived),
    "pull": Operation(lambda bank: bank.pull(str(bank.root.parent / "other")), _arrived),
}


def cards(bank: sb.Bank, name: str) -> dict[str, bytes]:
    """What must still be there after an operation, by reference."""
    return {str(entry.ref): entry.data for entry in bank.list() if name != "remove" or str(entry.ref) != "walk@2"}


def examine(operation: Operation, bank: sb.Bank, before: dict[str, bytes], outcome: Outcome, *, done: bool) -> None:
    """Look at the bank after a fault, where the operation was said to be `done` or was not, then sweep and repeat."""
    try:
        problems = [str(problem) for problem in bank.verify()]
        held = {str(entry.ref): entry.data for entry in bank.list()}
        outcome.lost += any(held.get(ref) != card for ref, card in before.items()) or (done and not operation.done(bank))
    except (OSError, ValueError, KeyError) as error:
        problems = [repr(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    outcome.damaged += bool(problems)
    try:
        bank.gc()
        operation.run(bank)
        outcome.stuck += bool(bank.verify()) or not operation.done(bank) or any(bank.root.rglob(".tmp-*"))
    except (OSError, ValueError, KeyError) as error:
        print(repr(error), file=sys.stderr)
        outcome.stuck += 1


def copies(folder: Path) -> Iterator[sb.Bank]:
    """A bank as it was prepared, again and again."""
    if not (folder / "origin").exists():
        prepare(folder / "origin")
    while True:
        shutil.copytree(folder / "origin", folder / "work")
        yield sb.Bank(folder / "work/bank")
        shutil.rmtree(folder / "work")


def study(name: str, fault: Fault, points: Iterable[int], folder: Path) -> Outcome:
    """Let a fault meet one operation at these points until it has no more, and count what is wrong afterwards."""
    operation, outcome = OPERATIONS[name], Outcome()
    banks = copies(folder)
    for point in points:
        bank = next(banks)
        before, after = cards(bank, name), bank.root.with_name("after")
        code = suffer(fault, point, bank.root, partial(operation.run, bank))
        if after.exists():
            shutil.rmtree(bank.root)
            after.rename(bank.root)
        outcome.met += code != ENDED
        outcome.odd += code in (ODD, HUNG)
        examine(operation, bank, before, outcome, done=code in (ENDED, SURVIVED))
        if code == ENDED:
            break
    shutil.rmtree(folder / "work")
    return outcome


def kills(name: str, wanted: int, folder: Path) -> Outcome:
    """Kill one operation at random moments until that many kills found it at work."""
    operation, outcome, generator = OPERATIONS[name], Outcome(), random.Random(name)
    banks = copies(folder)

    def run() -> int:
        return attempt(partial(operation.run, bank))

    times = []
    for _ in range(3):
        bank, started = next(banks), time.perf_counter()
        apart(run)
        times.append(time.perf_counter() - started)
    while outcome.met < wanted:
        bank = next(banks)
        before = cards(bank, name)
        code = apart(run, after=generator.uniform(0, sorted(times)[1]))
        outcome.met += code < 0
        if code < 0:
            examine(operation, bank, before, outcome, done=False)
    shutil.rmtree(folder / "work")
    return outcome


def disks(folder: Path, quick: bool) -> list[Row]:
    """Rows of bank_disk on a small disk in memory, which is mounted where nobody else sees it; none where that is not allowed."""
    place = folder / "disk"
    place.mkdir()
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(place)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        print("no disk can be mounted here: a full and a read-only one are only played", file=sys.stderr)
        return []
    run = [sys.executable, "-m", "benchmarks.bank_disk", str(place), *["--quick"] * quick]
    done = subprocess.run([*command, *run], cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Row]]:
    """Name of the table and row, one after the other."""
    quick = options.quick
    for name in OPERATIONS:
        yield "kills", study(name, FAULTS["killed"], range(0, 500, 11 if quick else 1), folder).row(name, "killed at every file operation")
        yield "kills", kills(name, 1 if quick else -(-options.kills // len(OPERATIONS)), folder).row(name, "killed at random moments")
    for name in ("put a name", "remove", "push") if quick else OPERATIONS:
        for fault in list(FAULTS)[1:]:
            yield "faults", study(name, FAULTS[fault], range(3, 4) if quick else range(500), folder).row(name, fault)
    for row in disks(folder, quick):
        yield "faults", row
    yield "faults", clock(20 if quick else 300, folder)
    for row in damage(50 if quick else options.damages, folder):
        yield "damage", row
    for table, row in stress(0.5 if quick else options.seconds, 2 if quick else 8, folder):
        yield table, row


def tables(rows: list[Row]) -> str:
    """All tables; kills with their sums, and other faults summed over the operations."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["table"], []).append(row["values"])
    found["faults"] = [
        _summed([row for row in found["faults"] if row["fault"] == fault]) for fault in dict.fromkeys(row["fault"] for row in found["faults"])
    ]
    for fault in dict.fromkeys(row["fault"] for row in found["kills"]):
        total = _summed([row for row in found["kills"] if row["fault"] == fault])
        found["kills"].append({**total, "operation": f"all {total['operations']}"})
    return "\n\n".join(markdown(each) for each in found.values())


def _summed(rows: list[Row]) -> Row:
    counts = {column: sum(row[column] for row in rows) for column in rows[0] if column not in ("operation", "fault")}
    return {"fault": rows[0]["fault"], "operations": len(rows), **counts}


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "a little of each")
    parser.add_argument("--kills", type=int, default=1000, help="kills at random moments that hit, over all operations")
    parser.add_argument("--damages", type=int, default=10_000, help="changed bytes")
    parser.add_argument("--seconds", type=float, default=60, help="how long writers and readers work")
    options = parser.parse_args()
    if options.from_results:
        print(tables(stored.load(RESULTS)))
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKILLBANK_CACHE"] = f"{folder}/cache"
        started = time.perf_counter()
        for table, values in measure(options, Path(folder)):
            rows.append({"table": table, "values": values})
            print(f"{time.perf_counter() - started:6.0f} s", *values.values(), file=sys.stderr, flush=True)
    print(tables(rows))
    if not options.quick:
        stored.store(RESULTS, rows)
    wrong = {"damaged", "lost", "repeat failed", "other errors", "missed by verify", "read by get", "wrong"}
    if any(row["values"].get(column) for row in rows for column in wrong):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
