"""What a merge did to the skills it was given, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Certificate"]


@dataclass(frozen=True)
class Certificate:
    """Distance of a merged skill from the exact weighted sum of its parents, all of it computed in factors.

    Args:
        method: name of the merge method.
        exact: whether the merged deltas equal the weighted sum up to rounding in the skills' dtype.
        error: `||sum_k w_k delta_k - merged||_F / ||sum_k w_k delta_k||_F` over all modules; 0 where the sum itself is zero and so is the merge.
        energy: `1 - error^2`, or 0: the share of the sum's squared norm that the best approximation at a rank keeps; of other methods it says less.
        errors: the same relative error per module.
        ranks: rank per module after the merge.
        conflict: cosine of every pair of weighted skills, (K, K): near -1 they cancel, near 0 they do not meet, near 1 they agree.
        cut: what a cut of the method's own result to a rank took away, as a relative error; None where that result is the sum, see `error`.
        effective_ranks: exponential of the entropy of the merge's singular values, per module: how many directions it really has.
        cancelled: share of the weighted skills' squared norms that is gone from their sum, `1 - ||sum_k w_k delta_k||^2 / sum_k ||w_k delta_k||^2`;
            0 where they do not meet or agree.

    """

    method: str
    exact: bool
    error: float
    energy: float
    errors: dict[str, float]
    ranks: dict[str, int]
    conflict: list[list[float]]
    cut: float | None = None
    effective_ranks: dict[str, float] = field(default_factory=dict)
    cancelled: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a card; None for an error that has no measure, because the weighted sum is zero and the merge is not."""
        return {key: _finite(value) for key, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
