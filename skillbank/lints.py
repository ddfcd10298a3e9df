"""What an adapter's files tell about a scale that is wrong: who made it, which versions of that tool, by which factor, and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skillbank.skill import Skill

__all__ = ["Lint", "peft_lints"]

_RSLORA_UP_TO = (0, 21, 2)
_SVD_BEFORE = (0, 21, 0)


@dataclass(frozen=True)
class Lint:
    """A scale that may be wrong; the files alone cannot tell for sure.

    Args:
        what: what was found, and under which condition the scale is wrong.
        versions: the tool and its versions that do this.
        factor: what is stored over what was meant, None where the files do not tell.
        fix: what to do.

    """

    what: str
    versions: str
    factor: float | None
    fix: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.what} ({self.versions}); {self.fix}"


def peft_lints(config: Mapping[str, Any], skill: Skill) -> list[Lint]:
    """Signs of a merge by PEFT's `add_weighted_adapter`, which writes lora_alpha = r and no patterns, at a scale that is wrong.

    Of PEFT's releases, 0.7 to 0.21.2 keep use_rslora of the first adapter, so that the merge is read sqrt(r) times too large
    (https://github.com/huggingface/peft/issues/3761), and 0.9 to 0.20 multiply the scales of the merged adapters in twice in the types that end
    in an SVD (`_svd_generalized_task_arithmetic_weighted_adapter` in peft/tuners/lora/model.py).

    Args:
        config: adapter_config.json.
        skill: the adapter, its scale folded into B.

    """
    rank, version = config.get("r", 8), _version(config.get("peft_version"))
    found: list[Lint] = []
    if config.get("lora_alpha", 8) != rank or config.get("alpha_pattern") or config.get("rank_pattern"):
        return found
    if config.get("use_rslora") and (version is None or version <= _RSLORA_UP_TO):
        factor = math.sqrt(rank)
        what = f"use_rslora with lora_alpha = r = {rank}: if it was made by add_weighted_adapter, every delta is sqrt({rank}) = {factor:.4g} times"
        fix = f"then take Skill.scaled({1 / factor:.6g}), or import it with --scale {1 / factor:.6g}"
        found.append(Lint(f"{what} the merge", "PEFT 0.7 to 0.21.2", factor, fix))
    if (version is None or version < _SVD_BEFORE) and _orthonormal(skill):
        what = "every A has orthonormal rows: if it was made by add_weighted_adapter with 'svd' or a type that ends in '_svd', each of the merged"
        what += " adapters counts its own scale twice, 4 times too much for lora_alpha = 4 r; the files do not say what it was"
        fix = (
            "then merge them again, or, where all had one scale s, take Skill.scaled(1 / s), or import it with --scale 1/s, 0.25 for lora_alpha = 4 r"
        )
        found.append(Lint(what, "PEFT 0.9 to 0.20", None, fix))
    return found


def _version(text: object) -> tuple[int, ...] | None:
    """Release of PEFT; None where the file does not say, as before 0.18."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _orthonormal(skill: Skill) -> bool:
    """Whether every A has orthonormal rows, as far as its dtype goes."""
    for a, _ in skill.factors.values():
        rows = a.flatten(1).double()
        limit = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
        if float((rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).abs().max()) > limit:
            return False
    return True
