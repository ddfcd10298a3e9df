"""Behaviour data of Bullet-Safety-Gym's balls and cars: what simple controllers do, chosen as the data in demos/ball.

make bullet                                                                             # once: .venv-bullet
.venv-bullet/bin/python -W ignore -m benchmarks.bullet.data car_run car_circle          # writes runs/bullet/car_run.npz, car_run_safe.npz, ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.ball_data import choose, row
from benchmarks.bullet.cars import SWEEPS, accepted
from benchmarks.bullet.simulation import sweep


def main() -> None:
    """Write the files of the tasks that are named, and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=SWEEPS)
    parser.add_argument("--swept", type=int, help="trajectories; 2000 of a ball, 900 of car_run and 800 of car_circle where it is not given")
    parser.add_argument("--folder", type=Path, default=Path("runs/bullet"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        task = SWEEPS[name]
        done = sweep(task.environment, task.kind, arguments.swept or task.swept)
        data, best = choose(done, task.most, task.most_cost, task.safe_cost, task.most_safe)
        for leaf, which in {name: data, f"{name}_safe": best}.items():
            np.savez_compressed(folder / f"{leaf}.npz", **vars(done[which]))
            print(row(folder / f"{leaf}.npz", done[which]), flush=True)
        for what, figure in accepted(task, done[data], done[best]).items():
            print(f"{name}, {what}: {figure}", flush=True)


if __name__ == "__main__":
    main()
