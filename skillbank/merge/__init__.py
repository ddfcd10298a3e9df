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
from skillbank.skill import Core, Skill, core, cosines, modules_of
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
    return replace(merged, certificate=certify(skills, at, merged, name, _cut(found)))


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


def certify(skills: Sequence[Skill], weights: Mapping[str, tuple[float, ...]], merged: Skill, method: str, cut: float | None = None) -> Certificate:
    """Compare `merged` with the exact sum of the skills under `weights` (K,) per module, in the QR core of the skills."""
    resolution = 16 * torch.finfo(merged[next(iter(merged))][0].dtype).eps
    norms: dict[str, tuple[float, float, float]] = {}
    effective: dict[str, float] = {}
    products = torch.zeros(len(skills), len(skills), dtype=torch.float64)
    for name, values in weights.items():
        here = core(skills, name)
        flat = (here.cores * torch.tensor(values, dtype=torch.float64).to(here.cores)[:, None, None]).flatten(1)
        total = flat.sum(0).reshape(here.cores.shape[1:])
        products += (flat @ flat.mT).cpu()
        a, b = (half.to(here.cores) for half in merged[name])
        norms[name] = _distance(here, total, a.flatten(1), b), float(total.norm()), resolution * float(flat.norm())
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
