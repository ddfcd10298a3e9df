"""Means that keep norms: interpolation along arcs between the deltas, from their inner products alone.

The mean of K skills is shorter than they are, unless they agree: of K orthogonal deltas it has 1 / sqrt(K) of their norm. Module by module; weights
are shares and count relative to their sum. A skill that lacks a module has a delta of zeros there, which shortens the mean and has no direction.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from skillbank.merge.lift import Merged, Part, on_gram, shares
from skillbank.merge.registry import method

__all__ = ["karcher", "model_stock", "multislerp", "nuslerp", "slerp"]

_BREAKS = {"sign": "a mean has no negative weights"}


@method("slerp", breaks=_BREAKS)
@on_gram
def slerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of two skills: `sin(t_k theta) / sin(theta)` times each, theta being the angle between them.

    Parallel, opposite or empty deltas are interpolated in a straight line. Shoemake (1985).
    """
    return _arc(gram, shares(weights))


@method("nuslerp", breaks=_BREAKS)
def nuslerp(part: Part) -> Merged:
    """Spherical interpolation of two skills, `slerp` for every output of the layer, that is for every row of the deltas, on its own."""
    here = part.core
    rows = here.left @ here.cores
    t = _arc(torch.einsum("kop,lop->okl", rows, rows), shares(part.weights).to(rows))
    left, triangle = torch.linalg.qr(torch.einsum("ok,kop->op", t, rows))
    return Merged(replace(here, left=left), triangle)


def _arc(gram: Tensor, t: Tensor) -> Tensor:
    """Coefficients (..., K) of an arc between one or two vectors with inner products (..., K, K)."""
    if len(t) > 2:
        raise ValueError(f"an arc joins two skills, got {len(t)}: use karcher or multislerp")
    if len(t) == 1:
        return t.expand(gram.shape[:-1])
    scale = (gram[..., 0, 0] * gram[..., 1, 1]).clamp_min(0).sqrt()
    angle = torch.arccos((gram[..., 0, 1] / scale.masked_fill(scale == 0, 1)).clamp(-1, 1))
    sine = angle.sin()
    straight = (scale == 0) | (sine < 1e-6)
    arc = (t * angle[..., None]).sin() / sine.masked_fill(straight, 1)[..., None]
    return torch.where(straight[..., None], t, arc)


@method("karcher", breaks=_BREAKS)
@on_gram
def karcher(gram: Tensor, weights: Tensor) -> Tensor:
    """Mean on the sphere: the direction whose weighted squared angles to the skills are least, at the mean of their norms.

    `m <- exp_m(sum_k t_k log_m(u_k))` until it stays, u_k being the deltas over their norms. Karcher (1977).
    """
    return _mean(gram, weights, steps=100)


@method("multislerp", breaks=_BREAKS)
@on_gram
def multislerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Barycentre of any number of skills: the weighted mean of their projections on the tangent space at the mean direction, back on the sphere.

    `karcher` goes on from there, with logarithms instead of projections, until the direction stays.
    """
    return _mean(gram, weights, steps=1, project=True)


def _mean(gram: Tensor, weights: Tensor, steps: int, *, project: bool = False) -> Tensor:
    t, norms = shares(weights), gram.diagonal().clamp_min(0).sqrt()
    there = norms > 0
    units = gram / torch.outer(norms, norms).masked_fill(~(there[:, None] & there), 1)
    t = t * there
    mean = _unit(t, units)
    for _ in range(steps):
        cosines = (units @ mean).clamp(-1, 1)
        if ((cosines < -1 + 1e-9) & there).any():
            raise ValueError("a skill points opposite to the mean of all, so that there is no way from one to the other: use stack or svd")
        angles = torch.arccos(cosines)
        pull = t * torch.where((angles < 1e-7) | project, torch.ones_like(angles), angles / angles.sin())
        tangent = pull - (pull @ cosines) * mean
        length = (tangent @ units @ tangent).clamp_min(0).sqrt()
        if length < 1e-12:
            break
        mean = _unit(length.cos() * mean + length.sin() / length * tangent, units)
    return (t @ norms) * mean / norms.masked_fill(~there, 1)


def _unit(direction: Tensor, units: Tensor) -> Tensor:
    length = (direction @ units @ direction).clamp_min(0).sqrt()
    if length < 1e-9 and (direction != 0).any():
        raise ValueError("the skills cancel, so that their mean has no direction: use stack or svd")
    return direction / length if length > 0 else direction


@method("model_stock", breaks=_BREAKS)
@on_gram
def model_stock(gram: Tensor, weights: Tensor) -> Tensor:
    """The mean times `K c / (1 + (K - 1) c)`, c being the mean cosine of all pairs: as close to the base as the skills disagree.

    A negative mean cosine counts as 0. arXiv 2403.19522.
    """
    t, count = shares(weights), len(weights)
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(norms, norms)
    cosines = torch.where(scale > 0, gram / scale.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))
    if count == 1:
        return t
    mean = ((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))).clamp_min(0)
    return count * mean / (1 + (count - 1) * mean) * t
