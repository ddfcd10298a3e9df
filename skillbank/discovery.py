"""Skills in demonstrations that nobody has cut up: cut where known policies begin to err otherwise, sort the pieces, train a skill for each kind.

Shapes: E episodes, N steps of all episodes together, C policies, S segments, F features of a segment, K kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skillbank.bank import Bank, Ref
from skillbank.model import evaluating, on
from skillbank.recipe import train
from skillbank.tasks.demonstrations import Demonstrations
from skillbank.tasks.examples import Examples

__all__ = [
    "Discovered",
    "Segment",
    "boundaries",
    "boundary_scores",
    "cluster",
    "discover",
    "errors",
    "features",
    "purity",
    "segments",
    "train_discovered",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """A piece of an episode.

    Args:
        episode: number of the episode, from 0.
        first: its first step in the episode, from 0.
        last: its last step, which belongs to it.

    """

    episode: int
    first: int
    last: int

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.last + 1 - self.first


@dataclass(frozen=True, eq=False)
class Discovered:
    """What is taken for demonstrations of one skill.

    Args:
        demonstrations: every segment as an episode.
        segments: where they are from, in the same order.
        source: of the demonstrations that they were cut from.
        hash: of those demonstrations.

    """

    demonstrations: Demonstrations
    segments: tuple[Segment, ...]
    source: str
    hash: str

    @property
    def lineage(self) -> dict[str, Any]:
        """Source, its hash and the segments, as plain values."""
        return {"source": self.source, "hash": self.hash, "segments": [asdict(segment) for segment in self.segments]}

    def save(self, path: str | Path) -> None:
        """Write an npz file for `load_demonstrations`; the lineage is in it as `source`, `hash` and `segments` (S, 3): episode, first, last."""
        data = self.demonstrations
        timeouts = np.isin(np.arange(len(data.rewards)), data.starts[1:] - 1)
        where = np.array([[segment.episode, segment.first, segment.last] for segment in self.segments])
        arrays = {"observations": data.observations, "actions": data.actions, "rewards": data.rewards, "timeouts": timeouts, "segments": where}
        more = {} if data.costs is None else {"costs": data.costs}
        np.savez_compressed(path, allow_pickle=False, source=np.array(self.source), hash=np.array(self.hash), **arrays, **more)


def discover(
    demonstrations: Demonstrations,
    models: Sequence[nn.Module],
    *,
    skills: int | None = None,
    minimum: int = 60,
    strength: float = 3.0,
    draws: int = 16,
    seed: int = 0,
) -> list[Discovered]:
    """Cut demonstrations where the errors of known policies change, and sort the pieces by kind.

    The boundaries are those of arXiv 2503.10684, where the prediction error of a base policy jumps, but found as changes of its mean, see
    `boundaries`; a policy that knows one of the skills besides the base shows changes between others that the base finds equally strange.

    Args:
        demonstrations: whole episodes.
        models: the base, and other policies if there are any, see `errors`.
        skills: K; None chooses it, see `cluster`.
        minimum: steps of the shortest segment, see `boundaries`.
        strength: see `boundaries`.
        draws: see `errors`.
        seed: of the draws and of the clusters' starts.

    Returns:
        One for each kind of segment, that with most steps first.

    Raises:
        ValueError: as `errors`, `boundaries` and `cluster`.

    """
    signal = np.stack([errors(model, demonstrations, draws=draws, seed=seed) for model in models], 1)
    cuts = boundaries(signal, demonstrations.starts, minimum=minimum, strength=strength)
    found = segments(demonstrations.starts, cuts)
    labels = cluster(features(demonstrations, found, signal), skills, seed=seed)
    kinds = [[segment for segment, label in zip(found, labels, strict=True) if label == kind] for kind in range(labels.max() + 1)]
    kinds.sort(key=lambda kind: -sum(map(len, kind)))
    return [Discovered(_piece(demonstrations, kind), tuple(kind), demonstrations.source, demonstrations.hash) for kind in kinds]


@torch.no_grad()
def errors(model: nn.Module, demonstrations: Demonstrations, *, draws: int = 16, seed: int = 0, size: int = 1000) -> Floats:
    """Prediction error of a policy on every step, (N,) with mean 1: its training loss, the mean over draws of what is random in it.

    A draw, for a diffusion policy a denoise step and a noise, is the same for every row, so that rows differ by what is in them only, and counts in
    units of its mean over the rows: at the last denoise steps losses are a hundred times smaller than at the first, and tell more.

    Args:
        model: with `losses(batch)`, the loss of every row (B,).
        demonstrations: of its sizes.
        draws: how many.
        seed: of the first draw.
        size: rows of a batch.

    Raises:
        ValueError: a model without such losses, demonstrations of other sizes than its own, or no draws.

    """
    policy: Any = model
    losses = getattr(policy, "losses", None)
    if not callable(losses) or draws < 1:
        given = f"{type(model).__name__} with losses: {callable(losses)}, {draws=}"
        raise ValueError(f"errors need a model with losses(batch), the loss of every row, such as a base or a skill on it, and a draw, got {given}")
    device, steps = next(model.parameters()).device, len(demonstrations.rewards)
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        try:
            horizon = policy.predict({"observation": torch.from_numpy(demonstrations.observations[:1]).to(device)}).shape[1]
            examples = Examples(demonstrations, horizon)
            found = []
            for rows in torch.arange(-(-steps // size) * size).clamp(max=steps - 1).split(size):  # whole batches: what is drawn depends on their size
                batch = on(device, examples.batch(rows))
                for draw in range(draws):
                    torch.manual_seed(seed + draw)
                    with _Alike(size):
                        found.append(losses(batch).double().cpu())
        except ValueError as error:
            raise ValueError(f"{demonstrations.source} does not go with this {type(model).__name__}: {error}: give a base of its sizes") from error
    every = torch.stack(found).view(-1, draws, size).transpose(0, 1).flatten(1)[:, :steps]
    return (every / every.mean(1, keepdim=True).clamp_min(1e-12)).mean(0).numpy()


def boundaries(signal: ArrayLike, starts: ArrayLike, *, minimum: int = 60, strength: float = 3.0) -> NDArray[np.int64]:
    """Rows where a new segment begins within an episode, rising: where the mean of the signal changes.

    The segments are those with the least squared deviations from their means, to which every further one adds a penalty; the least of all
    partitions is found, by dynamic programming with the pruning of PELT (arXiv 1101.1438). Deviations are in units of the long-run standard
    deviation of each column, which the differences of the means of neighbouring blocks of `minimum` rows tell (their median absolute value: most
    blocks must not hold a change). So the ups and downs of a gait count by what is left of them in a block: nothing, if it goes round often enough.
    The penalty is `strength * (C + 1) log n` in an episode of n rows; at 1 it is the Bayesian information criterion's.

    Args:
        signal: (N,) or (N, C).
        starts: (E + 1,), first rows of the episodes and N, as in `Demonstrations`.
        minimum: rows of the shortest segment; some cycles long, where there are cycles.
        strength: of the penalty.

    Raises:
        ValueError: a signal that is not finite or not of N rows, an episode shorter than `minimum`, or numbers below their least.

    """
    x, edges = np.asarray(signal, np.float64), np.asarray(starts, np.int64)
    x = x.reshape(len(x), -1)
    if minimum < 1 or strength < 0:
        raise ValueError(f"minimum must be at least 1 and strength at least 0, got {minimum=}, {strength=}")
    if len(x) != edges[-1] or not np.isfinite(x).all():
        raise ValueError(f"a signal of {edges[-1]} rows that are finite is needed, got {len(x)}, {int(np.isfinite(x).all(1).sum())} of them finite")
    if (short := np.diff(edges).min()) < minimum:
        raise ValueError(f"episode {np.diff(edges).argmin()} has {short} steps, a segment at least {minimum}: leave it out, or lower minimum")
    x = (x - x.mean(0)) / _deviation(x, edges, minimum)
    found = [first + np.array(_partition(x[first:last], minimum, strength)) for first, last in pairwise(edges)]
    return np.concatenate(found).astype(np.int64)


def segments(starts: ArrayLike, cuts: ArrayLike) -> list[Segment]:
    """Segments between the starts (E + 1,) of episodes and further boundaries, in order; every step is in one of them."""
    edges = np.asarray(starts, np.int64)
    every = np.union1d(edges, np.asarray(cuts, np.int64))
    episodes = np.searchsorted(edges, every[:-1], side="right") - 1
    return [
        Segment(int(episode), int(first - edges[episode]), int(stop - 1 - edges[episode]))
        for episode, (first, stop) in zip(episodes, pairwise(every), strict=True)
    ]


def features(demonstrations: Demonstrations, found: Sequence[Segment], signal: Floats) -> Floats:
    """What segments are compared by, (S, F): medians and interquartile ranges of observations and actions, and logarithms of the median errors.

    Each of the three kinds is in standard deviations and weighs as much as the others, however many numbers it has. Medians, because a fall or a
    way up from the ground within a segment would outweigh all that comes after it.
    """
    rows = np.concatenate([demonstrations.observations, demonstrations.actions], 1)
    spans = [demonstrations.starts[each.episode] + np.arange(each.first, each.last + 1) for each in found]
    low, middle, high = np.stack([np.percentile(rows[span], (25, 50, 75), axis=0) for span in spans], 1)
    kinds = [middle, high - low, np.log(np.stack([np.median(signal[span], axis=0) for span in spans]) + 1e-12)]
    return np.concatenate([(kind - kind.mean(0)) / np.maximum(kind.std(0), 1e-9) / np.sqrt(kind.shape[1]) for kind in kinds], 1)


def cluster(values: ArrayLike, skills: int | None = None, *, most: int = 8, seed: int = 0, restarts: int = 20) -> NDArray[np.int64]:
    """Kind of every segment, (S,) in 0..K-1, by k-means.

    Args:
        values: (S, F), see `features`.
        skills: K; None takes the K from 2 to `most` with the largest mean silhouette, or 1 where none is above 0.25, the bound below which Kaufman
            and Rousseeuw (Finding Groups in Data, 1990) see no structure.
        most: the largest K that is tried.
        seed: of the starts, which are drawn as k-means++ does.
        restarts: how many starts; the one that comes to the smallest squared distances is taken.

    Raises:
        ValueError: more skills than segments, or fewer than one.

    """
    x = np.asarray(values, np.float64)
    if skills is not None and not 1 <= skills <= len(x):
        raise ValueError(f"{skills} skills cannot be told from {len(x)} segments: ask for 1 to {len(x)}, or give more or longer demonstrations")
    points, generator = torch.from_numpy(x), torch.Generator().manual_seed(seed)
    if skills is not None:
        return _means(points, skills, restarts, generator).numpy()
    tried = [_means(points, k, restarts, generator) for k in range(2, min(most, len(x) - 1) + 1)]
    best = max(tried, key=lambda labels: _silhouette(points, labels), default=torch.zeros(len(x), dtype=torch.long))
    return (best if best.any() and _silhouette(points, best) > 0.25 else torch.zeros_like(best)).numpy()


def boundary_scores(found: ArrayLike, true: ArrayLike, tolerance: int = 25) -> dict[str, float]:
    """Precision, recall and F1 of boundaries, in [0, 1]; a true one counts once, if one that was found is at most `tolerance` rows away.

    Where none is there and none was found, all three are 1.
    """
    mine, theirs = (np.sort(np.asarray(each)).tolist() for each in (found, true))
    hits = i = j = 0
    while i < len(mine) and j < len(theirs):
        near = abs(mine[i] - theirs[j]) <= tolerance
        hits += near
        i, j = i + (near or mine[i] < theirs[j]), j + (near or mine[i] > theirs[j])
    precision, recall = (hits / len(each) if each else float(not (mine or theirs)) for each in (mine, theirs))
    return {"f1": 2 * precision * recall / max(precision + recall, 1e-12), "precision": precision, "recall": recall}


def purity(labels: ArrayLike, true: ArrayLike) -> float:
    """Share of the entries (N,) that are of the kind that is most frequent under their label, in (0, 1]."""
    _, mine = np.unique(np.asarray(labels), return_inverse=True)
    _, theirs = np.unique(np.asarray(true), return_inverse=True)
    table = np.zeros((mine.max() + 1, theirs.max() + 1))
    np.add.at(table, (mine, theirs), 1)
    return float(table.max(1).sum() / len(mine))


def train_discovered(found: Sequence[Discovered], conf: Mapping[str, Any], bank: Bank, *, name: str, folder: str | Path) -> list[Ref]:
    """Train a skill for each kind and put it in the bank, its card with the lineage under `conf.discovered`.

    Args:
        found: by `discover`.
        conf: as in conf/train.yaml, for example of the card of another skill, `bank.card("walker/walk").conf`; its task gets other demonstrations,
            all of them.
        bank: with the base.
        name: the skills are called `<name>-0`, `<name>-1`, ...
        folder: where their demonstrations are written, as `0.npz`, `1.npz`, ...

    Raises:
        ValueError: as `recipe.train`.

    """
    refs = []
    for number, each in enumerate(found):
        path = Path(folder) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        each.save(path)
        task = {**conf["task"], "name": f"{name}-{number}", "demonstrations": str(path), "episodes": None, "held_out": 0}
        made = train({**conf, "name": task["name"], "task": task, "discovered": each.lineage}, bank)
        refs.append(bank.put(made.thing, made.name, card=made.card))
    return refs


class _Alike(TorchDispatchMode):
    """In this block, what is drawn at random for the B rows of a batch is the same for all: what is drawn for the first."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags and isinstance(result, Tensor) and result.shape[:1] == (self.rows,):
            result.copy_(result[:1].clone().expand_as(result))
        return result


