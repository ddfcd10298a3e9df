"""Changed bytes in every file of a bank, and a clock that runs backwards.

Of every changed byte, `verify` must name version and file, and nothing may be read that it is part of. The bank has been read before, so that it is
trusted (see `skillbank.bank.index`); of every second change the time stamps are put back.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import skillbank as sb

__all__ = ["clock", "damage"]


def skill(seed: int) -> sb.Skill:
    """A small skill."""
    generator = torch.Generator().manual_seed(seed)
    return sb.Skill({name: (torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)) for name in ("a", "b")})


def prepare(root: Path) -> sb.Bank:
    """A bank with something of every kind: a base, skills, a merge, a gate, aliases and a tombstone."""
    bank = sb.Bank(root)
    bank.put(sb.Base({"_target_": "torch.nn.Linear"}, {f"net.{name}.weight": torch.ones(4, 6) for name in ("a", "b")}), "base")
    for seed in range(3):
        bank.put(skill(seed), "walk", card={"base": "base", "metrics": {"return": 1.5 * seed}, "tags": ["trial"], "notes": "Walks."})
    bank.put(sb.Composition("base", ("walk@1", "walk@3"), merge={"method": "sum", "weights": [0.5, 0.5]}), "both")
    gate = {"_target_": "skillbank.gate.MLPGate", "context_dim": 3}
    bank.put(sb.Composition("base", ("walk@1", "walk@3"), gate=gate, tensors={"w": torch.eye(3)}), "gated")
    bank.alias("walk", "best", 1)
    bank.alias("walk", "best", 3, protect=True)
    bank.remove("walk@2", reason="It limps.")
    return bank


def _refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except ValueError:
        return True
    return False


def damage(count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Change bytes, one at a time and put back, as many in every file as in every other; rows by kind of file."""
    bank, generator = prepare(folder / "damaged"), random.Random(0)
    files = [path for path in sorted(bank.root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    time.sleep(2.1)  # until time stamps are believed
    for entry in bank.list():
        bank.get(entry.ref)
    changed, missed, read = Counter[str](), Counter[str](), Counter[str]()
    for number in range(count):
        path = files[number % len(files)]
        *_, name, version = path.relative_to(bank.root).parent.parts if path.name != "aliases.json" else (path.parent.name, "best")
        ref = name if path.name == "aliases.json" else f"{name}@{version}"
        data, stamp = path.read_bytes(), path.stat()
        place = generator.randrange(len(data))
        bad = bytearray(data)
        bad[place] ^= generator.randrange(1, 256)
        path.write_bytes(bad)
        if number % 2:
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        found = {(problem.ref, problem.file) for problem in bank.verify(None if path.name == "tombstone.json" else ref)}
        changed[path.name] += 1
        missed[path.name] += (ref, path.name) not in found
        read[path.name] += not _refused(partial(bank.get, f"{name}@{version}"))
        path.write_bytes(data)
    assert not bank.verify()
    yield from (
        {"file": name, "bytes changed": changed[name], "missed by verify": missed[name], "read by get": read[name]} for name in sorted(changed)
    )
    sums = {"bytes changed": changed.total(), "missed by verify": missed.total(), "read by get": read.total()}
    yield {"file": "all", **sums}


def clock(steps: int, folder: Path) -> dict[str, Any]:
    """Put, remove and list while the clock, whole seconds of it, jumps back and forth: listings are compared with what lies in the folders.

    The clocks of the index and of the cards and the time stamps of folders are played: no process may set the real one.
    """
    now, generator = [1_700_000_000], random.Random(0)

    class Played(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(now[0], tz)

    played = SimpleNamespace(time=lambda: now[0], time_ns=lambda: now[0] * 10**9)
    bank, wrong, lost = sb.Bank(folder / "clock"), 0, 0
    expected: set[str] = set()
    with patch("skillbank.bank.index.time", played), patch("skillbank.bank.store.datetime", Played), patch("skillbank.bank.removal.datetime", Played):
        for step in range(steps):
            now[0] += generator.choice((-3600, -3, -2, -1, 0, 1, 2, 3, 3600))
            if step % 10 == 9:
                expected.discard(str(bank.remove(generator.choice(sorted(expected)))))
            else:
                expected.add(str(bank.put(skill(step), f"walk-{step % 3}")))
            for here, _, _ in os.walk(bank.root):
                if os.stat(here).st_mtime > now[0] + 10**6:  # changed just now, by the real clock
                    os.utime(here, (now[0], now[0]))
            wrong += {str(entry.ref) for entry in bank.list()} != expected
            lost += not all(bank.place.has(sb.Ref.parse(ref)) for ref in expected)
        problems = bank.verify()
    found = {"damaged": len(problems), "lost": lost, "repeat failed": wrong, "other errors": 0}
    return {"operation": "put, remove, list", "fault": "the clock jumps back and forth", "met": steps, **found}
