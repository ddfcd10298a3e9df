"""Policies of benchmarks/psec_safe.py in Bullet itself, beside the same without Bullet that they were trained on.

make bullet                                                     # once: .venv-bullet
python -m benchmarks.psec_safe_bullet --rows gate --seeds 0     # rows and seeds whose training is done
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.psec_safe import ROOT, ROWS, TASKS, Study
from skillbank.model import Model, evaluating
from skillbank.report import markdown

Floats = NDArray[np.float64]


class Served:
    """An environment of Bullet-Safety-Gym in a process of .venv-bullet.

    Args:
        environment: its id.

    """

    def __init__(self, environment: str) -> None:
        line = [str(ROOT / ".venv-bullet/bin/python"), "-W", "ignore", "-m", "benchmarks.bullet.served", environment]
        self.process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        cast("IO[str]", self.process.stdin).close()
        self.process.wait()

    def ask(self, told: object) -> Any:
        """What it answers to a seed or an action."""
        to, back = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        to.write(json.dumps(told) + "\n")
        to.flush()
        return json.loads(back.readline())

    @torch.no_grad()
    def episode(self, model: Model, seed: int) -> tuple[float, float]:
        """Return and cost of an episode."""
        torch.manual_seed(seed)
        (observation,), over, total = self.ask(seed), False, np.zeros(2)
        while not over:
            action = model.predict({"observation": torch.tensor([observation])})[0, 0].clamp(-1, 1)
            observation, reward, cost, over = self.ask(action.tolist())
            total += reward, cost
        return float(total[0]), float(total[1])


def compared(study: Study, row: str, episodes: int) -> dict[str, str]:
    """A line of the table."""
    model: Any = ROWS[row].model(study)
    ours = study.task("_safe").rollout(model, episodes=episodes)
    with Served(f"SafetyBall{study.name.title()}-v0") as bullet, evaluating(model):
        theirs: Floats = np.array([bullet.episode(model, seed) for seed in range(episodes)])
    assert ours.costs is not None
    figures = {"return": ours.returns, "cost": ours.costs, "return in Bullet": theirs[:, 0], "cost in Bullet": theirs[:, 1]}
    return {"": f"{study.name}: {ROWS[row].label}", "seed": str(study.seed), **{key: f"{each.mean():.1f}" for key, each in figures.items()}}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["base", "scratch", "gate"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    rows = [compared(Study(task, seed), row, options.episodes) for task in options.tasks for row in options.rows for seed in options.seeds]
    print(markdown(rows))


if __name__ == "__main__":
    main()
