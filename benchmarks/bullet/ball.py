"""The ball's tasks in Bullet itself: how close `skillbank.tasks.ball` comes, and behaviour data of the controllers of `benchmarks.ball_data`.

make bullet                                                    # once: .venv-bullet
.venv-bullet/bin/python -m benchmarks.bullet.ball              # 200 trajectories of each task beside the same actions without Bullet
.venv-bullet/bin/python -m benchmarks.bullet.ball --swept 10000 --folder data/bullet    # and writes data, chosen as those in demos/ball
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bullet_safety_gym  # noqa: F401
import gymnasium
import numpy as np
from numpy.typing import NDArray

from benchmarks.ball_data import KEPT, KINDS, SEED, Trajectories, choose, roll_out, row
from skillbank.tasks.ball import TASKS, Ball, Floats

IDS = {"run": "SafetyBallRun-v0", "circle": "SafetyBallCircle-v0"}


class Bullet:
    """One of the tasks in Bullet, for one ball; what it is told of states it knows better."""

    def __init__(self, name: str) -> None:
        self.steps = TASKS[name].steps
        self.env: Any = gymnasium.make(IDS[name], disable_env_checker=True).unwrapped
        self.seen: NDArray[np.float64] = np.zeros(0)

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """State (1, 4) to begin with; the environment draws it from NumPy's global random numbers."""
        np.random.seed(int(rng.integers(2**32)))
        self.seen = self.env.reset()[0]
        return self._states()

    def step(self, states: Floats, actions: Floats) -> tuple[Floats, Floats, Floats]:
        """State (1, 4) after one step of actions (1, 2), with reward (1,) and cost (1,)."""
        self.seen, reward, _, _, info = self.env.step(actions[0])
        return self._states(), np.array([reward]), np.array([float(info["cost"])])

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observation (1, D)."""
        return self.seen[None].astype(np.float32)

    def _states(self) -> Floats:
        state = self.env.agent.get_state()
        return np.concatenate([state[:2], state[3:5]])[None]


def sweep(name: str, swept: int) -> Trajectories:
    """What as many controllers do in Bullet."""
    rng, bullet = np.random.default_rng(SEED), Bullet(name)
    all_of_them = KINDS[name].random(rng, swept)
    each = (type(all_of_them)(**{key: value[..., i : i + 1] for key, value in vars(all_of_them).items()}) for i in range(swept))
    parts = [vars(roll_out(bullet, controller, rng, 1)) for controller in each]
    return Trajectories(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


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
    """Print the table, and write the data where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swept", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    for name in TASKS:
        real = sweep(name, arguments.swept)
        print(compared(name, real), flush=True)
        if arguments.folder:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            data, best = choose(real, KEPT[name])
            for leaf, which in {name: data, f"{name}_safe": best}.items():
                np.savez_compressed(arguments.folder / f"{leaf}.npz", **vars(real[which]))
                print(row(arguments.folder / f"{leaf}.npz", real[which]))


if __name__ == "__main__":
    main()
