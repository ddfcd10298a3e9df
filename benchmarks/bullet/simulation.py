"""Bullet-Safety-Gym's environments as something that `benchmarks.ball_data` rolls out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ball_data import SEED, Kind, Trajectories, roll_out
from benchmarks.bullet.served import begun, made
from skillbank.tasks.ball import Floats


class Bullet:
    """One environment with one ball or car. A state is x, y, their speeds and the yaw; those that it is told are ignored, for Bullet has its own."""

    def __init__(self, environment: str) -> None:
        limited = made(environment)
        self.steps: int = limited.spec.max_episode_steps
        self.env = limited.unwrapped
        self.seen: NDArray[np.float64] = np.zeros(0)

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """State (1, 5) to begin with; the environment draws it from NumPy's global random numbers."""
        self.seen = begun(self.env, int(rng.integers(2**32)))
        return self._states()

    def step(self, states: Floats, actions: Floats) -> tuple[Floats, Floats, Floats]:
        """State (1, 5) after one step of actions (1, 2), with reward (1,) and cost (1,)."""
        self.seen, reward, _, _, info = self.env.step(actions[0])
        return self._states(), np.array([float(reward)]), np.array([float(info["cost"])])

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observation (1, D)."""
        return self.seen[None].astype(np.float32)

    def _states(self) -> Floats:
        agent: Any = self.env.agent
        state: Floats = agent.get_state()
        return state[None, [0, 1, 3, 4, 8]]


def sweep(environment: str, kind: Kind, swept: int) -> Trajectories:
    """What as many controllers do, one after the other."""
    rng, bullet = np.random.default_rng(SEED), Bullet(environment)
    together = kind.random(rng, swept)
    alone = (type(together)(**{name: value[..., i : i + 1] for name, value in vars(together).items()}) for i in range(swept))
    parts = [vars(roll_out(bullet, controller, rng, 1)) for controller in alone]
    return Trajectories(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
