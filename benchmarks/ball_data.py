"""Behaviour data of the ball's two tasks: what simple controllers do at all speeds, thinned to a bit of every cost and return.

python -m benchmarks.ball_data [--folder demos/ball]
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skillbank.tasks.ball import PUSH, TASKS, Floats

NOISE = (0.0, 0.2, 0.5)
"""Standard deviations of what is added to actions; every trajectory has one of them."""
SWEPT, MOST_COST, GRID, PER_CELL = 10_000, 80, (60, 50), 4
SAFE_COST, IMITATED = 2, 30
SEED = 0


@dataclass(frozen=True, eq=False)
class Trajectories:
    """E whole episodes of T steps.

    Args:
        observations: (E, T, D), what every action saw.
        actions: (E, T, 2), as executed.
        rewards: (E, T).
        costs: (E, T), 0 or 1.
        finals: (E, D), the observation after the last step.

    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    costs: NDArray[np.float32]
    finals: NDArray[np.float32]

    @property
    def returns(self) -> Floats:
        """Sum of the rewards of every trajectory, (E,)."""
        return self.rewards.sum(axis=1, dtype=np.float64)

    @property
    def cost(self) -> Floats:
        """Sum of the costs of every trajectory, (E,)."""
        return self.costs.sum(axis=1, dtype=np.float64)

    def __getitem__(self, which: NDArray[np.int64]) -> Trajectories:
        """Those trajectories."""
        return Trajectories(**{name: array[which] for name, array in vars(self).items()})


@dataclass(frozen=True)
class Runner:
    """Holds a speed along x and a distance to the side; another speed from some place on.

    Args:
        speeds: before and after `turn`, m/s, (2,) or (2, n).
        turn: where the speed changes, m.
        side: y to be held, m.

    """

    speeds: Floats
    turn: Floats
    side: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> Runner:
        """Of all kinds: careful ones, and ones that are too fast at the end, at the start, all the way or too far to the side."""
        kind = rng.choice(5, n, p=[0.2, 0.73, 0.03, 0.02, 0.02])
        slow, fast = rng.uniform(0.5, 2.6, n), rng.uniform(3, 30, n)
        speeds = np.stack([np.where((kind == 2) | (kind == 3), fast, slow), np.where((kind == 1) | (kind == 3), fast, slow)])
        return Runner(speeds, 5 * rng.uniform(0, 1, n) ** 2, np.where(kind == 4, 2, 1) * rng.uniform(-1.6, 1.6, n))

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y, vx, vy = np.moveaxis(states, -1, 0)[:4]
        return np.stack([np.where(x < self.turn, *self.speeds) - vx, 0.5 * (self.side - y) - 0.5 * vy], axis=-1)


@dataclass(frozen=True)
class Circler:
    """Holds a speed on an ellipse around the centre.

    Args:
        speed: m/s, clockwise.
        radius: along y, m.
        narrow: the ellipse's half axis along x as a share of `radius`.

    """

    speed: Floats
    radius: Floats
    narrow: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> Circler:
        """Of all kinds, most of them fast."""
        return Circler(8.5 * np.sqrt(rng.uniform(0.1, 1, n)), rng.uniform(5, 8, n), rng.uniform(0.7, 1.1, n))

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y, vx, vy = np.moveaxis(states, -1, 0)[:4]
        u, distance = x / self.narrow, np.sqrt(x * x + y * y)
        along = self.speed / np.sqrt((self.narrow * y) ** 2 + u * u)
        out = (self.radius - np.sqrt(u * u + y * y)) / distance
        turn = (vx * vx + vy * vy) / (PUSH * distance * distance)
        return np.stack([along * self.narrow * y + out * x - vx - turn * x, -along * u + out * y - vy - turn * y], axis=-1)


KINDS: dict[str, type[Runner | Circler]] = {"run": Runner, "circle": Circler}
KEPT = {"run": 800, "circle": 340}
"""Trajectories at most, so that a file stays under 2 MB."""


