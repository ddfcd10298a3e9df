"""From a function on the small matrices of one module to a merge method on skills."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skillbank.merge.registry import Method
from skillbank.skill import Core, Skill, core, from_cores, modules_of, promote

__all__ = ["Merged", "dtype_of", "on_cores", "on_gram", "on_modules", "present", "shares"]


class Merged(NamedTuple):
    """A module's merge `Q_B C Q_A^T`.

    Args:
        bases: Q_B and Q_A, with orthonormal columns.
        matrix: C (P, P').
        norm: Frobenius norm of what was merged, where C is a fit to it; None where C is all of it.

    """

    bases: Core
    matrix: Tensor
    norm: float | None = None


def on_modules(function: Callable[..., Merged]) -> Method:
    """Lift `function(skills, weights (K,), module, **options) -> Merged` to a merge method, which also takes one of `rank`, `error` and `budget`.

    See `truncate` for these three; a function that has a `rank` of its own is told it. What the cut takes away is returned beside the skill.
    """
    shape = signature(function)
    options = [each for each in shape.parameters.values() if each.kind is Parameter.KEYWORD_ONLY and each.name not in ("module", "rank")]

    @wraps(function)
    def lifted(
        skills: Sequence[Skill], weights: Tensor, *, rank: int | None = None, error: float | None = None, budget: int | None = None, **options: Any
    ) -> tuple[Skill, float]:
        told = {"rank": rank if error is budget is None else 0} if "rank" in shape.parameters else {}
        modules = {name: function(skills, weights, module=name, **told, **options) for name in modules_of(present(skills, weights)[0])}
        parts = {name: (each.bases, each.matrix, dtype_of(skills, name)) for name, each in modules.items()}
        merged = from_cores(parts, frozenset[str]().union(*(skill.embeddings for skill in skills)), rank=rank, error=error, budget=budget)
        norms = {name: float(each.matrix.norm()) if each.norm is None else each.norm for name, each in modules.items()}
        return merged, _lost(merged, norms)

    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("rank", "error", "budget")]
    vars(lifted)["__signature__"] = shape.replace(parameters=[*list(shape.parameters.values())[:2], *options, *more])
    return lifted


def _lost(merged: Skill, norms: dict[str, float]) -> float:
    """Relative error of a cut to a rank; balanced factors of singular values tell what was kept."""
    kept = sum(float((a.double().flatten(1).norm(dim=1) * b.double().norm(dim=0)).square().sum()) for a, b in merged.factors.values())
    whole = sum(norm**2 for norm in norms.values())
    resolution = torch.finfo(merged[next(iter(merged))][0].dtype).eps
    share = 1 - kept / whole if whole else 0.0
    return math.sqrt(share) if share > 8 * resolution else 0.0


def on_cores(function: Callable[..., Tensor]) -> Method:
    """Lift `function(cores (K, P, P'), weights (K,), **options) -> C (P, P')` to a merge method, module by module in float64.

    The deltas are `Q_B C_k Q_A^T` with orthonormal Q, so that norms, angles and singular values of the cores are those of the deltas; a skill
    without the module has a core of zeros, and one at weight 0 is left out.
    """

    @wraps(function)
    def lifted(skills: Sequence[Skill], weights: Tensor, *, module: str, **options: Any) -> Merged:
        skills, weights = present(skills, weights)
        here = core(skills, module)
        return Merged(here, function(here.cores, weights.to(here.cores), **options))

    return on_modules(lifted)


def on_gram(function: Callable[..., Tensor]) -> Method:
    """Lift `function(gram (K, K), weights (K,), **options) -> coefficients (K,)`: the merge is `sum_k coefficient_k delta_k` of the module."""

    @wraps(function)
    def lifted(cores: Tensor, weights: Tensor, **options: Any) -> Tensor:
        flat = cores.flatten(1)
        return torch.einsum("k,kpq->pq", function(flat @ flat.mT, weights, **options), cores)

    return on_cores(lifted)


def present(skills: Sequence[Skill], weights: Tensor) -> tuple[Sequence[Skill], Tensor]:
    """Skills at another weight than 0, and their weights; all where there is none."""
    chosen = [k for k in range(len(skills)) if weights[k] != 0] or [*range(len(skills))]
    return [skills[k] for k in chosen], weights[chosen]


def dtype_of(skills: Sequence[Skill], module: str) -> torch.dtype:
    """Dtype that holds what all skills hold of a module."""
    return promote([skill[module][0] for skill in skills if module in skill])


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