def _piece(demonstrations: Demonstrations, kind: Sequence[Segment]) -> Demonstrations:
    """Segments as episodes; where they are cut nothing ends."""
    rows = np.concatenate([demonstrations.starts[each.episode] + np.arange(each.first, each.last + 1) for each in kind])
    observations, actions, rewards = (array[rows] for array in (demonstrations.observations, demonstrations.actions, demonstrations.rewards))
    costs = None if demonstrations.costs is None else demonstrations.costs[rows]
    starts = np.cumsum([0, *map(len, kind)])
    return Demonstrations(observations, actions, rewards, starts, f"{len(kind)} segments of {demonstrations.source}", costs=costs)


def _deviation(x: Floats, starts: NDArray[np.int64], block: int) -> Floats:
    """Long-run standard deviation of the columns, (C,); a ten-thousandth of the plain one at least."""
    means = [x[first : last - (last - first) % block].reshape(-1, block, x.shape[1]).mean(1) for first, last in pairwise(starts)]
    steps = np.abs(np.concatenate([np.diff(each, axis=0) for each in means]))
    least = np.maximum(1e-4 * x.std(0), 1e-12)
    return np.maximum(np.sqrt(block / 2) * np.median(steps, axis=0) / 0.6745, least) if len(steps) else least


def _partition(x: Floats, minimum: int, strength: float) -> list[int]:
    """Where the segments of least cost of (n, C) begin, without the first."""
    n, columns = x.shape
    penalty = strength * (columns + 1) * np.log(n)
    sums, squares = np.vstack([np.zeros(columns), x.cumsum(0)]), np.concatenate([[0.0], np.square(x).sum(1).cumsum()])

    def cost(first: NDArray[np.int64], stop: int) -> Floats:
        return squares[stop] - squares[first] - np.square(sums[stop] - sums[first]).sum(1) / (stop - first)

    best, before, candidates = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64), np.array([0])
    best[0] = 0.0
    for stop in range(minimum, n + 1):
        if (new := stop - minimum) >= minimum:
            old = new - candidates >= minimum
            lost = old & (best[candidates] + cost(candidates, new) > best[new])
            candidates = np.append(candidates[~lost], new)
        values = best[candidates] + cost(candidates, stop) + penalty
        best[stop], before[stop] = values.min(), candidates[values.argmin()]
    found = [int(before[n])]
    while found[-1]:
        found.append(int(before[found[-1]]))
    return found[-2::-1]


