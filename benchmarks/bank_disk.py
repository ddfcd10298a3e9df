"""A bank on a disk that is full to the last kilobytes, and on one that is only read.

python -m benchmarks.bank_disk FOLDER       FOLDER is where a small disk of nothing else is mounted, by the user who may mount it anew

Every operation of bank_faults runs with nothing left, then with 4 KB more each time until it succeeds. Prints rows of that table as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

import skillbank as sb
from benchmarks.bank_faults import OPERATIONS, Outcome, cards, examine, prepare
from benchmarks.faults import ENDED, HUNG, ODD, apart, attempt

_PAGE = 4096


def fill(disk: Path, pages: int) -> Path:
    """A file that leaves so many pages of a disk."""
    path = disk / "filler"
    free = os.statvfs(disk)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize // _PAGE - pages) * _PAGE)
    return path


def full(name: str, disk: Path, origin: Path, step: int) -> Outcome:
    """One operation with ever more space, until it succeeds."""
    operation, outcome, code = OPERATIONS[name], Outcome(), ODD
    for pages in range(0, 200, step):
        work = disk / "work"
        shutil.copytree(origin, work)
        bank = sb.Bank(work / "bank")
        before, filler = cards(bank, name), fill(disk, pages)
        code = apart(partial(attempt, partial(operation.run, bank)))
        filler.unlink()
        outcome.met += code != ENDED
        outcome.odd += code in (ODD, HUNG)
        examine(operation, bank, before, outcome, done=code == ENDED)
        shutil.rmtree(work)
        if code == ENDED:
            break
    return outcome


def read_only(name: str, disk: Path, origin: Path) -> Outcome:
    """One operation on a disk that takes nothing."""
    operation, outcome = OPERATIONS[name], Outcome()
    shutil.copytree(origin, disk / "work")
    bank = sb.Bank(disk / "work/bank")
    before = cards(bank, name)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code = apart(partial(attempt, partial(operation.run, bank)))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    outcome.met += code != ENDED
    outcome.odd += code in (ODD, HUNG)
    examine(operation, bank, before, outcome, done=code == ENDED)
    shutil.rmtree(disk / "work")
    return outcome


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", type=Path)
    parser.add_argument("--quick", action="store_true", help="one operation, with steps of 32 KB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKILLBANK_CACHE"] = f"{folder}/cache"
        prepare(Path(folder) / "origin")
        for name in list(OPERATIONS)[: 1 if options.quick else None]:
            origin = Path(folder) / "origin"
            print(json.dumps(full(name, options.disk, origin, 8 if options.quick else 1).row(name, "disk full, a real one")))
            print(json.dumps(read_only(name, options.disk, origin).row(name, "disk read-only, a real one")), flush=True)


if __name__ == "__main__":
    main()
