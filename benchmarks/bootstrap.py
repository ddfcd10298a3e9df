"""How sure a mean over training seeds and test episodes is.

Shapes: S seeds, each with its own number of episodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["interval", "resampled"]


def resampled(per_seed: list[list[float]], repeats: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Means when seeds are drawn with replacement, and episodes within each, (repeats,)."""
    lengths = np.array([len(each) for each in per_seed])
    values = np.zeros((len(per_seed), lengths.max()))
    for seed, each in enumerate(per_seed):
        values[seed, : len(each)] = each
    seeds = generator.integers(0, len(per_seed), (repeats, len(per_seed)))
    episodes = (generator.random((*seeds.shape, lengths.max())) * lengths[seeds][..., None]).astype(int)
    counted = np.arange(lengths.max()) < lengths[seeds][..., None]
    means: NDArray[np.float64] = ((values[seeds[..., None], episodes] * counted).sum(-1) / lengths[seeds]).mean(-1)
    return means


def interval(per_seed: list[list[float]], repeats: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds and episodes (arXiv 2108.13264)."""
    low, high = np.quantile(resampled(per_seed, repeats, np.random.default_rng(0)), [0.025, 0.975])
    return float(low), float(high)