def _means(points: Tensor, k: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Labels (S,) of the best of some runs of k-means, numbered by first appearance."""
    runs = []
    for _ in range(restarts):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < k:
            far = torch.cdist(points, centres).square().min(1).values
            centres = torch.cat([centres, points[torch.multinomial(far + 1e-12, 1, generator=generator)]])
        for _ in range(100):
            labels = torch.cdist(points, centres).argmin(1)
            held = torch.nn.functional.one_hot(labels, k).to(points)
            moved = torch.where(held.any(0)[:, None], held.mT @ points / held.sum(0).clamp_min(1)[:, None], centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        runs.append((float((points - centres[labels]).square().sum()), labels))
    labels = min(runs, key=lambda run: run[0])[1]
    order = list(dict.fromkeys(labels.tolist()))
    return torch.tensor([order.index(label) for label in labels.tolist()])


def _silhouette(points: Tensor, labels: Tensor) -> float:
    """Mean over the points of (b - a) / max(a, b): mean distances to the others of its own cluster and to those of the nearest other one."""
    held = torch.nn.functional.one_hot(labels).to(points)
    total, count = torch.cdist(points, points) @ held, held.sum(0)
    own = total[held.bool()] / (count[labels] - 1).clamp_min(1)
    others = (total / count).masked_fill(held.bool(), torch.inf).min(1).values
    values = torch.where(count[labels] > 1, (others - own) / torch.maximum(own, others), 0.0)
    return float(values.mean())
