"""The weighted sum of skills: exact by stacking, or at a smaller rank with the least possible error."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from skillbank.merge.registry import method
from skillbank.skill import Skill, stack, truncate

__all__ = ["stacked", "svd"]


@method("stack")
def stacked(skills: Sequence[Skill], weights: Tensor) -> Skill:
    """`sum_k w_k delta_k` exactly; the rank is the sum of the ranks."""
    return stack(skills, weights)


@method("svd")
def svd(skills: Sequence[Skill], weights: Tensor, *, rank: int | None = None, error: float | None = None) -> Skill:
    """Best approximation of `sum_k w_k delta_k` at a rank per module, or the smallest ranks within a total relative error.

    Without either, the rank per module is the largest rank among the skills. Computed in the QR core: O((O + I) R^2 + R^3).
    """
    if rank is None and error is None:
        rank = max(max(skill.ranks.values()) for skill in skills)
    return truncate(stack(skills, weights), rank=rank, error=error)
