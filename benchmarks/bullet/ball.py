"""The ball's tasks in Bullet itself: how close `skillbank.tasks.ball` comes.

make bullet    # .venv-bullet, and 200 trajectories of each task beside the same actions without Bullet
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.ball_data import KINDS, Trajectories
from benchmarks.bullet.simulation import sweep
from skillbank.tasks.ball import TASKS, Ball


def again(task: Ball, real: Trajectories) -> Trajectories:
    """The same actions from the same places, without Bullet."""
    states = np.concatenate([10.0 * real.observations[:, 0, :2], 5.0 * real.observations[:, 0, 2:4]], axis=1).astype(np.float64)
    observations, rewards, costs = [], np.zeros(real.rewards.shape, np.float32), np.zeros(real.costs.shape, np.float32)
    for step in range(task.steps):
        observations.append(task.observe(states))
        states, rewards[:, step], costs[:, step] = task.step(states, real.actions[:, step])
    return Trajectories(np.stack(observations, axis=1), real.actions, rewards, costs, task.observe(states))


def compared(name: str, real: Trajectories) -> str:
    """A task's line of the table in demos/README.md."""
    ours = again(TASKS[name], real)
    off = 10 * np.abs(ours.finals[:, :2] - real.finals[:, :2]).max(axis=1)
    figures = [f"{real.returns.mean():.1f} | {ours.returns.mean():.1f} | {np.abs(real.returns - ours.returns).max():.2g}"]
    figures += [f"{real.cost.mean():.2f} | {ours.cost.mean():.2f} | {np.abs(real.cost - ours.cost).max():.0f}"]
    figures += [f"{(real.costs == ours.costs).mean():.2%} | {100 * np.median(off):.1g} | {100 * off.max():.2g}"]
    return f"| {name} | {len(off)} | {' | '.join(figures)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swept", type=int, default=200)
    swept: int = parser.parse_args().swept
    for name in TASKS:
        print(compared(name, sweep(f"SafetyBall{name.title()}-v0", KINDS[name], swept)), flush=True)


if __name__ == "__main__":
    main()
