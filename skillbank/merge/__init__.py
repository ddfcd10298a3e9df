"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from inspect import Parameter, signature
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.registry import LAWS, METHODS, Entry, Method, find, method
from skillbank.skill import Skill, core, cosine, modules_of
from skillbank.words import did_you_mean

__all__ = ["LAWS", "METHODS", "Certificate", "Entry", "Method", "certify", "merge", "method"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def merge(skills: Sequence[Skill], weights: Sequence[float] | Tensor | None = None, method: str | Method = "stack", **options: Any) -> Skill:
    """Merge skills in parameter space; the result carries its `certificate`.

    Args:
        skills: K >= 1 skills of the same base; ranks, dtypes and adapted modules may differ.
        weights: (K,), negative ones where the method has a meaning for them; None for what the method takes then: 1 / K each where it is a mean,
            1 each where skills add up. A skill at weight 0 is absent.
        method: a name in `METHODS` or a function of the same form.
        options: what the method takes, for example `rank=8`, `error=0.05` or `density=0.2`.

    Raises:
        ValueError: an unknown method or option, no skills, another number of weights than skills, weights that are not finite, or a method's own
            complaint.

    """
    if not skills:
        raise ValueError("merge needs at least one skill, got none")
    entry = find(method) if isinstance(method, str) else Entry(method, None, {})
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    values = _weights(weights, len(skills), entry.weight)
    _check_options(name, entry.function, options)
    found = entry.function(skills, values, **options)
    merged, cut = found if isinstance(found, tuple) else (found, None)
    return replace(merged, certificate=certify(skills, values, merged, name, cut))


def _weights(weights: Sequence[float] | Tensor | None, count: int, default: float | None) -> Tensor:
    each = 1 / count if default is None else default
    values = torch.full((count,), each, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if values.shape != (count,):
        raise ValueError(f"got weights of shape {tuple(values.shape)} for {count} skills: give one weight per skill")
    if not torch.isfinite(values).all():
        raise ValueError(f"weights must be finite, got {values.tolist()}")
    return values


def _check_options(name: str, function: Method, options: Mapping[str, Any]) -> None:
    """Check that a method takes the options; a ValueError says which it takes."""
    known = [key for key, each in signature(function).parameters.items() if each.kind is Parameter.KEYWORD_ONLY]
    if any(each.kind is Parameter.VAR_KEYWORD for each in signature(function).parameters.values()):
        return
    for key in options:
        if key not in known:
            raise ValueError(f"merge method {name!r} takes no {key!r}: {did_you_mean(key, known) if known else 'it has no options.'}")


def certify(skills: Sequence[Skill], weights: Tensor, merged: Skill, method: str, cut: float | None = None) -> Certificate:
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
        cut=cut,
    )


def _share(lost: float, whole: float, rounding: float) -> float:
    """Relative error; where the parts cancel up to rounding, what is lost in rounding is no error."""
    if whole > rounding:
        return lost / whole
    return 0.0 if lost <= rounding else math.inf
