"""How a merge goes: from skills, weights and a method to one module after the other, measured as it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from skillbank.core import Factor, check_cut, check_shapes, cut
from skillbank.merge.lift import Merged, Part
from skillbank.merge.measure import Measured
from skillbank.merge.registry import CUTS, Entry, Method, check_options, find
from skillbank.skill import Skill, modules_of

__all__ = ["Dense", "Merging"]


@dataclass(frozen=True)
class Merging:
    """A merge that is checked and planned.

    Args:
        skills: K skills.
        at: (K,) weights for every module.
        name: of the method.
        entry: the method.
        options: what it takes.

    """

    skills: Sequence[Skill]
    at: Mapping[str, tuple[float, ...]]
    name: str
    entry: Entry
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, skills: Sequence[Skill], weights: Sequence[float | Mapping[str, float]] | Tensor | None, method: str | Method, options: Mapping[str, Any]
    ) -> Merging:
        """Check and plan; arguments and errors as `merge` has them."""
        if not skills:
            raise ValueError("merge needs at least one skill, got none")
        entry = find(method) if isinstance(method, str) else Entry(method)
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        check_options(name, entry.function, options, () if entry.exact else CUTS)
        _check_together(skills)
        each = 1 / len(skills) if entry.weight is None else entry.weight
        at = _per_module(skills, [each] * len(skills) if weights is None else weights)
        if entry.first and any(values[0] == 0 for values in at.values()):
            raise ValueError(f"the first skill has weight 0, but {name!r} starts from it: give it another weight, or put another skill first")
        return cls(skills, at, name, entry, options)

    @property
    def embeddings(self) -> frozenset[str]:
        """Modules that are `nn.Embedding` layers in a skill."""
        return frozenset[str]().union(*(skill.embeddings for skill in self.skills))

    def run(self, measured: Measured) -> Iterator[tuple[str, Factor]]:
        """(Module path, factors), one module at a time, each measured; with an error or a budget all are looked at before the first is cut."""
        asked: dict[str, Any] = {key: self.options.get(key) for key in CUTS}
        own = {key: value for key, value in self.options.items() if key not in CUTS}
        together = asked["error"] is not None or asked["budget"] is not None
        waiting: dict[str, tuple[Part, Merged]] = {}
        check_cut(**asked, modules=len(self.at))
        for module, weights in self.at.items():
            part = _part(self.skills, module, weights, 0 if together else asked["rank"])
            if part is None:
                measured.absent(module)
                continue
            found = self.entry.function(part, **own)
            assert not isinstance(found, Tensor)
            if not isinstance(found, Merged):
                if any(value is not None for value in asked.values()):
                    raise ValueError(f"merge method {self.name!r} gives factors, from which nothing is cut: leave rank, error and budget out")
                measured.add(part, found)
                yield module, found
                continue
            waiting[module] = part, found
            if not together:
                yield from _cut(waiting, asked, measured)
                waiting.clear()
        if waiting:
            yield from _cut(waiting, asked, measured)
        if not measured.ranks:
            raise ValueError("all weights are 0 where the skills have modules, so that nothing is left: give one of them another weight")


@dataclass(frozen=True)
class Dense:
    """A merge before anything is cut from it: dense deltas, made module by module when they are looked at.

    Args:
        merging: the merge.

    """

    merging: Merging

    @property
    def embeddings(self) -> frozenset[str]:
        """Modules that are `nn.Embedding` layers."""
        return self.merging.embeddings & set(self)

    def __iter__(self) -> Iterator[str]:
        """Module paths that a skill at another weight than 0 has."""
        return (module for module in self.merging.at if module in self)

    def __contains__(self, module: object) -> bool:
        """Whether `module` changes."""
        weights = self.merging.at.get(str(module), ())
        return any(module in self.merging.skills[k] for k in _places(weights))

    def size(self, module: str) -> tuple[int, tuple[int, ...]]:
        """(O, (I, *kernel)) of the layer."""
        return next(skill for skill in self.merging.skills if module in skill).size(module)

    def delta(self, module: str, least: torch.dtype | None = None) -> Tensor:
        """Dense change of the weight, (O, I, *kernel), in a dtype that holds the factors and `least`."""
        part = _part(self.merging.skills, module, self.merging.at[module], 0)
        assert part is not None
        dtype = part.dtype if least is None else torch.promote_types(part.dtype, least)
        found = self.merging.entry.function(replace(part, dense=True), **self.merging.options)
        if isinstance(found, Merged):
            dense = found.bases.left @ found.matrix @ found.bases.right.mT
        else:
            dense = found if isinstance(found, Tensor) else found[1].to(dtype) @ found[0].flatten(1).to(dtype)
        size, inner = self.size(module)
        return dense.reshape(size, *inner).to(dtype)


def _places(weights: Sequence[float]) -> list[int]:
    """Skills at another weight than 0, or all where there is none."""
    return [k for k, weight in enumerate(weights) if weight != 0] or [*range(len(weights))]


def _part(skills: Sequence[Skill], module: str, weights: tuple[float, ...], most: int | None) -> Part | None:
    """Of the skills at another weight than 0, or of all where there is none; None where none of them has the module."""
    places = _places(weights)
    factors = [skills[k].factors.get(module) for k in places]
    chosen = torch.tensor([weights[k] for k in places], dtype=torch.float64)
    return Part(module, factors, chosen, places, most) if any(pair is not None for pair in factors) else None


def _cut(waiting: Mapping[str, tuple[Part, Merged]], asked: Mapping[str, Any], measured: Measured) -> Iterator[tuple[str, Factor]]:
    if all(value is None for value in asked.values()):
        asked = {"rank": next(iter(waiting.values()))[1].rank}
    pairs, kept = cut({name: (found.bases, found.matrix, part.dtype) for name, (part, found) in waiting.items()}, **asked)
    for name, (part, found) in waiting.items():
        measured.cut(part, found, kept[name])
        measured.add(part, pairs[name])
        yield name, pairs[name]


def _check_together(skills: Sequence[Skill]) -> None:
    devices: set[str] = set()
    for module in modules_of(skills):
        pairs = [skill[module] for skill in skills if module in skill]
        devices.update(str(half.device) for pair in pairs for half in pair)
        check_shapes(module, pairs)
    if len(devices) > 1:
        raise ValueError(f"the skills are on different devices {sorted(devices)}: move them with skill.to(device)")


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
            if not isinstance(value, Real) or not math.isfinite(value):
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