class Controller(Protocol):
    """Actions by states, for as many as it was made for."""

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2) for states (n, 4) or more, not clipped."""
        ...


class Kind(Protocol):
    """A class of controllers."""

    def random(self, rng: np.random.Generator, n: int) -> Controller:
        """Controllers for n balls or cars at once."""
        ...


class Simulation(Protocol):
    """What can be rolled out: a `Ball`, or Bullet itself."""

    @property
    def steps(self) -> int:
        """Steps of an episode."""
        ...

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """States to begin with."""
        ...

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observations of states."""
        ...

    def step(self, states: Floats, actions: Floats) -> tuple[Floats, Floats, Floats]:
        """States after one step, rewards and costs."""
        ...


def roll_out(task: Simulation, controller: Controller, rng: np.random.Generator, n: int, noise: Floats | None = None) -> Trajectories:
    """One episode of n balls each, with actions rounded to 1 / 128; `noise` (n, 1) is drawn from NOISE where it is not given."""
    states, noise = task.start(rng, n), rng.choice(NOISE, (n, 1)) if noise is None else noise
    rows: list[tuple[NDArray[np.floating[Any]], ...]] = []
    for _ in range(task.steps):
        observations = task.observe(states)
        actions = np.clip(np.round(128 * (controller(states) + noise * rng.standard_normal((n, 2)))) / 128, -1, 1)
        states, rewards, costs = task.step(states, actions)
        rows.append((observations, actions, rewards, costs))
    columns = zip(("observations", "actions", "rewards", "costs"), zip(*rows, strict=True), strict=True)
    return Trajectories(**{name: np.stack(each, axis=1).astype(np.float32) for name, each in columns}, finals=task.observe(states))


def choose(
    sweep: Trajectories, most: int, most_cost: int = MOST_COST, safe_cost: int = SAFE_COST, most_safe: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which trajectories of a sweep are the data, and which of those are to be imitated.

    To be imitated: the first 30 that cost `safe_cost` at most and whose return is in the top tenth of all of such a cost. The data: these, and then
    all that cost `most_cost` at most, as long as there are fewer than PER_CELL in a cell of 60 costs x 50 returns, and fewer than `most` in all; of
    those that cost `safe_cost` at most the first `most_safe`.
    """
    safe = np.flatnonzero(sweep.cost <= safe_cost)
    best = safe[sweep.returns[safe] >= np.quantile(sweep.returns[safe], 0.9)][:IMITATED]
    every = np.flatnonzero(sweep.cost <= most_cost)
    if most_safe is not None:
        every = np.setdiff1d(every, np.setdiff1d(safe, best)[max(most_safe - len(best), 0) :])
    every = np.concatenate([best, np.setdiff1d(every, best)])
    cost, returns = sweep.cost[every], sweep.returns[every]
    columns = np.minimum(cost / most_cost * GRID[0], GRID[0] - 1).astype(int)
    rows = np.minimum((returns - returns.min()) / np.ptp(returns) * GRID[1], GRID[1] - 1).astype(int)
    _, cell, counts = np.unique(columns * GRID[1] + rows, return_inverse=True, return_counts=True)
    order = np.argsort(cell, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[cell[order]]
    kept = every[(rank < PER_CELL) | (np.arange(len(every)) < len(best))][:most]
    return np.sort(kept), best


def generate(name: str) -> tuple[Trajectories, Trajectories, Trajectories]:
    """The sweep of a task, the data and the imitation set: the same with every call."""
    rng = np.random.default_rng(SEED)
    sweep = roll_out(TASKS[name], KINDS[name].random(rng, SWEPT), rng, SWEPT)
    data, best = choose(sweep, KEPT[name])
    return sweep, sweep[data], sweep[best]


def row(path: Path, data: Trajectories) -> str:
    """A file's line of the table in demos/README.md."""
    figures = " | ".join(f"{each.mean():.0f} | {each.min():.0f} | {each.max():.0f}" for each in (data.returns, data.cost))
    return f"| {path.parent.name}/{path.name} | {len(data.returns)} | {figures} | {hashlib.sha256(path.read_bytes()).hexdigest()} |"


def main() -> None:
    """Write the files and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demos/ball"))
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        started = perf_counter()
        _, data, imitated = generate(name)
        print(f"{name}: {SWEPT * task.steps / (perf_counter() - started):,.0f} steps/s")
        for leaf, each in {name: data, f"{name}_safe": imitated}.items():
            np.savez_compressed(folder / f"{leaf}.npz", **vars(each))
            print(row(folder / f"{leaf}.npz", each))


if __name__ == "__main__":
    main()
