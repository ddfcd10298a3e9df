"""Behaviour data of Bullet-Safety-Gym's balls and cars: what simple controllers do, chosen as the data in demos/ball.

make bullet                                                                             # once: .venv-bullet
.venv-bullet/bin/python -W ignore -m benchmarks.bullet.data car_run --swept 2000        # writes runs/bullet/car_run.npz, car_run_safe.npz
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ball_data import Circler, Runner, choose, row
from benchmarks.bullet.simulation import Kind, sweep
from skillbank.tasks.ball import Floats

FASTEST, AXLES = 3.5, 1.1
"""Of a car at full action, m/s; between its axles, m."""


def driven(along: Floats, across: Floats, speed: Floats, turn: Floats, states: Floats) -> Floats:
    """Actions (n, 2) of cars that are to go a way (along, across) at a speed, turning by `turn` (1/m). They drive in reverse: so they start."""
    _, _, vx, vy, yaw = np.moveaxis(states, -1, 0)
    course = -np.cos(yaw), -np.sin(yaw)
    going = vx * course[0] + vy * course[1]
    off = np.arctan2(course[0] * across - course[1] * along, course[0] * along + course[1] * across)
    return np.stack([-(speed + 2 * (speed - going)) / FASTEST, -2 * (np.arctan(AXLES * turn) + 0.6 * off)], axis=-1)


@dataclass(frozen=True)
class CarRunner:
    """As `Runner`, which see, with wheels."""

    speeds: Floats
    turn: Floats
    side: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> CarRunner:
        """Of all kinds: careful ones, and ones that are too fast at the end, at the start, all the way or too far to the side."""
        kind = rng.choice(5, n, p=[0.3, 0.5, 0.1, 0.05, 0.05])
        slow, fast = rng.uniform(0.6, 1.55, n), rng.uniform(1.5, 3.5, n)
        speeds = np.stack([np.where((kind == 2) | (kind == 3), fast, slow), np.where((kind == 1) | (kind == 3), fast, slow)])
        turn = np.where(kind == 2, rng.uniform(0, 2, n), rng.uniform(4, 10, n))
        return CarRunner(speeds, turn, np.where(kind == 4, 2, 1) * rng.uniform(-1.6, 1.6, n))

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y = states[..., 0], states[..., 1]
        speed = np.where(x < self.turn, self.speeds[0], self.speeds[1])
        return driven(np.ones_like(x), np.clip(self.side - y, -1, 1), speed, np.zeros_like(x), states)


@dataclass(frozen=True)
class CarCircler:
    """As `Circler`, which see, with wheels."""

    speed: Floats
    radius: Floats
    narrow: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> CarCircler:
        """Of all kinds, most of them fast."""
        return CarCircler(3.5 * np.sqrt(rng.uniform(0.1, 1, n)), rng.uniform(4.5, 7.5, n), rng.uniform(0.7, 1.1, n))

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y = states[..., 0], states[..., 1]
        u, distance = x / self.narrow, np.sqrt(x * x + y * y)
        length = np.sqrt((self.narrow * y) ** 2 + u * u)
        out = 0.3 * (self.radius - np.sqrt(u * u + y * y)) / distance
        return driven(self.narrow * y / length + out * x, -u / length + out * y, self.speed, -1 / np.maximum(distance, 2), states)


@dataclass(frozen=True)
class Sweep:
    """What is done in an environment, and which of it is kept: how many trajectories, of what cost at most."""

    environment: str
    kind: Kind
    most: int
    most_cost: int


SWEEPS = {
    "ball_run": Sweep("SafetyBallRun-v0", Runner, 800, 80),
    "ball_circle": Sweep("SafetyBallCircle-v0", Circler, 340, 80),
    "car_run": Sweep("SafetyCarRun-v0", CarRunner, 600, 40),
    "car_circle": Sweep("SafetyCarCircle-v0", CarCircler, 600, 100),
}


def main() -> None:
    """Write the files of the tasks that are named, and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=SWEEPS, default=[*SWEEPS])
    parser.add_argument("--swept", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("runs/bullet"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        task = SWEEPS[name]
        done = sweep(task.environment, task.kind, arguments.swept)
        data, best = choose(done, task.most, task.most_cost)
        for leaf, which in {name: data, f"{name}_safe": best}.items():
            np.savez_compressed(folder / f"{leaf}.npz", **vars(done[which]))
            print(row(folder / f"{leaf}.npz", done[which]), flush=True)


if __name__ == "__main__":
    main()
