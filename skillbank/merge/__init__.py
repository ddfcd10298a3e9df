"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.engine import Merging
from skillbank.merge.files import merge_adapters
from skillbank.merge.lift import Merged, Part
from skillbank.merge.registry import LAWS, METHODS, Entry, Method, described, method
from skillbank.skill import Skill

__all__ = ["LAWS", "METHODS", "Certificate", "Entry", "Merged", "Merging", "Method", "Part", "described", "merge", "merge_adapters", "method"]

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
    merging = Merging.of(skills, weights, method, options)
    factors = dict(merging)
    if not factors:
        raise ValueError("all weights are 0 where the skills have modules, so that nothing is left: give one of them another weight")
    embeddings = frozenset[str]().union(*(skill.embeddings for skill in skills))
    return Skill(factors, embeddings & set(factors), merging.certificate())
