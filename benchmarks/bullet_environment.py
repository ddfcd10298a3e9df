"""Bullet-Safety-Gym's tasks as gymnasium environments here: `benchmarks.bullet_environment:bullet/SafetyCarRun-v0`, simulated by .venv-bullet.

The simulator wants other versions of what this process has: `make bullet` installs it beside, `benchmarks.bullet.served` answers from there.
An episode is a function of its seed and the actions alone.
"""

from __future__ import annotations

import atexit
import heapq
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
TASKS = {"SafetyBallRun-v0": (7, 100), "SafetyBallCircle-v0": (8, 200), "SafetyCarRun-v0": (7, 200), "SafetyCarCircle-v0": (8, 300)}
"""Features of an observation, and steps of an episode."""

Answer = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


def python() -> str:
    """The Python that has Bullet.

    Raises:
        ImportError: there is none.

    """
    path = ROOT / ".venv-bullet/bin/python"
    if not path.exists():
        raise ImportError(f"there is no {path.relative_to(ROOT)}, which has Bullet-Safety-Gym: run `make bullet`")
    return str(path)


def ensure_data(name: str) -> None:
    """Write runs/bullet/<name>.npz and <name>_safe.npz, see `benchmarks.bullet.data`, where they are missing.

    Raises:
        ImportError: they are missing, and so is Bullet.

    """
    if not all((ROOT / f"runs/bullet/{name}{kind}.npz").exists() for kind in ("", "_safe")):
        subprocess.run([python(), "-W", "ignore", "-m", "benchmarks.bullet.data", name], cwd=ROOT, check=True)


class Simulator:
    """A process of .venv-bullet with environments of one kind, as many as are needed at once."""

    def __init__(self, environment: str) -> None:
        line = [python(), "-W", "ignore", "-m", "benchmarks.bullet.served", environment]
        self.process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.free: list[int] = []
        self.made = 0
        atexit.register(self.close)

    def take(self) -> int:
        """The number of an environment that nobody uses."""
        if self.free:
            return heapq.heappop(self.free)
        self.made += 1
        return self.made - 1

    def ask(self, which: int, told: object) -> Any:
        """What an environment answers to a seed or to actions.

        Raises:
            RuntimeError: the process has ended.

        """
        to, back = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        to.write(json.dumps([which, told]) + "\n")
        to.flush()
        line = back.readline()
        if not line:
            raise RuntimeError(f"{' '.join(cast('list[str]', self.process.args))} has ended: run it to see why")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            cast("IO[str]", pipe).close()
        self.process.wait()


simulator = cache(Simulator)


class BulletEnvironment(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One ball or car of Bullet-Safety-Gym; `info["cost"]` is what a step cost.

    Args:
        environment: its id there.
        render_mode: None: it shows nothing.

    Raises:
        ImportError: there is no .venv-bullet.

    """

    def __init__(self, environment: str, *, render_mode: None = None) -> None:
        self.observation_space = Box(-1000, 1000, (TASKS[environment][0],), np.float32)
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.simulator = simulator(environment)
        self.which: int | None = self.simulator.take()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode: (observation, {}). A seed restarts the random numbers; without one they go on."""
        super().reset(seed=seed, options=options)
        told = int(self.np_random.integers(2**32)) if seed is None else seed
        return np.array(self.simulator.ask(cast("int", self.which), told)[0], np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Answer:
        """One step: (observation, reward, False, False, {"cost": 0 or 1}); the time limit is the registration's."""
        observation, reward, cost, _ = self.simulator.ask(cast("int", self.which), action.tolist())
        return np.array(observation, np.float32), reward, False, False, {"cost": cost}

    def close(self) -> None:
        """Leave the simulation to the next one."""
        if self.which is not None:
            heapq.heappush(self.simulator.free, self.which)
            self.which = None


for _name, (_, _steps) in TASKS.items():
    gymnasium.register(
        f"bullet/{_name}", entry_point="benchmarks.bullet_environment:BulletEnvironment", max_episode_steps=_steps, kwargs={"environment": _name}
    )
