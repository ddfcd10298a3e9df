"""Demonstrations as training examples: drawn uniformly or by rarity, in a mirror, and from old tasks beside the new one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations

__all__ = ["Examples", "Rehearsal"]

Mirror = Mapping[str, Sequence[int]]


class Examples:
    """Steps of demonstrations with the H actions that follow each; where an episode ends, its last action is repeated.

    Args:
        demonstrations: where they are from.
        horizon: H.
        rows: the steps to draw from; None for all.
        balance: draw a step with probability proportional to its rarity to this power, see `ControlTask`; 0 draws all alike.
        mirror: permutations of observation and action; half of what is drawn is seen in the mirror.

    Raises:
        ValueError: a mirror that is no pair of permutations.

    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        horizon: int,
        *,
        rows: NDArray[np.int64] | None = None,
        balance: float = 0.0,
        mirror: Mirror | None = None,
    ) -> None:
        self.source = demonstrations.source
        self.observations = torch.from_numpy(demonstrations.observations)
        self.actions = torch.from_numpy(demonstrations.actions)
        last = np.repeat(demonstrations.starts[1:] - 1, demonstrations.lengths)
        self.rows = torch.from_numpy(np.arange(len(last)) if rows is None else rows)
        chunks = np.arange(len(last))[:, None] + np.arange(horizon)
        self.chunks = torch.from_numpy(np.minimum(chunks, last[:, None]).astype(np.int32))
        self.cumulative = _rarity(self.observations[self.rows], balance) if balance else None
        self.mirror = None if mirror is None else self._permutations(mirror)

    def __len__(self) -> int:
        """Return the number of steps to draw from."""
        return len(self.rows)

    def draw(self, count: int, generator: np.random.Generator) -> dict[str, Tensor]:
        """Observation (count, D) and action (count, H, A), drawn with replacement."""
        if self.cumulative is None:
            which = generator.integers(0, len(self), count)
        else:
            which = np.searchsorted(self.cumulative, generator.random(count), side="right")
        batch = self.batch(torch.from_numpy(which))
        if self.mirror is not None:
            flip = torch.from_numpy(generator.random(count) < 0.5)
            for key, order in self.mirror.items():
                batch[key] = torch.where(flip.view(-1, *[1] * (batch[key].dim() - 1)), batch[key][..., order], batch[key])
        return batch

    def batch(self, which: Tensor) -> dict[str, Tensor]:
        """Observation (B, D) and action (B, H, A) of positions (B,) among the steps to draw from."""
        rows = self.rows.index_select(0, which)
        chunks = self.chunks.index_select(0, rows)
        actions = self.actions.index_select(0, chunks.view(-1)).view(*chunks.shape, self.actions.shape[-1])
        return {"observation": self.observations.index_select(0, rows), "action": actions}

    def act_as(self, other: Examples) -> None:
        """Replace the actions of every step to draw from by those of the nearest step of `other`, in its features' standard deviations."""
        scale = other.observations.std(0).clamp_min(1e-6)
        known = other.observations[other.rows] / scale
        parts = (self.observations[self.rows] / scale).split(1000)
        nearest = torch.cat([torch.cdist(part, known).argmin(1) for part in parts])
        self.chunks = self.chunks.clone()
        self.chunks[self.rows] = other.chunks[other.rows[nearest]]
        self.actions = other.actions

    def _permutations(self, mirror: Mirror) -> dict[str, Tensor]:
        sizes = {"observation": self.observations.shape[1], "action": self.actions.shape[1]}
        for key, size in sizes.items():
            if sorted(mirror.get(key, ())) != list(range(size)):
                raise ValueError(f"{self.source}: mirror.{key} must be a permutation of 0..{size - 1}, got {list(mirror.get(key, ()))}")
        return {key: torch.tensor(list(mirror[key])) for key in sizes}


class Rehearsal:
    """States of an old task that a new skill is trained on as well, so that it is not at a loss where the new demonstrations never were.

    Args:
        new: the examples of the new task.
        demonstrations: of the old task, see `load_demonstrations`.
        share: part of every batch, in (0, 1).
        label: what to do in these states: `own`, the old demonstrations' actions; or `nearest`, the actions of the nearest state of the new
            demonstrations, so that the new skill starts from wherever the old one may have come to rest.
        episodes: the first this many; None for all.
        feature: position of an observation feature that chooses steps, or None for all steps.
        low: keep the steps where that feature is at least this ..
        high: .. and below this.
        most: keep at most this many of them, evenly spaced.
        balance: as for the demonstrations.
        mirror: as for the demonstrations.

    Raises:
        ValueError: a share out of range, another label, bounds without a feature, another size than the new task's, or no step that is left.

    """

    def __init__(
        self,
        new: Examples,
        demonstrations: str,
        *,
        share: float,
        label: Literal["own", "nearest"] = "own",
        episodes: int | None = None,
        feature: int | None = None,
        low: float = -math.inf,
        high: float = math.inf,
        most: int = 20_000,
        balance: float = 0.0,
        mirror: Mirror | None = None,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"rehearsal: share is the part of a batch, in (0, 1), got {share}")
        if label not in ("own", "nearest"):
            raise ValueError(f"rehearsal: label is own or nearest, got {label!r}")
        if feature is None and (low, high) != (-math.inf, math.inf):
            raise ValueError(f"rehearsal: low and high bound a feature, give its position, got {low=}, {high=} and {feature=}")
        self.share = share
        self.demonstrations = old = load_demonstrations(demonstrations, episodes=episodes)
        sizes = (old.observations.shape[1], old.actions.shape[1])
        if sizes != (new.observations.shape[1], new.actions.shape[1]):
            raise ValueError(
                f"rehearsal: {demonstrations} has {sizes[0]} features and {sizes[1]} actions, {new.source} has others: use one embodiment"
            )
        values = old.rewards * 0 if feature is None else old.observations[:, feature]
        rows = np.flatnonzero((values >= low) & (values < high))
        if not len(rows):
            raise ValueError(f"rehearsal: no step of {demonstrations} has observation feature {feature} in [{low}, {high})")
        rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]
        self.examples = Examples(old, new.chunks.shape[1], rows=rows, balance=balance, mirror=mirror)
        if label == "nearest":
            self.examples.act_as(new)


def _rarity(observations: Tensor, power: float, neighbour: int = 5) -> NDArray[np.float64]:
    """Cumulative probabilities of the rows, each proportional to the distance to its 5th neighbour, in [0.1, 1] deviations, to a power."""
    scaled = observations / observations.std(0).clamp_min(1e-6)
    nearest = [torch.cdist(part, scaled).topk(min(neighbour + 1, len(scaled)), largest=False).values[:, -1] for part in scaled.split(1000)]
    weights = torch.cat(nearest).clamp(0.1, 1.0).double() ** power
    cumulative: NDArray[np.float64] = (weights.cumsum(0) / weights.sum()).numpy()
    cumulative[-1] = 1.0
    return cumulative
