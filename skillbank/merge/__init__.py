"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.lift import resolution
from skillbank.merge.registry import LAWS, METHODS, Entry, Method, check_options, described, find, method
from skillbank.skill import Core, Skill, check_shapes, core, cosines, modules_of, promote

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
            `{"*.q_proj": 0.7, "*": 0.3}`; of those that fit, the longest counts. A module that a skill lacks has a delta of zeros there.
        method: a name in `METHODS` or a function of the same form.
        options: what the method takes, for example `rank=8`, `error=0.05` or `density=0.2`.

    Raises:
        ValueError: an unknown method or option, no skills, skills of different bases or devices, another number of weights than skills, weights that
            are not finite, a module that no pattern fits, a pattern that fits no module, or a method's own complaint.

    """
    if not skills:
        raise ValueError("merge needs at least one skill, got none")
    entry = find(method) if isinstance(method, str) else Entry(method)
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    check_options(name, entry.function, options)
    _check_together(skills)
    each = 1 / len(skills) if entry.weight is None else entry.weight
    at = _per_module(skills, [each] * len(skills) if weights is None else weights)
    if entry.first and any(values[0] == 0 for values in at.values()):
        raise ValueError(f"the first skill has weight 0, but {name!r} starts from it: give it another weight, or put another skill first")
    groups: dict[tuple[float, ...], list[str]] = {}
    for module, values in at.items():
        groups.setdefault(values, []).append(module)
    if len(groups) > 1 and options.get("budget") is not None:
        raise ValueError("a budget of ranks is for all modules together, which weights per module split: give a rank or an error")
    found = [_merged(entry.function, skills, values, modules, options) for values, modules in groups.items()]
    merged = _together([skill for skill, _ in found])
    return replace(merged, certificate=certify(skills, at, merged, name, _cut(found)))


def _check_together(skills: Sequence[Skill]) -> None:
    devices = {str(half.device) for skill in skills for pair in skill.factors.values() for half in pair}
    if len(devices) > 1:
        raise ValueError(f"the skills are on different devices {sorted(devices)}: move them with skill.to(device)")
    for module in modules_of(skills):
        check_shapes(module, [skill[module] for skill in skills if module in skill])


def _per_module(skills: Sequence[Skill], weights: Sequence[float | Mapping[str, float]] | Tensor) -> dict[str, tuple[float, ...]]:
    """Weights of all skills for every module."""
    given = (
        weights.tolist()
        if isinstance(weights, Tensor)
        else [each.item() if isinstance(each, Tensor) and each.numel() == 1 else each for each in weights]
    )
    if not isinstance(given, list) or len(given) != len(skills):
        raise ValueError(f"got {len(given) if isinstance(given, list) else 1} weights for {len(skills)} skills: give one weight per skill")
    modules = modules_of(skills)
    for each in given:
        for value in each.values() if isinstance(each, Mapping) else [each]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"weights must be finite numbers, got {value!r}: give one weight per skill")
        for pattern in each if isinstance(each, Mapping) else ():
            if not any(fnmatchcase(module, pattern) for module in modules):
                raise ValueError(f"the pattern {pattern!r} fits no module of the skills, which have {modules[:12]}")
    return {module: tuple(_at(module, each, module in skill) for each, skill in zip(given, skills, strict=True)) for module in modules}


def _at(module: str, weight: float | Mapping[str, float], there: bool) -> float:
    if not isinstance(weight, Mapping):
        return float(weight)
    fitting = [pattern for pattern in weight if fnmatchcase(module, pattern)]
    if not fitting and there:
        raise ValueError(f"module {module!r} fits none of the patterns {list(weight)}: give a weight for '*', the rest")
    return float(weight[max(fitting, key=lambda pattern: (len(pattern), pattern))]) if fitting else 0.0


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
    if len(found) == 1:
        return found[0][1]
    cuts = [(skill.norm(), cut) for skill, cut in found if cut is not None]
    if len(cuts) < len(found):
        return None
    lost = sum(kept**2 * cut**2 / (1 - cut**2) for kept, cut in cuts if cut < 1)
    whole = sum(kept**2 / (1 - cut**2) for kept, cut in cuts if cut < 1)
    return math.sqrt(lost / whole) if whole else 0.0


def certify(skills: Sequence[Skill], weights: Mapping[str, tuple[float, ...]], merged: Skill, method: str, cut: float | None = None) -> Certificate:
    """Compare `merged` with the exact sum of the skills under `weights` (K,) per module, in the QR core of the skills."""
    norms: dict[str, tuple[float, float, float]] = {}
    effective: dict[str, float] = {}
    products = torch.zeros(len(skills), len(skills), dtype=torch.float64)
    for name, values in weights.items():
        here = core(skills, name)
        flat = (here.cores * torch.tensor(values, dtype=torch.float64).to(here.cores)[:, None, None]).flatten(1)
        total = flat.sum(0).reshape(here.cores.shape[1:])
        products += (flat @ flat.mT).cpu()
        if name not in merged:  # every skill that has it is at weight 0
            norms[name], effective[name] = (float(total.norm()), float(total.norm()), 0.0), 0.0
            continue
        a, b = (half.to(here.cores) for half in merged[name])
        norms[name] = _distance(here, total, a.flatten(1), b), float(total.norm()), resolution(promote(merged[name])) * float(flat.norm())
        effective[name] = _effective_rank(a.flatten(1), b)
    lost, whole, rounding = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
    error, apart = _share(lost, whole, rounding), float(products.trace())
    return Certificate(
        method=method,
        exact=lost <= rounding,
        error=error,
        energy=max(0.0, 1 - error**2),
        errors={name: _share(*each) for name, each in norms.items()},
        ranks=merged.ranks,
        conflict=cosines(products).tolist(),
        cut=cut,
        effective_ranks=effective,
        cancelled=max(0.0, 1 - whole**2 / apart) if apart else 0.0,
    )


def _distance(bases: Core, total: Tensor, a: Tensor, b: Tensor) -> float:
    """`||Q_B C Q_A^T - B A||_F`, from what of B A lies within the bases and from what does not, which are orthogonal."""
    left, right = bases.left.mT @ b, a @ bases.right
    out_b, out_a = b - bases.left @ left, a - right @ bases.right.mT
    outside = ((out_b.mT @ out_b) * (a @ a.mT)).sum() + ((left.mT @ left) * (out_a @ out_a.mT)).sum()
    return float(((total - left @ right).square().sum() + outside.clamp_min(0)).sqrt())


def _effective_rank(a: Tensor, b: Tensor) -> float:
    """Exponential of the entropy of the singular values of B A (Roy and Vetterli, 2007); 0 for a delta that is zero."""
    values, vectors = torch.linalg.eigh(b.mT @ b)
    half = vectors * values.clamp_min(0).sqrt()
    singular = torch.linalg.eigvalsh(half.mT @ (a @ a.mT) @ half).clamp_min(0).sqrt()
    if not singular.sum():
        return 0.0
    shares = singular[singular > 0] / singular.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _share(lost: float, whole: float, rounding: float) -> float:
    """Relative error; where the parts cancel up to rounding, what is lost in rounding is no error."""
    if whole > rounding:
        return lost / whole
    return 0.0 if lost <= rounding else math.inf
