"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.registry import METHODS, Method, find, method
from skillbank.skill import Skill, core, cosine, modules_of

__all__ = ["METHODS", "Certificate", "Method", "certify", "merge", "method"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def merge(skills: Sequence[Skill], weights: Sequence[float] | Tensor | None = None, method: str | Method = "stack", **options: Any) -> Skill:
    """Merge skills in parameter space; the result carries its `certificate`.

    Args:
        skills: K >= 1 skills of the same base; ranks, dtypes and adapted modules may differ.
        weights: (K,) of any sign, or None for 1 / K each.
        method: a name in `METHODS` or a function of the same form.
        options: what the method takes, for example `rank=8` or `error=0.05` for `svd`.

    Raises:
        ValueError: an unknown method, no skills, another number of weights than skills, weights that are not finite, or a method's own complaint.

    """
    if not skills:
        raise ValueError("merge needs at least one skill, got none")
    values = torch.full((len(skills),), 1 / len(skills), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if values.shape != (len(skills),):
        raise ValueError(f"got weights of shape {tuple(values.shape)} for {len(skills)} skills: give one weight per skill")
    if not torch.isfinite(values).all():
        raise ValueError(f"weights must be finite, got {values.tolist()}")
    function = find(method) if isinstance(method, str) else method
    merged = function(skills, values, **options)
    return replace(merged, certificate=certify(skills, values, merged, method if isinstance(method, str) else method.__name__))


def certify(skills: Sequence[Skill], weights: Tensor, merged: Skill, method: str) -> Certificate:
    """Compare `merged` with the exact sum of `weights` (K,) times `skills`, in the QR core of all of them together."""
    resolution = 16 * torch.finfo(merged[next(iter(merged))][0].dtype).eps
    weighted = [skill.scaled(float(w)) for skill, w in zip(skills, weights, strict=True)]
    norms: dict[str, tuple[float, float, float]] = {}
    for name in modules_of([*skills, merged]):
        cores = core([*weighted, merged], name).cores
        total = cores[:-1].sum(0)
        norms[name] = float((total - cores[-1]).norm()), float(total.norm()), resolution * float(cores[:-1].norm())
    lost, whole, rounding = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
    error = _share(lost, whole, rounding)
    return Certificate(
        method=method,
        exact=lost <= rounding,
        error=error,
        energy=max(0.0, 1 - error**2),
        errors={name: _share(*each) for name, each in norms.items()},
        ranks=merged.ranks,
        conflict=cosine(weighted).tolist(),
    )


def _share(lost: float, whole: float, rounding: float) -> float:
    """Relative error; where the parts cancel up to rounding, what is lost in rounding is no error."""
    if whole > rounding:
        return lost / whole
    return 0.0 if lost <= rounding else math.inf
