"""Figures like the paper's (arXiv 2502.05932), of the shipped walker: a gate's weights along an episode, and how far skills are apart at its levels.

    python -m benchmarks.figures                     # minutes on one core: docs/figures/*.svg and benchmarks/results/figures.jsonl
    python -m benchmarks.figures --from-results      # the numbers that are stored

Weights: walker-run, five test episodes (environment seeds 0 to 4), of which the first is drawn. Every episode begins with the walker let fall;
`pushed` is a shove to the back at step 500, and until then the same as without. A gate from equal weights starts at 1 / 2 everywhere and is trained
here, on the run demonstrations as `compose.py` does, for 300 steps; over walker/walk@1 and walker/run@2, as the shipped one, or walker/run@1, which
does not stand on the walk skill. On the ground is a torso below 0.8 m.

Levels: what policies say at states of demonstrations that nothing was trained on, 200 steps of three episodes of each task. The hidden layer is the
trunk behind the last block, the skill in all layers; it and the noise are of the third of five denoise steps, of the sampling that the action comes
of; random numbers are the same for all policies. All is in standard deviations. Accuracy is that of the 15 nearest neighbours, of which none is of
the episodes asked about (three folds, an episode of every task each).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import OmegaConf
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import skillbank as sb
from benchmarks import stored
from skillbank import recipe
from skillbank.mixture import Composed
from skillbank.model import Batch
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.report import INK, PALETTE, markdown
from skillbank.tasks.demonstrations import load_demonstrations
from skillbank.tasks.environments import SuiteEnvironment
from skillbank.tasks.rollouts import rollout

__all__ = ["Episodes", "Points", "Pushed", "draw_levels", "draw_weights", "points", "said", "save", "separation", "states"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "figures.jsonl"
OUT = ROOT / "docs" / "figures"
GATE = "walker/run-from-stand-walk@1"
PLAIN, PUSHED = "dm_control/walker-run", "benchmarks/WalkerRunPushed-v0"
PUSH, GROUND, HEIGHT, MIDDLE = 500, 0.8, 14, 2
"""Step of the push, torso height in metres, where in an observation it is, and the denoise step that is looked at."""
FIRST = {"stand": 95, "walk": 10, "run": 10}
"""The first episode of a file that nothing was trained on."""
POLICIES = {"base": "walker/stand@1", "walk": "walker/walk@1", "run": "walker/run@2", "run from stand": "walker/run@1"}
CONDITIONS: dict[str, Sequence[tuple[str, str | None]]] = {
    "own states": [("base", "stand"), ("walk", "walk"), ("run", "run")],
    "own states, base alone": [("base", "stand"), ("base", "walk"), ("base", "run")],
    "same states": [("base", None), ("walk", None), ("run", None)],
    "same states, walk and run from stand": [("walk", None), ("run from stand", None)],
    "same states, run twice": [("run", None), ("run from stand", None)],
}
"""What is to be told apart: policies, and the task whose states they are asked at, None for all."""
DRAWN = {"own states": "each at states of its own task", "same states": "all at the same states", "same states, run twice": "one task, trained twice"}
PANELS = {"hidden layer": "parameter level: hidden layer", "noise": "noise level", "action": "action level"}
SIX = ", six directions"
SHADES = {"base": PALETTE[5], "walk": PALETTE[0], "run": PALETTE[1], "run from stand": PALETTE[3]}
QUICK = ("task.episodes=1", "task.balance=0", "task.rehearsal=null")
Array = NDArray[np.float32]


class Pushed(SuiteEnvironment):
    """The walker's run, with a shove to the back at one step.

    Args:
        at: step, counted from 0.
        speed: of the shove, m/s; the torso is turned with it.
        more: of `SuiteEnvironment`.

    """

    def __init__(self, at: int = PUSH, speed: float = 5.0, **more: Any) -> None:
        super().__init__("walker", "run", **more)
        self.at, self.speed, self.taken = at, speed, 0

    def reset(self, **more: Any) -> tuple[Array, dict[str, Any]]:
        """As of the suite."""
        self.taken = 0
        return super().reset(**more)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """As of the suite."""
        if self.taken == self.at:
            self._env.physics.named.data.qvel[["rootx", "rooty"]] -= self.speed
        self.taken += 1
        return super().step(action)


gymnasium.register(PUSHED, entry_point=Pushed, max_episode_steps=1000)


@dataclass(frozen=True, eq=False)
class Episodes:
    """What a gate did.

    Args:
        weights: (E, T, K).
        heights: of the torso, (E, T).
        returns: (E,).
        rewards: of the first episode, (T,).

    """

    weights: Array
    heights: Array
    returns: NDArray[np.float64]
    rewards: NDArray[np.float64]


class _Watched(nn.Module):
    """A policy, and all that it saw."""

    def __init__(self, model: Composed) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()

    def predict(self, batch: Batch) -> Tensor:
        self.seen.append(batch["observation"])
        return self.model.predict(batch)


def play(model: Composed, environment: str, *, episodes: int, steps: int) -> Episodes:
    """Run test episodes."""
    watched = _Watched(model)
    run = rollout(cast("Any", watched), environment, range(episodes), max_steps=steps, record=0, frame_every=0)
    assert run.recording is not None
    seen = torch.stack(watched.seen, 1)
    weights = model.shown({"observation": seen.flatten(0, 1)}).reshape(*seen.shape[:2], -1)
    return Episodes(weights, seen[..., HEIGHT].numpy(), run.returns, run.recording.rewards)


def trained(run: str, steps: int, *more: str) -> Composed:
    """A gate over the walk skill and a run skill that starts at equal weights, trained as `compose.py` does; nothing of it is kept."""
    overrides = ["task=walker/run", f"skills=[{POLICIES['walk']},{run}]", "gate=mlp", "gate.init=uniform", f"fit.steps={steps}"]
    conf = stored.conf("compose", *overrides, "+fit.progress=false", "task.held_out=0", *more)
    plain = cast("dict[str, Any]", OmegaConf.to_container(conf, resolve=True))
    return cast("Composed", recipe.compose(plain, sb.Bank("adapters"), resume=False).model)


def weights_of(episodes: Episodes) -> dict[str, Any]:
    """Numbers of episodes: returns, steps on the ground, and by phase the mean and the deviation of every weight."""
    ground = episodes.heights < GROUND
    row: dict[str, Any] = {"returns": [round(float(each), 1) for each in episodes.returns], "on the ground": round(float(ground.mean()), 4)}
    for phase, chosen in (("ground", ground), ("feet", ~ground)):
        at = episodes.weights[chosen]
        row[phase] = [[round(float(m), 3), round(float(d), 3)] for m, d in zip(at.mean(0), at.std(0), strict=True)] if len(at) else []
    return row


@dataclass(frozen=True, eq=False)
class States:
    """Where policies are asked: observations (S, D), the task of each, (S,), and its episode, (S,)."""

    observations: Array
    tasks: NDArray[np.str_]
    episodes: NDArray[np.int64]


def states(steps: int, episodes: int = 3) -> States:
    """So many random steps of each of some held-out episodes of every task."""
    rng, found, tasks, which = np.random.default_rng(0), list[Array](), list[str](), list[int]()
    for task, first in FIRST.items():
        data = load_demonstrations(f"demos/walker/{task}.npz").episodes(slice(first, first + episodes))
        for episode in range(episodes):
            rows = data.starts[episode] + rng.choice(data.lengths[episode], steps, replace=False)
            found.append(data.observations[np.sort(rows)])
            tasks += [task] * steps
            which += [episode] * steps
    return States(np.concatenate(found), np.array(tasks), np.array(which))


def said(ref: str, observations: Array, seed: int = 0) -> dict[str, Array]:
    """What a policy says at states, at every level, (S, ...) each: one sampling."""
    policy, observation = cast("DiffusionPolicy", sb.load(ref, "adapters")), torch.from_numpy(observations)
    hidden, asked, noises = list[Tensor](), list[Tensor](), list[Tensor]()

    def noise(x: Tensor, step: int) -> Tensor:
        asked.append(x)
        noises.append(policy.net(x, observation, torch.full((len(x),), step)))
        return noises[-1]

    policy.net.leave.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        action = policy.denoise(noise, len(observation), observation, policy.temperature)
    kept = policy.kept[policy.steps - 1 - MIDDLE]
    implied = (asked[MIDDLE] - (1 - kept).sqrt() * noises[MIDDLE]) / kept.sqrt()
    levels = {"states": observation, "hidden layer": hidden[MIDDLE], "noise": noises[MIDDLE], "noise, last step": noises[-1]}
    return {name: each.numpy() for name, each in (levels | {"action that the noise implies": implied, "action": action.flatten(1)}).items()}


@dataclass(frozen=True, eq=False)
class Points:
    """Points (P, F) in standard deviations, with what is to be told of each, (P,), and the episode that it is of, (P,)."""

    values: Array
    labels: NDArray[np.int64]
    episodes: NDArray[np.int64]
    tasks: NDArray[np.str_]


def points(condition: Sequence[tuple[str, str | None]], level: str, at: States, all_said: Mapping[str, Mapping[str, Array]]) -> Points:
    """Points of a level; of the hidden layer also its six main directions, as many as noise and action have."""
    source = level.removesuffix(SIX)
    chosen = [np.flatnonzero(np.full(len(at.tasks), task is None) | (at.tasks == task)) for _, task in condition]
    values = np.concatenate([all_said[policy][source][rows] for (policy, _), rows in zip(condition, chosen, strict=True)])
    values = (values - values.mean(0)) / values.std(0).clip(1e-6)
    if level != source:
        values = PCA(6, svd_solver="full").fit_transform(values)
    rows = np.concatenate(chosen)
    return Points(values, np.repeat(np.arange(len(condition)), [len(each) for each in chosen]), at.episodes[rows], at.tasks[rows])


def separation(of: Points, neighbours: int = 15) -> dict[str, Any]:
    """How well the labels can be told: accuracy of the nearest neighbours from other episodes, by fold, and silhouette."""
    folds = []
    for episode in np.unique(of.episodes):
        asked = of.episodes == episode
        known = KNeighborsClassifier(min(neighbours, int((~asked).sum()))).fit(of.values[~asked], of.labels[~asked])
        folds.append(round(float(known.score(of.values[asked], of.labels[asked])), 4))
    return {"accuracy": folds, "silhouette": round(float(silhouette_score(of.values, of.labels)), 4)}


def draw_weights(scenes: Mapping[str, Episodes], mean: int = 5) -> Figure:
    """First episodes, one beside the other: weights, height and reward, each a mean of so many steps."""
    figure = Figure(figsize=(3.4 * len(scenes), 4.6), layout="constrained")
    axes = figure.subplots(3, len(scenes), sharex="col", sharey="row", height_ratios=[1.4, 0.8, 0.8], squeeze=False)
    for (name, scene), (weights, height, reward) in zip(scenes.items(), axes.T, strict=True):
        length = len(scene.rewards) // mean * mean
        steps, lines = np.arange(length).reshape(-1, mean).mean(1), scene.weights[0, :length].reshape(length // mean, mean, -1).mean(1)
        for k, skill in enumerate(("walk", "run")):
            weights.plot(steps, lines[:, k], color=SHADES[skill], label=skill, linewidth=0.9)
        weights.set_title(f"{name}: return {scene.returns[0]:.0f}", fontsize=9)
        height.plot(steps, scene.heights[0, :length].reshape(-1, mean).mean(1), color=INK, linewidth=0.8)
        height.axhline(GROUND, color="#a0aec0", linewidth=0.6, linestyle="--")
        reward.fill_between(steps, scene.rewards[:length].reshape(-1, mean).mean(1), color="#a0aec0", linewidth=0)
        for axis in (weights, height, reward):
            if "pushed" in name:
                axis.axvline(PUSH, color=PALETTE[4], linewidth=0.8, linestyle=":")
            axis.set_xlim(0, len(scene.rewards))
            axis.tick_params(labelsize=7)
        reward.set_xlabel("step", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="center right")
    for axis, label in zip(axes[:, 0], ("weight\n(1 = as trained)", "torso height, m", "reward per step"), strict=True):
        axis.set_ylabel(label, fontsize=8)
    axes[2, 0].set_ylim(0, 1)
    return figure


def embedded(of: Points, iterations: int, limit: int = 480) -> tuple[Array, NDArray[np.int64]]:
    """t-SNE of at most so many points, and which these are."""
    rows = np.sort(np.random.default_rng(0).permutation(len(of.values))[:limit])
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", max_iter=iterations, random_state=0, n_jobs=1)
    return tsne.fit_transform(of.values[rows]), rows


def draw_levels(panels: Mapping[tuple[str, str], tuple[Points, Mapping[str, Any]]], iterations: int = 1000) -> Figure:
    """Rows are conditions, columns levels; colour is the policy, the mark the task that a state is of."""
    figure = Figure(figsize=(9.6, 9.2), layout="constrained")
    axes = figure.subplots(len(DRAWN), len(PANELS))
    for i, condition in enumerate(DRAWN):
        for j, level in enumerate(PANELS):
            of, numbers = panels[condition, level]
            (places, rows), axis = embedded(of, iterations), axes[i, j]
            for label, (policy, _) in enumerate(CONDITIONS[condition]):
                for task, mark in zip(FIRST, "so^", strict=True):
                    chosen = (of.labels[rows] == label) & (of.tasks[rows] == task)
                    axis.scatter(*places[chosen].T, s=7, marker=mark, color=SHADES[policy], alpha=0.6, linewidths=0, rasterized=True)
                axis.scatter([], [], s=14, color=SHADES[policy], label=policy)
            title = f"{PANELS[level]}\n" if not i else ""
            text = f"nearest neighbours {np.mean(numbers['accuracy']):.2f} (chance {1 / len(CONDITIONS[condition]):.2f})"
            axis.set_title(f"{title}{text}, silhouette {numbers['silhouette']:.2f}", fontsize=7.5)
            axis.set(xticks=[], yticks=[])
        axes[i, 0].set_ylabel(DRAWN[condition], fontsize=9)
        axes[i, 0].legend(fontsize=7, frameon=False, loc="best")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file that is the same whenever the figure is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", dpi=80, metadata={"Date": None, "Creator": None})
    path.write_text(numbered(drawn.getvalue()))


def numbered(svg: str) -> str:
    """The same picture with the names of its parts in their order: matplotlib draws them at random."""
    names = dict.fromkeys(re.findall(r'id="([a-zA-Z][0-9a-f]{10})"', svg))
    numbers = {name: f"{name[0]}{i}" for i, name in enumerate(names)}
    return re.sub(r'(id="|#)([a-zA-Z][0-9a-f]{10})\b', lambda found: found[1] + numbers.get(found[2], found[2]), svg)


def run_weights(out: Path, *, quick: bool = False) -> list[stored.Row]:
    """Draw what gates do; returns the numbers beside it."""
    steps = (2, *QUICK) if quick else (300,)
    shipped, anew, other = cast("Composed", sb.load(GATE, "adapters")), *(trained(POLICIES[run], *steps) for run in ("run", "run from stand"))
    made = {"shipped": (shipped, PLAIN), "shipped, pushed": (shipped, PUSHED)}
    made |= {"from equal weights": (anew, PLAIN), "from equal weights, run@1": (other, PLAIN)}
    episodes, limit = (1, 10) if quick else (5, 1000)
    scenes = {name: play(model, environment, episodes=episodes, steps=limit) for name, (model, environment) in made.items()}
    save(draw_weights({name: scene for name, scene in scenes.items() if name != "shipped"}), out / "weights.svg")
    return [{"figure": "weights", "name": name, **weights_of(scene)} for name, scene in scenes.items()]


def run_levels(out: Path, *, quick: bool = False) -> list[stored.Row]:
    """Draw how far skills are apart; returns the numbers beside it."""
    at = states(8 if quick else 200)
    all_said = {name: said(ref, at.observations) for name, ref in POLICIES.items()}
    names, rows = list(all_said["base"]), list[stored.Row]()
    names.insert(names.index("hidden layer") + 1, f"hidden layer{SIX}")
    panels: dict[tuple[str, str], tuple[Points, Mapping[str, Any]]] = {}
    for level, (name, condition) in product(names, CONDITIONS.items()):
        of = points(condition, level, at, all_said)
        panels[name, level] = of, (numbers := separation(of))
        rows.append({"figure": "levels", "level": level, "condition": name, "points": len(of.values), **numbers})
    save(draw_levels(panels, 250 if quick else 1000), out / "levels.svg")
    return rows


FIGURES = {"weights": run_weights, "levels": run_levels}


def tables(rows: Sequence[stored.Row]) -> str:
    """Weights: mean and deviation, walk and run, over all steps of five episodes. Levels: accuracy and silhouette."""
    lines = []
    for row in (row for row in rows if row["figure"] == "weights"):
        shown = {phase: ", ".join(f"{m:.2f} +- {d:.2f}" for m, d in row[phase]) for phase in ("ground", "feet")}
        line = {"gate": row["name"], "return": f"{np.mean(row['returns']):.0f}", "worst episode": f"{min(row['returns']):.0f}"}
        line |= {"steps on the ground": f"{row['on the ground']:.1%}", "walk, run on the ground": shown["ground"]}
        lines.append(line | {"walk, run on the feet": shown["feet"]})
    told: dict[str, dict[str, str]] = {}
    for row in (row for row in rows if row["figure"] == "levels"):
        cell = f"{np.mean(row['accuracy']):.2f} / {row['silhouette']:.2f}"
        told.setdefault(row["level"], {"level": row["level"]})[row["condition"]] = cell
    return "\n\n".join(markdown(each) for each in (lines, list(told.values())) if each)


def main() -> None:
    """Draw, store and print."""
    parser = stored.parser(__doc__, "a few steps and states of each")
    parser.add_argument("--out", type=Path, help="folder of the figures, docs/figures if it is left out, runs/figures for a quick run")
    parser.add_argument("--only", choices=FIGURES, help="draw one of the two, and keep the numbers of the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.from_results:
        print(tables(stored.load(RESULTS)))
        return
    chosen = [options.only] if options.only else list(FIGURES)
    made = {name: FIGURES[name](options.out or (ROOT / "runs/figures" if options.quick else OUT), quick=options.quick) for name in chosen}
    if not options.quick:
        kept = [row for row in stored.so_far(RESULTS) if row["figure"] not in made]
        rows = [*kept, *({**row, **stored.where()} for each in made.values() for row in each)]
        stored.store(RESULTS, sorted(rows, key=lambda row: list(FIGURES).index(row["figure"])))
    print(tables([row for rows in made.values() for row in rows]))


if __name__ == "__main__":
    main()
