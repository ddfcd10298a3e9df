"""One module of the skills that are merged, and from a function on its small matrices to a merge method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skillbank.core import Core, Factor, core_of, promote
from skillbank.merge.registry import Method

__all__ = ["Merged", "Part", "on_cores", "on_gram", "resolution", "shares"]


class Merged(NamedTuple):
    """A module's merge `Q_B C Q_A^T`, to be cut to a rank.

    Args:
        bases: Q_B and Q_A, with orthonormal columns.
        matrix: C (P, P').
        norm: Frobenius norm of what was merged, where C is a fit to it; None where C is all of it.
        rank: that it is cut to where nothing is asked for; None for all that is not rounding.

    """

    bases: Core
    matrix: Tensor
    norm: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Part:
    """One module of the K skills whose weights there are not 0; all skills where all weights are.

    Args:
        module: its path.
        factors: (A, B) of every skill; None of one that lacks the module, which has a delta of zeros there.
        weights: (K,) float64.
        places: where the K skills stand among those that the user gave.
        most: highest rank that is asked for; None where that is for the method to say, 0 where all ranks are needed.
        dense: what is asked for is the dense delta (O, I') itself, by a method whose result is dense.

    """

    module: str
    factors: Sequence[Factor | None]
    weights: Tensor
    places: Sequence[int]
    most: int | None = None
    dense: bool = False

    @property
    def there(self) -> list[Factor]:
        """Factors of the skills that have the module."""
        return [pair for pair in self.factors if pair is not None]

    @cached_property
    def core(self) -> Core:
        """QR core of the skills' deltas, in float64, before they are weighted."""
        return core_of(self.module, self.factors)

    @cached_property
    def deltas(self) -> Tensor:
        """Weighted deltas in the core, (K, P, P')."""
        return self.core.cores * self.weights.to(self.core.cores)[:, None, None]

    @cached_property
    def total(self) -> Tensor:
        """Weighted sum of the deltas in the core, (P, P')."""
        return self.deltas.sum(0)

    @property
    def dtype(self) -> torch.dtype:
        """What holds what all skills hold of the module."""
        return promote([half for pair in self.there for half in pair])

    @property
    def noise(self) -> float:
        """Norm below which a direction of the weighted deltas is rounding."""
        return resolution(self.dtype) * float(self.deltas.norm())


def resolution(dtype: torch.dtype) -> float:
    """Relative size of what is rounding in sums of deltas whose factors are stored so."""
    return max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float64).eps)


def on_cores(function: Callable[..., Tensor]) -> Method:
    """Lift `function(deltas (K, P, P'), noise, **options) -> C (P, P')` to a merge method, in float64.

    The weighted deltas are `Q_B deltas_k Q_A^T` with orthonormal Q, so that norms, angles and singular values of these small matrices are theirs.
    A direction of them whose norm is below `noise` is rounding.
    """

    @wraps(function)
    def lifted(part: Part, **options: Any) -> Merged:
        return Merged(part.core, function(part.deltas, part.noise, **options))

    return lifted


def on_gram(function: Callable[..., Tensor]) -> Method:
    """Lift `function(gram (K, K), weights (K,), **options) -> coefficients (K,)`: the merge is `sum_k coefficient_k delta_k` of the module."""

    @wraps(function)
    def lifted(part: Part, **options: Any) -> Merged:
        flat = part.core.cores.flatten(1)
        coefficients = function(flat @ flat.mT, part.weights.to(flat), **options)
        return Merged(part.core, torch.einsum("k,kpq->pq", coefficients, part.core.cores))

    return lifted


def shares(weights: Tensor) -> Tensor:
    """Weights that sum to one, (K,).

    Raises:
        ValueError: a negative weight, or nothing but zeros.

    """
    if (weights < 0).any():
        raise ValueError(f"this is a mean, a negative weight has no meaning in it, got {weights.tolist()}: use stack or svd")
    if not weights.any():
        raise ValueError("all weights are 0, so that there is no mean: use stack or svd")
    return weights / weights.sum()
