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
from skillbank.skill import Core, Factor, Skill, check_cut, core, from_cores, modules_of, promote

__all__ = ["Merged", "dtype_of", "on_cores", "on_gram", "on_modules", "present", "resolution", "shares", "weighted_core"]


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

    See `truncate` for these three. Without an error and a budget every module is finished before the next is begun. A function that has `most` is
    told the highest rank that it is asked for, None where that is for it to say, and 0 where all are needed. What the cut takes away of the
    method's own result is returned beside the skill.
    """
    shape = signature(function)
    options = [each for each in shape.parameters.values() if each.kind is Parameter.KEYWORD_ONLY and each.name not in ("module", "most")]

    @wraps(function)
    def lifted(
        skills: Sequence[Skill], weights: Tensor, *, rank: int | None = None, error: float | None = None, budget: int | None = None, **options: Any
    ) -> tuple[Skill, float]:
        modules = modules_of(present(skills, weights)[0])
        check_cut(rank, error, budget, len(modules))
        together = error is not None or budget is not None
        told = {"most": 0 if together else rank} if "most" in shape.parameters else {}
        embeddings = frozenset[str]().union(*(skill.embeddings for skill in skills))
        factors: dict[str, Factor] = {}
        kept, whole = 0.0, 0.0
        for names in [modules] if together else [[name] for name in modules]:
            found = {name: function(skills, weights, module=name, **told, **options) for name in names}
            parts = {name: (each.bases, each.matrix, dtype_of(skills, name)) for name, each in found.items()}
            cut, norms = from_cores(parts, embeddings, rank=rank, error=error, budget=budget)
            factors |= cut.factors
            kept += sum(norm**2 for norm in norms.values())
            whole += sum(float(each.matrix.norm() if each.norm is None else each.norm) ** 2 for each in found.values())
        lost = 1 - kept / whole if whole else 0.0
        return Skill(factors, embeddings & set(factors)), math.sqrt(lost) if lost > 1e-12 else 0.0

    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("rank", "error", "budget")]
    vars(lifted)["__signature__"] = shape.replace(parameters=[*list(shape.parameters.values())[:2], *options, *more])
    return lifted


def on_cores(function: Callable[..., Tensor]) -> Method:
    """Lift `function(cores (K, P, P'), weights (K,), **options) -> C (P, P')` to a merge method, module by module in float64.

    The deltas are `Q_B C_k Q_A^T` with orthonormal Q, so that norms, angles and singular values of the cores are those of the deltas; a skill
    without the module has a core of zeros, and one at weight 0 is left out. A function that has `noise` is told the norm below which a
    direction is rounding, in units of the weighted deltas.
    """
    noisy = "noise" in signature(function).parameters

    @wraps(function)
    def lifted(skills: Sequence[Skill], weights: Tensor, *, module: str, **options: Any) -> Merged:
        skills, weights = present(skills, weights)
        here, _, noise = weighted_core(skills, weights, module)
        told = {"noise": noise} if noisy else {}
        return Merged(here, function(here.cores, weights.to(here.cores), **told, **options))

    if noisy:
        shape = signature(function)
        vars(lifted)["__signature__"] = shape.replace(parameters=[each for each in shape.parameters.values() if each.name != "noise"])
    return on_modules(lifted)


def weighted_core(skills: Sequence[Skill], weights: Tensor, module: str) -> tuple[Core, Tensor, float]:
    """QR core of a module, the weighted deltas in it (K, P, P'), and the norm below which a direction of them is rounding."""
    here = core(skills, module)
    deltas = here.cores * weights.to(here.cores)[:, None, None]
    return here, deltas, resolution(dtype_of(skills, module)) * float(deltas.norm())


def resolution(dtype: torch.dtype) -> float:
    """Relative size of what is rounding in sums of deltas whose factors are stored so."""
    return max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float64).eps)


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
    return promote([half for skill in skills if module in skill for half in skill[module]])


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
