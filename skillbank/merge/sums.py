"""The weighted sum of skills: exact by stacking, or at a smaller rank with the least possible error."""

from __future__ import annotations

from torch import Tensor

from skillbank.core import Factor, side_by_side
from skillbank.merge.lift import Merged, Part
from skillbank.merge.registry import method

__all__ = ["average", "stack", "svd"]


@method("stack", exact=True)
def stack(part: Part) -> Factor:
    """`sum_k w_k delta_k` exactly; the rank is the sum of the ranks. With any weights: task arithmetic, negation, the linear merge."""
    return _weighted(part, part.weights)


@method("svd")
def svd(part: Part) -> Merged:
    """Best approximation of `sum_k w_k delta_k`: at a rank per module, at a total of ranks, or the smallest ranks within a total relative error.

    Without any, the rank of a module is the largest that a skill has there. Computed in the QR core: O((O + I) R^2 + R^3).
    Eckart and Young (1936).
    """
    return Merged(part.core, part.total, rank=max(len(a) for a, _ in part.there))


@method("average", exact=True, breaks={"sign": "weights are relative to their sum"})
def average(part: Part) -> Factor:
    """`sum_k w_k delta_k / sum_k w_k` exactly: weights of any size, relative to each other."""
    total = float(part.weights.sum())
    if abs(total) <= 1e-12 * float(part.weights.abs().sum()):
        raise ValueError(f"weights {part.weights.tolist()} add up to 0, so that there is no average: use stack")
    return _weighted(part, part.weights / total)


def _weighted(part: Part, weights: Tensor) -> Factor:
    chosen = [weight for pair, weight in zip(part.factors, weights.tolist(), strict=True) if pair is not None]
    return side_by_side(part.module, part.there, chosen)
