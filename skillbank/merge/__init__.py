"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from inspect import Parameter, signature
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.registry import LAWS, METHODS, Entry, Method, described, find, method
from skillbank.skill import Skill, core, cosine, modules_of
from skillbank.words import did_you_mean

__all__ = ["LAWS", "METHODS", "Certificate", "Entry", "Method", "certify", "described", "merge", "method"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def merge(
    skills: Sequence[Skill], weights: Sequence[float | Mapping[str, float]] | Tensor | None = None, method: str | Method = "stack", **options: Any
) -> Skill:
    """Merge skills in parameter space; the result carries its `certificate`.

    Args:
        skills: K >= 1 skills of the same base; ranks, dtypes and adapted modules may differ.
        weights: (K,), negative ones where the method has a meaning for them; None for what the method takes then: 1 / K each where it is a mean,
            1 each where skills add up. A skill at weight 0 is absent. Instead of a number, {pattern of module paths: weight}, such as
            `{"*.q_proj": 0.7, "*": 0.3}`; of those that fit, the longest counts.
        method: a name in `METHODS` or a function of the same form.
        options: what the method takes, for example `rank=8`, `error=0.05` or `density=0.2`.

    Raises:
        ValueError: an unknown method or option, no skills, another number of weights than skills, weights that are not finite, a module that no
            pattern fits, or a method's own complaint.

    """
    if not skills:
        raise ValueError("merge needs at least one skill, got none")
    entry = find(method) if isinstance(method, str) else Entry(method, None, {})
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    _check_options(name, entry.function, options)
    each = 1 / len(skills) if entry.weight is None else entry.weight
    at = _per_module(skills, [each] * len(skills) if weights is None else list(weights))
    groups: dict[tuple[float, ...], list[str]] = {}
    for module, values in at.items():
        groups.setdefault(values, []).append(module)
    if len(groups) > 1 and options.get("budget") is not None:
        raise ValueError("a budget of ranks is for all modules together, which weights per module split: give a rank or an error")
    found = [_merged(entry.function, skills, values, modules, options) for values, modules in groups.items()]
    merged = _together([skill for skill, _ in found])
    weighted = [skill.scaled({module: at[module][k] for module in skill}) for k, skill in enumerate(skills)]
    return replace(merged, certificate=certify(weighted, merged, name, _cut(found)))


def _per_module(skills: Sequence[Skill], weights: Sequence[float | Mapping[str, float] | Tensor]) -> dict[str, tuple[float, ...]]:
    """Weights of all skills for every module."""
    if len(weights) != len(skills):
        raise ValueError(f"got {len(weights)} weights for {len(skills)} skills: give one weight per skill")
    flat = [value for each in weights for value in (each.values() if isinstance(each, Mapping) else [each])]
    if any(isinstance(value, Tensor) and value.dim() for value in flat):
        raise ValueError(f"got weights of several dimensions for {len(skills)} skills: give one weight per skill")
    if not all(math.isfinite(float(value)) for value in flat):
        raise ValueError(f"weights must be finite, got {[float(value) for value in flat]}")
    return {module: tuple(_at(module, each) for each in weights) for module in modules_of(skills)}


def _at(module: str, weight: float | Mapping[str, float] | Tensor) -> float:
    if not isinstance(weight, Mapping):
        return float(weight)
    fitting = [pattern for pattern in weight if fnmatchcase(module, pattern)]
    if not fitting:
        raise ValueError(f"module {module!r} fits none of the patterns {list(weight)}: give a weight for '*', the rest")
    return float(weight[max(fitting, key=lambda pattern: (len(pattern), pattern))])


def _merged(
    function: Method, skills: Sequence[Skill], weights: tuple[float, ...], modules: Sequence[str], options: Mapping[str, Any]
) -> tuple[Skill, float | None]:
    """Merge of some of the modules, and what a cut took away."""
    chosen = set(modules)
    parts = skills if set(modules_of(skills)) == chosen else [_part(skill, skills, chosen) for skill in skills]
    found = function(parts, torch.tensor(weights, dtype=torch.float64), **options)
    return found if isinstance(found, tuple) else (found, None)


def _part(skill: Skill, skills: Sequence[Skill], modules: set[str]) -> Skill:
    """The skill on these modules; where it has none of them, a delta of zeros on one."""
    if inside := modules & set(skill):
        return skill.part(sorted(inside))
    name = min(modules)
    a, b = next(each[name] for each in skills if name in each)
    return Skill({name: (a.new_zeros(1, *a.shape[1:]), b.new_zeros(len(b), 1))})


def _together(parts: Sequence[Skill]) -> Skill:
    if len(parts) == 1:
        return parts[0]
    return Skill({name: pair for part in parts for name, pair in part.factors.items()}, frozenset[str]().union(*(part.embeddings for part in parts)))


def _cut(found: Sequence[tuple[Skill, float | None]]) -> float | None:
    """Relative error of all cuts together, from the norms of what they left."""
    cuts = [(skill.norm(), cut) for skill, cut in found if cut is not None]
    if len(cuts) < len(found):
        return None
    lost = sum(kept**2 * cut**2 / (1 - cut**2) for kept, cut in cuts if cut < 1)
    whole = sum(kept**2 / (1 - cut**2) for kept, cut in cuts if cut < 1)
    return math.sqrt(lost / whole) if whole else 0.0


def _check_options(name: str, function: Method, options: Mapping[str, Any]) -> None:
    """Check that a method takes the options; a ValueError says which it takes."""
    known = [key for key, each in signature(function).parameters.items() if each.kind is Parameter.KEYWORD_ONLY]
    if any(each.kind is Parameter.VAR_KEYWORD for each in signature(function).parameters.values()):
        return
    for key in options:
        if key not in known:
            raise ValueError(f"merge method {name!r} takes no {key!r}: {did_you_mean(key, known) if known else 'it has no options.'}")


def certify(weighted: Sequence[Skill], merged: Skill, method: str, cut: float | None = None) -> Certificate:
    """Compare `merged` with the exact sum of the `weighted` skills, in the QR core of all of them together."""
    resolution = 16 * torch.finfo(merged[next(iter(merged))][0].dtype).eps
    norms: dict[str, tuple[float, float, float]] = {}
    effective: dict[str, float] = {}
    apart = 0.0
    for name in modules_of([*weighted, merged]):
        cores = core([*weighted, merged], name).cores
        total = cores[:-1].sum(0)
        norms[name] = float((total - cores[-1]).norm()), float(total.norm()), resolution * float(cores[:-1].norm())
        effective[name] = _effective_rank(torch.linalg.svdvals(cores[-1]))
        apart += float(cores[:-1].square().sum())
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
        effective_ranks=effective,
        cancelled=max(0.0, 1 - whole**2 / apart) if apart else 0.0,
    )


def _effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the singular values (Roy and Vetterli, 2007); 0 for a delta that is zero."""
    if not values.sum():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _share(lost: float, whole: float, rounding: float) -> float:
    """Relative error; where the parts cancel up to rounding, what is lost in rounding is no error."""
    if whole > rounding:
        return lost / whole
    return 0.0 if lost <= rounding else math.inf
