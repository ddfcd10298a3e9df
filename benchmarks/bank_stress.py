"""Writers and readers of one bank at once, each a process: no version is lost, no number is given twice, nothing is read torn.

Every skill has one number in all of its entries, so that a torn one shows whatever its hashes say. Writers put, point aliases at what they put and
take some of it away; readers resolve, get, list and verify. Afterwards the bank is compared with what the writers were told.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import skillbank as sb
from skillbank.bank import UnknownRef

__all__ = ["stress"]

T = TypeVar("T")
NAMES = [f"walk-{number}" for number in range(8)]
_READS = ("resolve", "get", "list", "verify")


class Journal:
    """What one process did: times by operation, what it put and took away, and what went wrong; written to a file at its end."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.put: dict[str, int] = {}
        self.removed: list[str] = []
        self.wrong: list[str] = []

    def timed(self, name: str, run: Callable[[], T]) -> T:
        """Result of a call, its time noted."""
        started = time.perf_counter()
        result = run()
        self.times[name].append(time.perf_counter() - started)
        return result


def skill(number: int) -> sb.Skill:
    """A skill with one number in all of its entries."""
    return sb.Skill({name: (torch.full((2, 6), float(number)), torch.full((4, 2), float(number))) for name in ("a", "b")})


def _number(read: object) -> float | None:
    """The one number in all entries of a skill."""
    numbers = torch.cat([tensor.flatten() for tensor in read.tensors().values()]).unique() if isinstance(read, sb.Skill) else torch.empty(0)
    return float(numbers) if len(numbers) == 1 else None


def write(bank: sb.Bank, which: int, until: float, journal: Journal) -> None:
    """Put, alias and remove, every content once."""
    generator = random.Random(which)
    for number in count(1):
        if time.time() > until:
            return
        name, content = generator.choice(NAMES), which * 10**6 + number
        ref = journal.timed("put", partial(bank.put, skill(content), name, card={"base": "base"}))
        if str(ref) in journal.put:
            journal.wrong.append(f"{ref} was given twice")
        journal.put[str(ref)] = content
        if number % 5 == 0:
            journal.timed("alias", partial(bank.alias, ref.name, f"of-{which}", ref.number))
        elif number % 11 == 0:
            journal.removed.append(str(journal.timed("remove", partial(bank.remove, ref, reason="stress"))))


def read(bank: sb.Bank, which: int, until: float, journal: Journal) -> None:
    """Look at what there is; what was just removed may be missing."""
    generator = random.Random(which)
    for number in count():
        if time.time() > until:
            return
        try:
            ref = journal.timed("resolve", partial(bank.resolve, generator.choice(NAMES)))
            old = sb.Ref(ref.name, generator.randint(1, ref.number))
            for each in (ref, old):
                if _number(journal.timed("get", partial(bank.get, each))) is None:
                    journal.wrong.append(f"{each} was read torn")
            if number % 4 == 0:
                journal.timed("list", bank.list)
            if number % 16 == 0:
                journal.wrong += [str(problem) for problem in journal.timed("verify", partial(bank.verify, ref))]
        except UnknownRef:
            continue


def _process(work: Callable[[sb.Bank, int, float, Journal], None], root: Path, which: int, until: float, path: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    journal, code = Journal(), 1
    try:
        work(sb.Bank(root), which, until, journal)
        code = 0
    except Exception as error:
        journal.wrong.append(repr(error))
    finally:
        path.write_text(json.dumps(vars(journal)))
        os._exit(code)


def stress(seconds: float, each: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many writers and readers for so long; a row of counts, and rows of times in milliseconds."""
    bank = sb.Bank(folder / "stress")
    bank.put(sb.Base({"_target_": "torch.nn.Linear"}, {f"net.{name}.weight": torch.ones(4, 6) for name in ("a", "b")}), "base")
    for name in NAMES:
        bank.put(skill(0), name, card={"base": "base"})
    until = time.time() + seconds
    paths = [folder / f"journal-{number}.json" for number in range(2 * each)]
    pids = [_process(read if number % 2 else write, bank.root, number, until, path) for number, path in enumerate(paths)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    journals = [json.loads(path.read_text()) for path in paths]
    wrong = [text for journal in journals for text in journal["wrong"]] + [f"a process ended with {code}" for code in codes if code]
    wrong += _compared(bank, journals)
    for text in wrong[:20]:
        print(text, file=sys.stderr)
    times = {name: [time for journal in journals for time in journal["times"].get(name, ())] for name in ("put", "alias", "remove", *_READS)}
    counts = {"writers": each, "readers": each, "seconds": seconds, "versions": sum(len(journal["put"]) for journal in journals)}
    yield "stress", {**counts, "removed": sum(len(journal["removed"]) for journal in journals), "reads": len(times["get"]), "wrong": len(wrong)}
    for name, found in times.items():
        if found:
            p50, p95, p99 = (float(value) for value in np.percentile(found, (50, 95, 99)) * 1e3)
            row = {"operation": name, "calls": len(found), "p50, ms": p50, "p95, ms": p95, "p99, ms": p99, "max, ms": 1e3 * max(found)}
            yield "latency", {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def _compared(bank: sb.Bank, journals: list[dict[str, Any]]) -> Iterator[str]:
    """How the bank differs from what the writers were told."""
    yield from map(str, bank.verify())
    put: dict[str, int] = {f"{name}@1": 0 for name in NAMES}
    for journal in journals:
        yield from (f"{ref} was given twice" for ref in put.keys() & journal["put"].keys())
        put |= journal["put"]
    removed = {ref for journal in journals for ref in journal["removed"]}
    held = {str(entry.ref) for entry in bank.list("skill")}
    yield from (f"{ref} is lost" for ref in put.keys() - removed - held)
    yield from (f"{ref} is nobody's, or was removed" for ref in held - (put.keys() - removed))
    for name in NAMES:
        numbers = sorted(sb.Ref.parse(ref).number for ref in put if ref.startswith(f"{name}@"))
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{name} has gaps in {numbers}"
    for ref in sorted(held):
        if _number(bank.get(ref)) != put[ref]:
            yield f"{ref} has another content than was put"
