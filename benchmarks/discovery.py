"""Skill discovery: stand, walk and run of the walker one after the other, and how well the cuts between them are found again.

    python -m benchmarks.discovery                     # minutes on a CPU
    python -m benchmarks.discovery --from-results      # what is stored

A concatenation is 3 episodes of 8 pieces of 150 to 400 steps, neighbours of different tasks; pieces are of episodes that no policy here was trained
on. `stochastic` has stand, walk and run, `deterministic` walk and run of the deterministic experts. In the control all pieces are of one
task: a cut there is a jump of the state and no change of skill, so that whatever finds it does not look at skills. Seeds 0 to 9 are reported; all
settings were chosen on seeds from 100 on. The paper's rule (arXiv 2503.10684) cuts where the error is above its mean since the last cut by a
margin; it sees errors get larger only, here on a running mean, its two numbers chosen on those seeds as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import skillbank as sb
from benchmarks import stored
from skillbank.discovery import boundaries, boundary_scores, cluster, errors, features, purity, segments
from skillbank.report import markdown
from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations

__all__ = ["Concatenation", "concatenation", "held_out"]

RESULTS = Path(__file__).parent / "results" / "discovery.jsonl"
TASKS = {"stochastic": ("stand", "walk", "run"), "deterministic": ("stand", "walk_deterministic", "run_deterministic")}
FIRST = {"stand": 95, "walk": 10, "run": 10}
"""The first episode of a file that nothing was trained on."""
POLICIES = {
    "base": ("walker/stand",),
    "base, walk": ("walker/stand", "walker/walk"),
    "base, walk, run": ("walker/stand", "walker/walk", "walker/run@1"),
}
SEEDS = range(10)
Cuts = NDArray[np.int64]
Signal = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Concatenation:
    """Pieces of episodes, one after the other.

    Args:
        demonstrations: of all pieces.
        cuts: rows where a piece begins within an episode.
        tasks: of every row, (N,).

    """

    demonstrations: Demonstrations
    cuts: Cuts
    tasks: NDArray[np.str_]


def held_out(kind: str) -> dict[str, Demonstrations]:
    """Episodes of every task that nothing was trained on."""
    return {task: load_demonstrations(f"demos/walker/{task}.npz").episodes(slice(FIRST.get(task, 0), None)) for task in TASKS[kind]}


def concatenation(data: Mapping[str, Demonstrations], seed: int, *, episodes: int = 3, pieces: int = 8) -> Concatenation:
    """Concatenate random pieces; neighbours are of different tasks where there are several."""
    rng, lengths, parts, tasks = np.random.default_rng(seed), list[int](), list[tuple[NDArray[np.float32], ...]](), list[str]()
    for each in range(episodes * pieces):
        before = tasks[-1] if each % pieces and len(data) > 1 else None
        tasks.append(str(rng.choice([task for task in data if task != before])))
        source, length = data[tasks[-1]], int(rng.integers(150, 401))
        episode = int(rng.integers(len(source)))
        first = int(source.starts[episode] + rng.integers(source.lengths[episode] - length + 1))
        parts.append(tuple(array[first : first + length] for array in (source.observations, source.actions, source.rewards)))
        lengths.append(length)
    edges = np.cumsum([0, *lengths])
    observations, actions, rewards = (np.concatenate(part) for part in zip(*parts, strict=True))
    demonstrations = Demonstrations(observations, actions, rewards, edges[::pieces], f"concatenation {seed}")
    return Concatenation(demonstrations, np.setdiff1d(edges, edges[::pieces]), np.repeat(tasks, lengths))


def uniform(demonstrations: Demonstrations, every: int = 275) -> Cuts:
    """Cut at every so many steps, the mean length of a piece."""
    parts = [np.arange(first + every, last, every) for first, last in pairwise(demonstrations.starts)]
    return np.concatenate(parts)


def jumps(demonstrations: Demonstrations, deviations: float = 1.5, minimum: int = 60) -> Cuts:
    """Cut where the observation moves farthest in one step: so many deviations above the median, and `minimum` steps from any other cut."""
    x = demonstrations.observations / demonstrations.observations.std(0)
    step = np.linalg.norm(np.diff(x, axis=0, prepend=x[:1]), axis=1)
    step[demonstrations.starts[:-1]] = 0.0
    found: list[int] = []
    for row in np.argsort(-step):
        if step[row] < np.median(step) + deviations * step.std():
            break
        if all(abs(row - other) >= minimum for other in found):
            found.append(int(row))
    return np.sort(np.array(found, np.int64))


def papers(signal: Signal, starts: Cuts, *, margin: float = 0.3, window: int = 30, minimum: int = 60) -> Cuts:
    """Cut where the running mean of the error is above its mean since the last cut by a margin."""
    found = []
    for first, last in pairwise(starts):
        x = signal[first:last]
        sums, begin = np.concatenate([[0.0], x.cumsum()]), 0
        for row in range(len(x) - window):
            if row - begin >= minimum and (sums[row + window] - sums[row]) / window > margin + (sums[row] - sums[begin]) / (row - begin):
                found.append(first + row)
                begin = row
    return np.array(found, np.int64)


def found_by(models: Mapping[str, torch.nn.Module], demonstrations: Demonstrations) -> dict[str, tuple[Cuts, Signal]]:
    """What every way finds, and the errors (N, C) that its pieces are then sorted by."""
    each, starts = {name: errors(model, demonstrations) for name, model in models.items()}, demonstrations.starts
    of = {label: np.stack([each[name] for name in names], 1) for label, names in POLICIES.items() if set(names) <= set(models)}
    base = of["base"]
    baselines = {"uniform": uniform(demonstrations), "jump of the observation": jumps(demonstrations), "paper's rule": papers(base[:, 0], starts)}
    return {way: (cuts, base) for way, cuts in baselines.items()} | {label: (boundaries(signal, starts), signal) for label, signal in of.items()}


def measured(made: Concatenation, found: Cuts, signal: Signal) -> dict[str, float]:
    """Scores of boundaries, how many kinds are found, and purity of the kinds by step: of so many as are chosen, and of three."""
    pieces = segments(made.demonstrations.starts, found)
    values, lengths = features(made.demonstrations, pieces, signal), [len(piece) for piece in pieces]
    chosen, three = (np.repeat(cluster(values, skills), lengths) for skills in (None, 3))
    kinds = {"kinds": float(chosen.max() + 1), "purity": purity(chosen, made.tasks), "purity of 3": purity(three, made.tasks)}
    return {**boundary_scores(found, made.cuts), **kinds}


def run(kinds: Sequence[str], seeds: Iterable[int], names: Sequence[str]) -> list[stored.Row]:
    """Rows of concatenations and, with the task as `control`, of those of one task."""
    bank, rows, machine = sb.Bank("adapters"), list[stored.Row](), stored.where()
    models: dict[str, torch.nn.Module] = {name: sb.load(name, bank) for name in names}
    for kind, seed in product(kinds, seeds):
        data = held_out(kind)
        made = concatenation(data, seed)
        for way, (cuts, signal) in found_by(models, made.demonstrations).items():
            rows.append({"data": kind, "way": way, "seed": seed, "values": measured(made, cuts, signal), **machine})
        for task in data:
            alone = concatenation({task: data[task]}, seed, episodes=1)
            for way, (cuts, _) in found_by(models, alone.demonstrations).items():
                values = {"recall": boundary_scores(cuts, alone.cuts)["recall"], "found": len(cuts) / len(alone.cuts)}
                rows.append({"data": kind, "way": way, "seed": seed, "control": task, "values": values, **machine})
    return rows


def tables(rows: Sequence[stored.Row]) -> str:
    """Mean and standard deviation over the seeds; of the controls the share of cuts that are found, and what is found per cut, there or not."""
    shown = []
    for data, way in dict.fromkeys((row["data"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["data"], row["way"]) == (data, way)]
        line = {"data": data, "cut by": way}
        for control in dict.fromkeys(row.get("control") for row in mine):
            values = [row["values"] for row in mine if row.get("control") == control]
            of = {key: [each[key] for each in values] for key in values[0]}
            if control is None:
                line |= {key: f"{np.mean(each):.2f} +- {np.std(each):.2f}" for key, each in of.items()}
            else:
                line[f"{control.partition('_')[0]} alone"] = " / ".join(f"{np.mean(each):.2f}" for each in of.values())
        shown.append(line)
    return markdown(shown)


def main() -> None:
    """Run, store and print."""
    options = stored.parser(__doc__, "one seed, the base alone").parse_args()
    if options.from_results:
        print(tables(stored.load(RESULTS)))
    elif options.quick:
        print(tables(run(["stochastic"], SEEDS[:1], POLICIES["base"])))
    else:
        rows = run(list(TASKS), SEEDS, POLICIES["base, walk, run"])
        stored.store(RESULTS, rows)
        print(tables(rows))


if __name__ == "__main__":
    main()
