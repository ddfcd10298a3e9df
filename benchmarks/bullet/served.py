"""One environment of Bullet-Safety-Gym for a process of another Python: a line of JSON in, one out.

In: a seed, or the actions of a step. Out: the observation; after a step also reward, cost and whether the episode is over.
"""

import json
import os
import sys

import bullet_safety_gym  # noqa: F401
import gymnasium
import numpy as np


def main() -> None:
    """Serve the environment that is named."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Bullet prints
    env = gymnasium.make(sys.argv[1], disable_env_checker=True)
    for line in sys.stdin:
        told = json.loads(line)
        if isinstance(told, int):
            np.random.seed(told)
            answer = [env.reset()[0].tolist()]
        else:
            observation, reward, terminated, truncated, info = env.step(np.array(told, np.float32))
            answer = [observation.tolist(), float(reward), float(info["cost"]), bool(terminated or truncated)]
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


if __name__ == "__main__":
    main()
