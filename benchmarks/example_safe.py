"""`make example-safe`: a ball is to be fast and safe, with 800 trajectories of all kinds and 25 safe demonstrations, in two minutes on a CPU.

The recipe of arXiv 2502.05932 for several objectives, by the ordinary commands: a diffusion policy of all data; a critic of rewards and one of costs;
on the policy a skill that each of them weights; a gate over both skills, trained on the safe demonstrations. Beside it the skills alone, both at half
their weight, and a policy of the safe demonstrations alone. The bank is runs/example-safe/bank; a second run goes on from what the first left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hydra.utils import instantiate

import skillbank as sb
from benchmarks import stored
from skillbank.report import markdown
from skillbank.tasks.offline import OfflineTask

ROOT = Path(__file__).parents[1]
FOLDER = Path("runs/example-safe")
NET = ("fit=base", "+model.width=64", "fit.lr=1e-3")
CRITIC = ("model=critic", "fit=critic", "model.hidden=[128,128]", "fit.lr=1e-3", "fit.schedule=cosine")
REWARD, COST = ("model.beta=2",), ("model.objective=qc", "model.discount=0.95")
SKILL = ("lora.rank=8", "fit.lr=1e-3")
"""What is common to the policies, the critics and the skills."""
STEPS = {"base": 5000, "critic": 4000, "skill": 1500, "gate": 600}
"""Of optimisers; small, for the sake of two minutes."""

Command = tuple[str, ...]


def stages(steps: dict[str, int]) -> dict[str, list[list[Command]]]:
    """The commands of every stage, in lanes that run beside each other.

    Args:
        steps: of every kind of training, as `STEPS`.

    """
    everything, safe = "task=ball/run", "task=ball/run_safe"
    critic = ("train.py", everything, *CRITIC, f"fit.steps={steps['critic']}")
    skill = ("train.py", everything, *SKILL, "base=base", f"fit.steps={steps['skill']}")
    skills = "skills=[reward,cost]"
    return {
        "policy of all data, critics": [
            [("train.py", everything, *NET, f"fit.steps={steps['base']}", "name=base")],
            [(*critic, *REWARD, "name=reward-critic"), (*critic, *COST, "name=cost-critic")],
        ],
        "skills": [[(*skill, "critic=reward-critic", "name=reward")], [(*skill, "critic=cost-critic", "name=cost")]],
        "gate, controls": [
            [("compose.py", safe, skills, "gate=mlp", f"fit.steps={steps['gate']}", "name=psec")],
            [
                ("compose.py", safe, skills, "merge=stack", "weights=[0.5,0.5]", "name=fixed"),
                ("train.py", safe, *NET, f"fit.steps={steps['base'] // 2}", "name=safe-alone"),
            ],
        ],
    }


ROWS = {
    "policy of all data": "base",
    "reward skill alone": "reward",
    "cost skill alone": "cost",
    "both skills, half each": "fixed",
    "policy of the safe demonstrations": "safe-alone",
    "gate over both skills": "psec",
}


def run(lane: Sequence[Command]) -> None:
    """Commands one after the other, each in a process of its own with one thread; the first that fails ends it with what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for command in lane:
        given = (*command, f"bank={FOLDER / 'bank'}", "episodes=0")
        sys.stdout.write(f"$ python {' '.join(given)}\n")  # in one piece, beside the other lane's
        sys.stdout.flush()
        done = subprocess.run([sys.executable, *given], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)


def task() -> OfflineTask:
    """What is evaluated: conf/task/ball/run_safe.yaml."""
    made: OfflineTask = instantiate(stored.conf("train", "task=ball/run_safe").task, _convert_="all")
    return made


def table(bank: sb.Bank, task: OfflineTask) -> str:
    """Returns and costs of all rows in the task's test episodes, as they are and as in DSRL, where 1 is a cost at the limit."""
    columns = {"return": ".0f", "cost": ".1f", "normalised_return": ".2f", "normalised_cost": ".2f", "safe": ".2f"}
    found = {row: task.evaluate(sb.load(ref, bank)) for row, ref in ROWS.items()}
    return markdown([{"": row, **{key: format(metrics[key], form) for key, form in columns.items()}} for row, metrics in found.items()])


def main() -> None:
    """Run it."""
    started = time.perf_counter()
    os.chdir(ROOT)
    torch.set_num_threads(1)  # twenty observations at a time are too few for more
    for stage, lanes in stages(STEPS).items():
        begun = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, lanes))
        print(f"-- {stage}: {time.perf_counter() - begun:.0f} s", flush=True)
    begun = time.perf_counter()
    print(table(sb.Bank(FOLDER / "bank"), task()))
    print(f"-- {len(ROWS)} x 20 episodes: {time.perf_counter() - begun:.0f} s; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
