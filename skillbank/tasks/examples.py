"""Demonstrations as training examples: drawn uniformly or by rarity, as they are or in a mirror."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skillbank.tasks.demonstrations import Demonstrations

__all__ = ["Examples"]

Mirror = Mapping[str, Sequence[int]]


class Examples:
    """Steps of demonstrations with the H actions that follow each; where an episode ends, its last action is repeated.

    Args:
        demonstrations: where they are from.
        horizon: H.
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
        balance: float = 0.0,
        mirror: Mirror | None = None,
    ) -> None:
        self.source = demonstrations.source
        self.observations = torch.from_numpy(demonstrations.observations)
        self.actions = torch.from_numpy(demonstrations.actions)
        last = np.repeat(demonstrations.starts[1:] - 1, demonstrations.lengths)
        chunks = np.arange(len(last))[:, None] + np.arange(horizon)
        self.chunks = torch.from_numpy(np.minimum(chunks, last[:, None]).astype(np.int32))
        self.cumulative = _rarity(self.observations, balance) if balance else None
        self.mirror = None if mirror is None else self._permutations(mirror)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.chunks)

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
        """Observation (B, D) and action (B, H, A) of steps (B,)."""
        chunks = self.chunks.index_select(0, which)
        actions = self.actions.index_select(0, chunks.view(-1)).view(*chunks.shape, self.actions.shape[-1])
        return {"observation": self.observations.index_select(0, which), "action": actions}

    def _permutations(self, mirror: Mirror) -> dict[str, Tensor]:
        sizes = {"observation": self.observations.shape[1], "action": self.actions.shape[1]}
        for key, size in sizes.items():
            if sorted(mirror.get(key, ())) != list(range(size)):
                raise ValueError(f"{self.source}: mirror.{key} must be a permutation of 0..{size - 1}, got {list(mirror.get(key, ()))}")
        return {key: torch.tensor(list(mirror[key])) for key in sizes}


def _rarity(observations: Tensor, power: float, neighbour: int = 5) -> NDArray[np.float64]:
    """Cumulative probabilities of the rows, each proportional to the distance to its 5th neighbour, in [0.1, 1] deviations, to a power."""
    scaled = observations / observations.std(0).clamp_min(1e-6)
    nearest = [torch.cdist(part, scaled).topk(min(neighbour + 1, len(scaled)), largest=False).values[:, -1] for part in scaled.split(1000)]
    weights = torch.cat(nearest).clamp(0.1, 1.0).double() ** power
    cumulative: NDArray[np.float64] = (weights.cumsum(0) / weights.sum()).numpy()
    cumulative[-1] = 1.0
    return cumulative
