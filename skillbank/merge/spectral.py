"""Merges of singular directions: what every skill does most, made orthogonal, flattened, or added one skill after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skillbank.merge.lift import on_cores
from skillbank.merge.registry import method

__all__ = ["iso_c", "iso_cts", "opcm", "tsv_m"]

_SINGLE = "the singular values are made equal"


@method("tsv_m", weight=1.0)
@on_cores
def tsv_m(deltas: Tensor, noise: float, *, keep: float = 1.0) -> Tensor:
    """Task singular vectors: `polar([U_1, ..., U_K]) diag(S_1, ..., S_K) polar([V_1, ..., V_K])^T` of the weighted deltas `U_k S_k V_k^T`.

    The directions of different skills are made orthogonal, so that they do not meet. arXiv 2412.00081; there K skills of full rank
    keep a K-th of their directions each, here all that a skill has.

    Args:
        deltas: weighted deltas (K, P, P').
        noise: norm of what is rounding.
        keep: share of the directions of every skill, the strongest first; in (0, 1].

    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a share of the directions in (0, 1], got {keep}")
    return _orthogonal([(u[:, :q], s[:q], v[:, :q]) for u, s, v in (_svd(each, noise) for each in deltas) for q in [math.ceil(keep * len(s))]])


@method("iso_c", weight=1.0, breaks={"single": _SINGLE})
@on_cores
def iso_c(deltas: Tensor, noise: float) -> Tensor:
    """Isotropic merge: the weighted sum with all its singular values made their mean.

    Over the directions that the sum has; over all of the layer's, as for skills of full rank, most of the merge would be arbitrary.
    arXiv 2502.04959.
    """
    u, s, v = _svd(deltas.sum(0), noise)
    return s.mean() * u @ v.mT if len(s) else torch.zeros_like(deltas[0])


@method("iso_cts", weight=1.0, breaks={"single": _SINGLE})
@on_cores
def iso_cts(deltas: Tensor, noise: float, *, common: float = 0.8) -> Tensor:
    """Isotropic merge in common and task-specific subspaces: `iso_c` whose weakest directions make way for what single skills do outside the rest.

    Of the R directions of the sum the first `common` R stay; every skill adds its strongest `(1 - common) R / K` of what the others leave. All are
    made orthogonal. arXiv 2502.04959.

    Args:
        deltas: weighted deltas (K, P, P').
        noise: norm of what is rounding.
        common: share of the directions that are those of the sum, in (0, 1].

    """
    if not 0 < common <= 1:
        raise ValueError(f"common is a share of the directions in (0, 1], got {common}")
    u, s, v = _svd(deltas.sum(0), noise)
    first = max(1, round(common * len(s)))
    own = max(0, len(s) - first) // len(deltas)
    parts = [(u[:, :first], s[:first], v[:, :first])]
    for each in deltas:
        u_k, s_k, v_k = _svd(each - parts[0][0] @ (parts[0][0].mT @ each), noise)
        parts.append((u_k[:, :own], s_k[:own], v_k[:, :own]))
    values = torch.cat([each for _, each, _ in parts])
    mean = values.mean() if len(values) else values.sum()
    return _orthogonal([(left, mean.expand(len(each)), right) for left, each, right in parts])


@method("opcm", weight=1.0, breaks={"order": "later skills make way for earlier ones"})
@on_cores
def opcm(deltas: Tensor, noise: float, *, share: float = 0.5) -> Tensor:
    """Orthogonal projection, one skill after the other: a skill adds what it does outside the top directions of the merge so far.

    In the singular directions of the merge so far its block of the top ones and its diagonal are taken away. After every skill the merge is scaled to
    the mean norm of the skills in it. arXiv 2501.09522; over the directions that the merge has, where others would be arbitrary.

    Args:
        deltas: weighted deltas (K, P, P').
        noise: norm of what is rounding.
        share: top directions are the most that have no more than this share of the sum of singular values, in [0, 1].

    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is a share of the singular values in [0, 1], got {share}")
    norms = deltas.flatten(1).norm(dim=1)
    total, scale = torch.zeros_like(deltas[0]), torch.ones(())
    for count, each in enumerate(deltas, 1):
        u, s, v = _svd(total, noise)
        top = int((s.cumsum(0) <= share * s.sum()).sum())
        taken = u.mT @ each @ v
        diagonal = taken.diagonal().diag()
        taken[top:], taken[:, top:] = diagonal[top:], diagonal[:, top:]
        total = scale * total + each - u @ taken @ v.mT
        mean = norms[:count].mean()
        scale = total.norm() / mean if mean > 0 else torch.ones(())
        total = total / scale if scale > 0 else total
    return total


def _svd(matrix: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of the singular values that are more than rounding."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > noise).sum())
    return u[:, :rank], s[:rank], vh[:rank].mT


def _orthogonal(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """`polar([U_k]) diag([S_k]) polar([V_k])^T`."""
    left, values, right = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return _polar(left) * values @ _polar(right).mT


def _polar(columns: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns; a direction that several columns share is shared out between them."""
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    scale = torch.where(values > 1e-10, values.clamp_min(1e-10).rsqrt(), torch.zeros_like(values))
    return columns @ (vectors * scale) @ vectors.mT
