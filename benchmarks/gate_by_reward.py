"""The walker's gates trained by reward instead of by demonstrations: PPO in dm_control/walker-run over the shipped skills.

    python -m benchmarks.gate_by_reward                     # what is missing there, minutes a row on a CPU; stop and start it at will
    python -m benchmarks.gate_by_reward --from-results      # what is stored

`walk and run`: base stand, skills walker/walk@1 and walker/run@2. `walk`: base stand and the walk skill alone, so that nothing in it has seen a
run. By reward from the demonstrations' gate, PPO starts at the shipped gate; anew, it starts at weights of 1 / K for every state. Ten test episodes
(environment seeds 0 to 9, of at most 1000); PPO trains on environment seeds from 2^31 on, with the defaults of `compose.py`, but less noise where the
gate is good already. No setting was chosen by a return. What is stored is what the last step came to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate

import skillbank as sb
from benchmarks import stored
from skillbank.mixture import Composed
from skillbank.online import reinforce
from skillbank.report import markdown
from skillbank.tasks.control import ControlTask

__all__ = ["Study", "run_task", "trained"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gate_by_reward.jsonl"
UNTOUCHED = {
    "base": "walker/stand@1",
    "walk skill": "walker/walk@1",
    "run skill": "walker/run@2",
    "walk and run, gate from demonstrations": "walker/run-from-stand-walk@1",
}
STEPS, SEEDS = 60_000, 2


@dataclass(frozen=True)
class Study:
    """A gate to train.

    Args:
        start: a composition of the bank, whose base, skills and deviations of the context are used.
        anew: begin with weights of 1 / K instead of its gate.
        noise: of the weights that are tried, at the start.

    """

    start: str
    anew: bool
    noise: float = 0.3


STUDIES = {
    "walk and run, gate by reward, anew": Study("walker/run-from-stand-walk@1", True),
    "walk and run, gate by reward, from the demonstrations' gate": Study("walker/run-from-stand-walk@1", False, noise=0.1),
    "walk, gate by reward, anew": Study("walker/walk-from-stand@1", True),
}


def run_task() -> ControlTask:
    """walker/run as in conf/."""
    made: ControlTask = instantiate(stored.conf("compose", "task=walker/run", "skills=[]").task, _convert_="all")
    return made


def trained(study: Study, task: ControlTask, *, steps: int, seed: int) -> tuple[Composed, dict[str, float]]:
    """A composition whose gate was trained by reward, and what it took."""
    composed = cast("Composed", sb.load(study.start, "adapters"))
    if study.anew:
        torch.manual_seed(seed)
        old = composed.gate
        gate = sb.MLPGate(24, composed.mixture.count, init="uniform")
        gate.mean, gate.deviation = cast("torch.Tensor", old.mean), cast("torch.Tensor", old.deviation)
        composed.gate = gate
    return composed, reinforce(composed, task, steps=steps, noise=study.noise, seed=seed, progress=False).metrics


def row(name: str, seed: int | None, returns: Sequence[float], machine: stored.Row, **more: Any) -> stored.Row:
    """One line of the results."""
    return {"name": name, "seed": seed, "returns": [round(each, 2) for each in returns], **more, **machine}


def run(done: Sequence[stored.Row], *, quick: bool = False) -> Iterable[stored.Row]:
    """Rows that are not done yet, one after the other; if quick, one short row of each."""
    task, machine = run_task(), stored.where()
    task.max_steps, episodes = (20, 1) if quick else (None, 10)
    known = {(row["name"], row["seed"]) for row in done}
    for name, ref in ((name, ref) for name, ref in UNTOUCHED.items() if (name, None) not in known):
        yield row(name, None, task.rollout(sb.load(ref, "adapters"), episodes=episodes).returns.tolist(), machine, steps=0)
    for name, study in STUDIES.items():
        for seed in range(1 if quick else SEEDS):
            if (name, seed) in known:
                continue
            started = time.perf_counter()
            composed, metrics = trained(study, task, steps=1024 if quick else STEPS, seed=seed)
            spent = time.perf_counter() - started
            rollout = task.rollout(composed, episodes=episodes, record=0, frame_every=0)
            assert rollout.recording is not None
            weights = composed.shown({"observation": torch.from_numpy(rollout.recording.observations)})
            shown = {key: [round(each, 3) for each in value.tolist()] for key, value in (("mean", weights.mean(0)), ("deviation", weights.std(0)))}
            yield row(
                name, seed, rollout.returns.tolist(), machine, weights=shown, seconds=round(spent), steps=int(metrics.pop("online_steps")), **metrics
            )


def table(rows: Sequence[stored.Row]) -> str:
    """Mean return of every seed, over all, the weights (mean and standard deviation over the first test episode, last seed), steps per seed."""
    shown = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        means = [float(np.mean(row["returns"])) for row in mine]
        weights = mine[-1].get("weights")
        shown.append(
            {
                "": name,
                "return": f"{np.mean(means):.0f}",
                "by training seed": ", ".join(f"{each:.0f}" for each in means) if len(means) > 1 else "",
                "worst and best episode": f"{min(map(min, (row['returns'] for row in mine))):.0f}, "
                f"{max(map(max, (row['returns'] for row in mine))):.0f}",
                "weights": "" if weights is None else ", ".join(f"{m:.2f} +- {d:.2f}" for m, d in zip(*weights.values(), strict=True)),
                "environment steps": f"{mine[0]['steps']:,}" if mine[0]["steps"] else "",
            }
        )
    return markdown(shown)


def main() -> None:
    """Run, store and print."""
    options = stored.parser(__doc__, "one short row of each").parse_args()
    torch.set_num_threads(1)
    if options.from_results:
        print(table(stored.load(RESULTS)))
    elif options.quick:
        print(table(list(run([], quick=True))))
    else:
        rows = stored.so_far(RESULTS)
        for each in run(tuple(rows)):
            rows.append(each)
            stored.store(RESULTS, rows)
        print(table(rows))


if __name__ == "__main__":
    main()
