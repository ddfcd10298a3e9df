"""Demonstrations as training examples: drawn uniformly or by rarity, as they are or in a mirror; those of old tasks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        rows = np.arange(len(last)) if rows is None else rows
        chunks = np.minimum(rows[:, None] + np.arange(horizon), last[rows, None])
        self.rows, self.chunks = torch.from_numpy(rows), torch.from_numpy(chunks.astype(np.int32))
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
        chunks = self.chunks.index_select(0, which)
        actions = self.actions.index_select(0, chunks.view(-1)).view(*chunks.shape, self.actions.shape[-1])
        return {"observation": self.observations.index_select(0, self.rows.index_select(0, which)), "action": actions}

    def _permutations(self, mirror: Mirror) -> dict[str, Tensor]:
        sizes = {"observation": self.observations.shape[1], "action": self.actions.shape[1]}
        for key, size in sizes.items():
            if sorted(mirror.get(key, ())) != list(range(size)):
                raise ValueError(f"{self.source}: mirror.{key} must be a permutation of 0..{size - 1}, got {list(mirror.get(key, ()))}")
        return {key: torch.tensor(list(mirror[key])) for key in sizes}


class Rehearsal:
    """Steps of an old task among the new one's, so that what they have in common is not forgotten.

    Args:
        new: the examples of the new task.
        demonstrations: of the old task, see `load_demonstrations`.
        share: part of every batch, in (0, 1).
        episodes: the first this many; None for all.
        reward_below: keep the steps with a smaller reward: those on the way to the old task's goal. Steps at its goal are not the new one's.

    Raises:
        ValueError: a share out of range, another size than the new task's, or no step that is left.

    """

    def __init__(
        self,
        new: Examples,
        demonstrations: str,
        *,
        share: float,
        episodes: int | None = None,
        reward_below: float = np.inf,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"rehearsal: share is the part of a batch, in (0, 1), got {share}")
        self.share = share
        self.demonstrations = old = load_demonstrations(demonstrations, episodes=episodes)
        sizes, known = ((each.observations.shape[1], each.actions.shape[1]) for each in (old, new))
        if sizes != known:
            raise ValueError(f"rehearsal: {demonstrations} has {sizes} features and actions, {new.source} has {known}: use one embodiment")
        rows = np.flatnonzero(old.rewards < reward_below)
        if not len(rows):
            raise ValueError(f"rehearsal: no step of {demonstrations} has a reward below {reward_below}, the least is {old.rewards.min():.3g}")
        self.examples = Examples(old, new.chunks.shape[1], rows=rows)


def _rarity(observations: Tensor, power: float, neighbour: int = 5) -> NDArray[np.float64]:
    """Cumulative probabilities of the rows, each proportional to the distance to its 5th neighbour, in [0.1, 1] deviations, to a power."""
    scaled = observations / observations.std(0).clamp_min(1e-6)
    nearest = [torch.cdist(part, scaled).topk(min(neighbour + 1, len(scaled)), largest=False).values[:, -1] for part in scaled.split(1000)]
    weights = torch.cat(nearest).clamp(0.1, 1.0).double() ** power
    cumulative: NDArray[np.float64] = (weights.cumsum(0) / weights.sum()).numpy()
    cumulative[-1] = 1.0
    return cumulative
