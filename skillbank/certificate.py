"""What a merge did to the skills it was given, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Certificate"]


@dataclass(frozen=True)
class Certificate:
    """Distance of a merged skill from the exact weighted sum of its parents, all of it computed in factors.

    Args:
        method: name of the merge method.
        exact: whether the merged deltas equal the weighted sum up to rounding in the skills' dtype.
        error: `||sum_k w_k delta_k - merged||_F / ||sum_k w_k delta_k||_F` over all modules; 0 where the sum itself is zero and so is the merge.
        energy: share of the sum's squared norm that the merge keeps, `1 - error^2` for an optimal truncation.
        errors: the same relative error per module.
        ranks: rank per module after the merge.
        conflict: cosine of every pair of weighted skills, (K, K): near -1 they cancel, near 0 they do not meet, near 1 they agree.
        cut: what a cut of the method's own result to a rank took away, as a relative error; None where that result is the sum, see `error`.

    """

    method: str
    exact: bool
    error: float
    energy: float
    errors: dict[str, float]
    ranks: dict[str, int]
    conflict: list[list[float]]
    cut: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a card."""
        return asdict(self)
