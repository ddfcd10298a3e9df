"""Environments of Bullet-Safety-Gym for a process of another Python: a line of JSON in, one out.

In: which environment, and a seed, or the actions of a step. Out: the observation; after a step also reward, cost and whether the episode is over.
"""

import json
import os
import sys
from typing import Any

import bullet_safety_gym  # noqa: F401
import gymnasium
import numpy as np


def made(environment: str) -> Any:
    """An environment. Its first episode, which is over, is another than all later ones of the same seed."""
    env: Any = gymnasium.make(environment, disable_env_checker=True)
    env.reset()
    return env


def begun(env: Any, seed: int) -> Any:
    """The first observation of an episode that is a function of the seed and the actions: Bullet's motors would go on with the last action before."""
    env.unwrapped.agent.apply_action(np.zeros(env.action_space.shape, np.float32))
    np.random.seed(seed)
    return env.reset()[0]


def answer(env: Any, told: Any) -> list[Any]:
    """What an environment says to a seed or to actions."""
    if isinstance(told, int):
        return [begun(env, told).tolist()]
    observation, reward, terminated, truncated, info = env.step(np.array(told, np.float32))
    return [observation.tolist(), float(reward), float(info["cost"]), bool(terminated or truncated)]


def main() -> None:
    """Serve the environment that is named, as many of it as are asked for."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Bullet prints
    envs: list[Any] = []
    for line in sys.stdin:
        which, told = json.loads(line)
        while which >= len(envs):
            envs.append(made(sys.argv[1]))
        lines.write(json.dumps(answer(envs[which], told)) + "\n")
        lines.flush()


if __name__ == "__main__":
    main()
