"""Bullet-Safety-Gym's environments as something that `benchmarks.ball_data` rolls out."""

from __future__ import annotations

from typing import Any, Protocol

import bullet_safety_gym  # noqa: F401
import gymnasium
import numpy as np
from numpy.typing import NDArray

from benchmarks.ball_data import SEED, Controller, Trajectories, roll_out
from skillbank.tasks.ball import Floats


class Kind(Protocol):
    """A class of controllers."""

    def random(self, rng: np.random.Generator, n: int) -> Controller:
        """Controllers for n balls or cars at once."""
        ...


class Bullet:
    """One environment with one ball or car. A state is x, y, their speeds and the yaw; those that it is told are ignored, for Bullet has its own."""

    def __init__(self, environment: str) -> None:
        limited = gymnasium.make(environment, disable_env_checker=True)
        assert limited.spec
        assert limited.spec.max_episode_steps
        self.steps, self.env = limited.spec.max_episode_steps, limited.unwrapped
        self.seen: NDArray[np.float64] = np.zeros(0)

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """State (1, 5) to begin with; the environment draws it from NumPy's global random numbers."""
        np.random.seed(int(rng.integers(2**32)))
        self.seen, _ = self.env.reset()
        return self._states()

    def step(self, states: Floats, actions: Floats) -> tuple[Floats, Floats, Floats]:
        """State (1, 5) after one step of actions (1, 2), with reward (1,) and cost (1,)."""
        self.seen, reward, _, _, info = self.env.step(actions[0])
        return self._states(), np.array([float(reward)]), np.array([float(info["cost"])])

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observation (1, D)."""
        return self.seen[None].astype(np.float32)

    def _states(self) -> Floats:
        agent: Any = self.env.agent  # type: ignore[attr-defined]
        state: Floats = agent.get_state()
        return state[None, [0, 1, 3, 4, 8]]


def sweep(environment: str, kind: Kind, swept: int) -> Trajectories:
    """What as many controllers do, one after the other."""
    rng, bullet = np.random.default_rng(SEED), Bullet(environment)
    together = kind.random(rng, swept)
    alone = (type(together)(**{name: value[..., i : i + 1] for name, value in vars(together).items()}) for i in range(swept))
    parts = [vars(roll_out(bullet, controller, rng, 1)) for controller in alone]
    return Trajectories(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
