"""From a function on the small matrices of one module to a merge method on skills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from skillbank.merge.registry import Method
from skillbank.skill import Skill, core, from_cores, modules_of, promote

__all__ = ["on_cores", "on_gram", "shares"]


def on_cores(function: Callable[..., Tensor]) -> Method:
    """Lift `function(cores (K, P, P'), weights (K,), **options) -> C (P, P')` to a merge method, module by module in float64.

    The deltas are `Q_B C_k Q_A^T` with orthonormal Q, so that norms, angles and singular values of the cores are those of the deltas; a skill
    without the module has a core of zeros. The method also takes one of `rank`, `error` and `budget`, see `truncate`.
    """

    @wraps(function)
    def lifted(
        skills: Sequence[Skill], weights: Tensor, *, rank: int | None = None, error: float | None = None, budget: int | None = None, **options: Any
    ) -> Skill:
        parts = {}
        for name in modules_of(skills):
            here = core(skills, name)
            merged = function(here.cores, weights.to(here.cores), **options)
            parts[name] = here, merged, promote([skill[name][0] for skill in skills if name in skill])
        embeddings = frozenset[str]().union(*(skill.embeddings for skill in skills))
        return from_cores(parts, embeddings, rank=rank, error=error, budget=budget)

    shape = signature(function)
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("rank", "error", "budget")]
    vars(lifted)["__signature__"] = shape.replace(parameters=[*shape.parameters.values(), *more])
    return lifted


def on_gram(function: Callable[..., Tensor]) -> Method:
    """Lift `function(gram (K, K), weights (K,), **options) -> coefficients (K,)`: the merge is `sum_k coefficient_k delta_k` of the module."""

    @on_cores
    @wraps(function)
    def lifted(cores: Tensor, weights: Tensor, **options: Any) -> Tensor:
        flat = cores.flatten(1)
        return torch.einsum("k,kpq->pq", function(flat @ flat.mT, weights, **options), cores)

    return lifted


def shares(weights: Tensor) -> Tensor:
    """Weights that sum to one, (K,).

    Raises:
        ValueError: a negative weight.

    """
    if (weights < 0).any():
        raise ValueError(f"this is a mean, a negative weight has no meaning in it, got {weights.tolist()}: use stack or svd")
    return weights / weights.sum()
