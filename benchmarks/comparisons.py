"""Rows of studies, and what comes of comparing them: a claim is a few comparisons of two rows.

The effect of a comparison is the difference of the means over all training seeds and episodes, with a 95 % interval over seeds
(benchmarks/intervals.py): of the differences seed by seed where both rows are made of something in common, such as a skill, otherwise Welch's. It
holds where the interval lies above 0 and fails where it lies below; with three to five seeds only large differences do either. A claim is reproduced
(one of ours: holds) where all of its comparisons hold, not so where one fails, inconclusive where none fails and some are neither, and open where
rows are missing. Fewer than three seeds decide nothing.

Nothing is corrected for the number of comparisons, so that of a hundred that are true a few fail; and all seeds are tested from the same ten or
twenty starts, so that the intervals say nothing of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.intervals import Seeds, difference, paired

__all__ = ["Claim", "Comparison", "Row", "by_name"]

LEAST = 3
"""Seeds that a verdict takes."""


@dataclass(frozen=True)
class Row:
    """Of a study.

    Args:
        values: one per test episode, by training seed.
        made_of: hashes of what was trained for it.

    """

    values: Mapping[int, Sequence[float]]
    made_of: frozenset[str] = frozenset()

    def changed(self, how: Callable[[float], float]) -> Row:
        """With other values."""
        return replace(self, values={seed: [how(each) for each in values] for seed, values in self.values.items()})

    @property
    def per_seed(self) -> Seeds:
        """Values alone."""
        return [list(each) for each in self.values.values()]

    @property
    def mean(self) -> float:
        """Over seeds and episodes."""
        return float(np.mean(np.concatenate(self.per_seed)))


@dataclass(frozen=True)
class Comparison:
    """That one row is above another.

    Args:
        says: which.
        higher: the row that is to be above.
        lower: the other, or a number.
        untrained: of `lower` nothing is trained, so that it is one seed for all.

    """

    says: str
    higher: Row
    lower: Row | float
    untrained: bool = False

    @property
    def sides(self) -> tuple[Row, Row | float]:
        """Both; what is made of something in common with the seeds that both have."""
        if not self.paired:
            return self.higher, self.lower
        assert isinstance(self.lower, Row)
        both = sorted(self.higher.values.keys() & self.lower.values.keys())
        higher, lower = (replace(row, values={seed: row.values[seed] for seed in both}) for row in (self.higher, self.lower))
        return higher, lower

    @property
    def paired(self) -> bool:
        """Whether both are made of something in common."""
        return isinstance(self.lower, Row) and bool(self.higher.made_of & self.lower.made_of)

    @property
    def seeds(self) -> int:
        """Of the row with fewer."""
        higher, lower = self.sides
        if not isinstance(lower, Row) or (self.untrained and lower.values):
            return len(higher.values)
        return min(len(higher.values), len(lower.values))

    @property
    def effect(self) -> float:
        """Difference of means."""
        higher, lower = self.sides
        return higher.mean - (lower.mean if isinstance(lower, Row) else lower)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the effect."""
        higher, lower = self.sides
        if not isinstance(lower, Row):
            return difference(higher.per_seed, lower)
        return paired(higher.per_seed, lower.per_seed) if self.paired else difference(higher.per_seed, lower.per_seed)

    @property
    def verdict(self) -> str:
        """Holds, fails, unclear, or that rows are missing."""
        if self.seeds < LEAST:
            return "missing" if not self.seeds else "too few seeds"
        low, high = self.interval
        return "holds" if low > 0 else "fails" if high < 0 else "unclear"


@dataclass(frozen=True)
class Claim:
    """A sentence, in comparisons; the paper's, or one that this repository adds."""

    name: str
    says: str
    comparisons: Sequence[Comparison]
    remark: str = ""
    ours: bool = False

    @property
    def verdict(self) -> str:
        """See the module."""
        found = {each.verdict for each in self.comparisons}
        if "fails" in found:
            return "does not hold" if self.ours else "not reproduced"
        if found & {"missing", "too few seeds"}:
            return "open"
        return "inconclusive" if found != {"holds"} else "holds" if self.ours else "reproduced"


def by_name(results: Sequence[Mapping[str, Any]], key: str = "returns") -> Callable[[str], Row]:
    """Rows, by their names; without values where nothing is stored."""

    def find(name: str) -> Row:
        found = sorted((each for each in results if each["name"] == name), key=lambda each: each["seed"])
        made_of = frozenset(one for each in found for one in each.get("made_of", {}).values())
        return Row({each["seed"]: each[key] for each in found}, made_of)

    return find
