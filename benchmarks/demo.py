"""`make demo`: a walker is taught to walk with ten demonstrations, on a laptop CPU, in a few minutes.

A copy of the shipped base goes into a bank under runs/demo; a skill and, beside it, a policy from scratch are trained on the same ten
demonstrations, each on a core of its own; then the skill is composed with the base, and everything is evaluated in MuJoCo.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from skillbank import Bank

ROOT = Path(__file__).parents[1]
BANK = "runs/demo/bank"
STEPS = 3000


def start(script: str, *overrides: str, quiet: bool = False) -> subprocess.Popen[bytes]:
    """One of the repository's two entries, in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    print("$ python", script, *overrides, flush=True)
    command = [sys.executable, script, *overrides, f"bank={BANK}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL if quiet else None)


def finish(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for all; the first that failed ends the demo with its exit code."""
    for process in processes:
        if process.wait():
            raise SystemExit(process.returncode)


def main() -> None:
    """Run it."""
    started = time.perf_counter()
    os.chdir(ROOT)
    Bank(BANK).put(Bank("adapters").get("walker/stand"), "walker/stand")
    steps = (f"fit.steps={STEPS}", "episodes=0")
    skill = start("train.py", "task=walker/walk", "base=walker/stand", *steps)
    scratch = start("train.py", "task=walker/walk", "experiment=paper", "name=walker/walk-scratch", *steps, quiet=True)
    finish(skill, scratch)
    compare = "compare=[walker/walk-scratch]"
    finish(start("compose.py", "task=walker/walk", "skills=[walker/walk]", "gate=mlp", "fit.steps=200", "episodes=5", compare))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{time.perf_counter() - started:.0f} s; the largest process took {memory:.1f} GB")


if __name__ == "__main__":
    main()
