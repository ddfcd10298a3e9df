"""The weighted sum of skills: exact by stacking, or at a smaller rank with the least possible error."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from skillbank.merge.lift import present
from skillbank.merge.registry import method
from skillbank.skill import Skill, stack, truncate

__all__ = ["average", "stacked", "svd"]


@method("stack")
def stacked(skills: Sequence[Skill], weights: Tensor) -> Skill:
    """`sum_k w_k delta_k` exactly; the rank is the sum of the ranks. With any weights: task arithmetic, negation, the linear merge."""
    return stack(*present(skills, weights))


@method("svd")
def svd(skills: Sequence[Skill], weights: Tensor, *, rank: int | None = None, error: float | None = None, budget: int | None = None) -> Skill:
    """Best approximation of `sum_k w_k delta_k`: at a rank per module, at a total of ranks, or the smallest ranks within a total relative error.

    Without any, the rank per module is the largest rank among the skills. Computed in the QR core: O((O + I) R^2 + R^3). Eckart and Young (1936).
    """
    skills, weights = present(skills, weights)
    if rank is error is budget is None:
        rank = max(max(skill.ranks.values()) for skill in skills)
    return truncate(stack(skills, weights), rank=rank, error=error, budget=budget)


@method("average", breaks={"sign": "weights are relative to their sum"})
def average(skills: Sequence[Skill], weights: Tensor) -> Skill:
    """`sum_k w_k delta_k / sum_k w_k` exactly: weights of any size, relative to each other."""
    skills, weights = present(skills, weights)
    total = float(weights.sum())
    if abs(total) <= 1e-12 * float(weights.abs().sum()):
        raise ValueError(f"weights {weights.tolist()} add up to 0, so that there is no average: use stack")
    return stack(skills, weights / total)
