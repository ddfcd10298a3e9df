"""How sure a mean over training seeds is, and a difference of two.

The unit is a training seed: its mean over test episodes is one value, since episodes of one seed are alike. With so few of them the bootstrap covers
far less than it says, so intervals are Student's, of a difference Welch's, or Student's of the differences seed by seed where both rows stand on the
same skills. They assume that seeds vary normally.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

__all__ = ["difference", "interval", "paired"]

Seeds = list[list[float]]
"""Values by training seed, one per episode."""


def interval(per_seed: Seeds) -> tuple[float, float]:
    """95 % interval of the mean over seeds, of which there are two or more."""
    return difference(per_seed, 0.0)


def difference(higher: Seeds, lower: Seeds | float) -> tuple[float, float]:
    """95 % interval of the difference of two means over seeds, or of a mean to a number.

    Of a single seed, that of a row of which nothing is trained, episodes are the units.
    """
    sides = [_units(higher), *([_units(lower)] if isinstance(lower, list) else [])]
    centre = float(sides[0].mean()) - (float(sides[1].mean()) if isinstance(lower, list) else lower)
    variances = [side.var(ddof=1) / len(side) for side in sides]
    if (total := sum(variances)) == 0:
        return centre, centre
    freedom = total**2 / sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, sides, strict=True))
    half = float(t.ppf(0.975, freedom) * total**0.5)
    return centre - half, centre + half


def paired(higher: Seeds, lower: Seeds) -> tuple[float, float]:
    """95 % interval of the mean difference of two rows that have the same seeds in the same order, two or more."""
    return interval([[float(np.mean(one) - np.mean(two))] for one, two in zip(higher, lower, strict=True)])


def _units(per_seed: Seeds) -> NDArray[np.float64]:
    """Means of seeds; the values of a single one."""
    return np.array(per_seed[0] if len(per_seed) == 1 else [np.mean(each) for each in per_seed])
