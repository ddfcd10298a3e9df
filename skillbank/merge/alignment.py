"""Merges in coordinates that the skills share: an entrywise method, such as TIES, applied after the skills are aligned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from skillbank.merge.dense import combined
from skillbank.merge.lift import Merged, Part
from skillbank.merge.registry import method

__all__ = ["core_space", "knots"]

_INNER = {"single": "the inner method cuts entries"}


@method("knots", weight=1.0, breaks=_INNER)
def knots(part: Part, *, inner: str = "ties", options: Mapping[str, Any] | None = None) -> Merged:
    """Align, then merge: `[D_1, ..., D_K] = U S [V_1, ..., V_K]`, the V_k merged entry by entry to V, and `U S V`. arXiv 2410.19735.

    Weights multiply the deltas first.

    Args:
        part: of skills with weights of any sign.
        inner: an entrywise merge method.
        options: of the inner method.

    """
    here, deltas, noise = part.core, part.deltas, part.noise
    u, s, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    there = s > noise
    if not there.any():
        return Merged(here, torch.zeros_like(deltas[0]))
    rows = torch.stack(vh[there].split(deltas.shape[2], dim=1)) @ here.right.mT
    right, triangle = torch.linalg.qr(combined(rows, part.module, inner, options).mT)
    return Merged(replace(here, right=right), u[:, there] * s[there] @ triangle.mT)


@method("core_space", weight=1.0, breaks=_INNER)
def core_space(part: Part, *, inner: str = "ties", options: Mapping[str, Any] | None = None) -> Merged:
    """An entrywise merge of the R x R cores: `C_k = U^T D_k V` in the singular directions of all deltas side by side, and one above the other.

    Lossless, since those directions span all skills. arXiv 2509.17786 takes them from the stacked factors, which depend on how a skill is stored.

    Args:
        part: of skills with weights of any sign.
        inner: an entrywise merge method.
        options: of the inner method.

    """
    here, deltas, noise = part.core, part.deltas, part.noise
    u, s, _ = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    _, t, vh = torch.linalg.svd(torch.cat(list(deltas), dim=0), full_matrices=False)
    u, vh = u[:, s > noise], vh[t > noise]
    return Merged(here, u @ combined(u.mT @ deltas @ vh.mT, part.module, inner, options) @ vh)
