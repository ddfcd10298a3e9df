"""A bank under faults: every operation is killed at every one of its file operations, and many are killed at random moments.

python -m benchmarks.bank_faults            the table
python -m benchmarks.bank_faults --quick    a few points of each; stores nothing
python -m benchmarks.bank_faults --from-results     the table of benchmarks/results/bank_faults.jsonl

After each kill the bank must verify, hold every version that it held, and show the new one whole or not at all; then `gc` runs and the operation is
repeated, which must succeed. A point is an open, rename, remove, mkdir, rmdir or fsync, before which the process gets SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import skillbank as sb
from skillbank.report import markdown

RESULTS = Path(__file__).parent / "results" / "bank_faults.jsonl"
EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
Operation = Callable[[sb.Bank], object]


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
    (bank.root / ".tmp-left").mkdir()
    return bank


OPERATIONS: dict[str, Operation] = {
    "put": lambda bank: bank.put(skill(7), "walk", card={"base": "base"}),
    "put again": lambda bank: bank.put(skill(2), "walk", card={"base": "base"}),
    "alias": lambda bank: bank.alias("walk", "best", 2),
    "remove": lambda bank: bank.remove("walk@2") if 2 in bank.versions("walk") else None,
    "gc": lambda bank: bank.gc(),
    "push": lambda bank: sb.Bank(bank.root.parent / "other").push(str(bank.root)),
    "pull": lambda bank: bank.pull(str(bank.root.parent / "other")),
}


@dataclass
class Outcome:
    """What happened to one kind of operation: how often it was killed, and what was found afterwards."""

    killed: int = 0
    damaged: int = 0
    lost: int = 0
    stuck: int = 0


def killed_at(point: int, operation: Operation, bank: sb.Bank, after: float | None = None) -> bool:
    """Run an operation in a process that is killed before its file operation number `point`, or `after` seconds; whether it was."""
    pid = os.fork()
    if not pid:
        left = [point]

        def count(event: str, _arguments: object = None) -> None:
            if event in EVENTS or event == "os.fsync":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if after is None:
            sys.addaudithook(count)
            fsync = os.fsync

            def counted(fd: Any) -> None:
                count("os.fsync")
                fsync(fd)

            os.fsync = counted
        try:
            operation(bank)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def examine(operation: Operation, bank: sb.Bank, before: set[str], outcome: Outcome, removes: bool) -> None:
    """Look at the bank after a kill, then sweep and repeat."""
    held = {str(entry.ref) for entry in bank.list()}
    for problem in (problems := bank.verify()):
        print(problem, file=sys.stderr)
    outcome.damaged += bool(problems)
    outcome.lost += not before - ({"walk@2"} if removes else set()) <= held
    try:
        bank.gc()
        operation(bank)
        outcome.stuck += bool(bank.verify()) or any(bank.root.glob(".tmp-*"))
    except (OSError, ValueError, KeyError):
        outcome.stuck += 1


def study(name: str, points: list[int | float], folder: Path) -> Outcome:
    """Kill one operation at given points (integers), or after given seconds, and count what is wrong afterwards."""
    operation, outcome = OPERATIONS[name], Outcome()
    origin = prepare(folder / "origin")
    before = {str(entry.ref) for entry in origin.list()}
    for point in points:
        work = folder / "work"
        shutil.copytree(folder / "origin", work)
        bank = sb.Bank(work / "bank")
        killed = killed_at(int(point), operation, bank, point if isinstance(point, float) else None)
        if not killed and not isinstance(point, float):
            shutil.rmtree(work)
            break  # it has no more file operations than that
        outcome.killed += killed
        examine(operation, bank, before, outcome, name == "remove")
        shutil.rmtree(work)
    shutil.rmtree(folder / "origin")
    return outcome


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of each operation")
    parser.add_argument("--from-results", action="store_true", help="print what is stored and run nothing")
    parser.add_argument("--random", type=int, default=1000, help="kills at random moments, over all operations")
    options = parser.parse_args()
    if options.from_results:
        print(markdown([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    generator = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in OPERATIONS:
            every = study(name, list(range(0, 500, 7 if options.quick else 1)), Path(folder))
            each = (7 if options.quick else options.random) // len(OPERATIONS)
            moments = study(name, [generator.uniform(0, 0.03) for _ in range(each)], Path(folder))
            for kind, found in (("every file operation", every), ("random moments", moments)):
                counts = {"damaged": found.damaged, "versions lost": found.lost, "repeat failed": found.stuck}
                rows.append({"operation": name, "killed at": kind, "killed": found.killed, **counts})
                print(name, kind, found, file=sys.stderr, flush=True)
    print(markdown(rows))
    if not options.quick:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any(row["damaged"] or row["versions lost"] or row["repeat failed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
