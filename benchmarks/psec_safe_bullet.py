"""Policies of benchmarks/psec_safe.py for the ball in Bullet itself, beside the same without Bullet, which they were trained on.

make bullet                                             # once: .venv-bullet
python -m benchmarks.psec_safe_bullet --from-results    # the table from benchmarks/results/psec_safe_bullet.jsonl
python -m benchmarks.psec_safe_bullet                   # computes what is missing there, and trains what is not in runs/psec_safe yet

Twenty test episodes each, with the sampler's same random numbers.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from benchmarks import bullet_environment, stored
from benchmarks.psec_safe import ROOT, ROWS, Study
from skillbank.report import markdown

RESULTS = ROOT / "benchmarks" / "results" / "psec_safe_bullet.jsonl"
ENVIRONMENTS = {"run": "SafetyBallRun-v0", "circle": "SafetyBallCircle-v0"}
COMPARED = ("base", "cost", "scratch", "asec", "nsec", "gate")


def compute(study: Study, row: str, episodes: int = 20) -> dict[str, Any]:
    """Train what the row needs, run its test episodes with and without Bullet and return the result."""
    model, task = ROWS[row].model(study), study.task("_safe")
    found: dict[str, list[float]] = {}
    for where, environment in {"": task.environment, "bullet_": f"benchmarks.bullet_environment:bullet/{ENVIRONMENTS[study.name]}"}.items():
        task.environment = environment
        rollout = task.rollout(model, episodes=episodes)
        assert rollout.costs is not None
        found |= {f"{where}returns": [round(float(each), 1) for each in rollout.returns], f"{where}costs": [int(each) for each in rollout.costs]}
    return {"name": f"{study.name}/{row}", "seed": study.seed, **found, **stored.where()}


def table(results: list[dict[str, Any]]) -> str:
    """Mean returns and costs, without and in Bullet."""
    columns = {"return": "returns", "return in Bullet": "bullet_returns", "cost": "costs", "cost in Bullet": "bullet_costs"}
    names = [f"{task}/{row}" for task in ENVIRONMENTS for row in ROWS]
    lines = []
    for each in sorted(results, key=lambda each: (names.index(each["name"]), each["seed"])):
        task, _, row = each["name"].partition("/")
        figures = {column: f"{sum(each[key]) / len(each[key]):.1f}" for column, key in columns.items()}
        lines.append({"": f"{task}: {ROWS[row].label}", "seed": each["seed"], **figures})
    return markdown(lines) if lines else "no results yet"


def read_results() -> list[dict[str, Any]]:
    """Stored results."""
    return stored.so_far(RESULTS)


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "one cell of a few steps per task")
    parser.add_argument("--tasks", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    results = read_results()
    if not options.from_results:
        try:
            bullet_environment.python()
        except ImportError as error:
            parser.error(str(error))
    if options.quick:
        results = [compute(Study(task, 0, quick=True), "base", episodes=2) for task in options.tasks]
    elif not options.from_results:
        cells = [(Study(task, seed), row) for seed in options.seeds for task in options.tasks for row in options.rows]
        wanted = ((f"{study.name}/{row}", study.seed, partial(compute, study, row)) for study, row in cells)
        stored.complete(RESULTS, wanted, lambda row: f"{sum(row['bullet_returns']) / 20:.0f}, cost {sum(row['bullet_costs']) / 20:.1f}")
        results = read_results()
    print(table(results))


if __name__ == "__main__":
    main()
