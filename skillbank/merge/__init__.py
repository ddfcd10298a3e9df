"""The merge engine: K skills and K weights become one skill, with a certificate of what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.merge.engine import Dense, Merging
from skillbank.merge.files import merge_adapters
from skillbank.merge.lift import Merged, Part
from skillbank.merge.measure import Measured
from skillbank.merge.registry import CUTS, LAWS, METHODS, Entry, Method, described, method
from skillbank.skill import Skill

__all__ = [
    "LAWS",
    "METHODS",
    "Certificate",
    "Entry",
    "Merged",
    "Merging",
    "Method",
    "Part",
    "dense_merge",
    "described",
    "merge",
    "merge_adapters",
    "method",
]

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
    merging, measured = Merging.of(skills, weights, method, options), Measured(len(skills))
    factors = dict(merging.run(measured))
    return Skill(factors, merging.embeddings & set(factors), measured.certificate(merging.name))


def dense_merge(
    skills: Sequence[Skill], weights: Sequence[float | Mapping[str, float]] | Tensor | None = None, method: str | Method = "ties", **options: Any
) -> Dense:
    """Merge skills to be added straight into the weights of a net: what `merge` fits to a low rank, exactly and with nothing cut.

    For `fold`, `Folding` and `fold_checkpoint`, in place of a skill. Deltas are made when they are looked at, so that one module is in memory.

    Args:
        skills: as in `merge`, which also says what is raised.
        weights: as in `merge`.
        method: as in `merge`.
        options: what the method takes of its own, no rank, error or budget.

    """
    if asked := sorted(set(options) & set(CUTS)):
        raise ValueError(f"nothing is cut from a dense merge, got {asked[0]}={options[asked[0]]}: leave it out, or merge")
    return Dense(Merging.of(skills, weights, method, options))
