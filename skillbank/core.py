"""The algebra of one module's factors in their QR core, where nothing of the size O x I is ever formed.

Shapes: K pairs of factors, R rank (sum over the pairs), O out, I in. A is (R, I) for linear and embedding layers, (R, I, *kernel) for
convolutions; B is (O, R). I' is the flattened input, I times the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Core", "Factor", "check_cut", "check_shapes", "core_of", "cut", "orthonormal", "promote", "side_by_side"]

Factor = tuple[Tensor, Tensor]
"""(A, B) of one module: A (R, I, *kernel), B (O, R)."""

_APART = 1e4
"""Bound on the squared condition number of columns of norm 1, up to which their Gram matrix tells of them what they do."""


@dataclass(frozen=True)
class Core:
    """One module of K pairs of factors in its QR core: `delta_k = Q_B C_k Q_A^T` exactly, for every k.

    Args:
        left: Q_B (O, P), orthonormal columns, P = min(O, R).
        right: Q_A (I', P'), orthonormal columns.
        cores: C (K, P, P').
        shape: shape of A without its rank dimension, (I, *kernel).

    """

    left: Tensor
    right: Tensor
    cores: Tensor
    shape: torch.Size

    def factor(self, u: Tensor, s: Tensor, vh: Tensor) -> Factor:
        """Balanced factors (sqrt(S) on both sides) of `Q_B U S V^T Q_A^T`: U (P, q), S (q), V^T (q, P')."""
        root = s.clamp_min(0).sqrt()
        return ((root[:, None] * vh) @ self.right.mT).reshape(len(s), *self.shape), self.left @ (u * root)


def core_of(module: str, pairs: Sequence[Factor | None], dtype: torch.dtype = torch.float64) -> Core:
    """QR core of the factors of one module; where there are none, a core of zeros.

    Cost O((O + I) R^2 + R^3), memory O((O + I) R), where R is the sum of the ranks.

    Raises:
        KeyError: there are no factors at all.
        ValueError: factors of layers that differ in size.

    """
    there = [pair for pair in pairs if pair is not None]
    if not there:
        raise KeyError(f"none of the {len(pairs)} skills has module {module!r}")
    check_shapes(module, there)
    thin = torch.linalg.qr if promote([half for pair in there for half in pair]) == dtype else orthonormal
    left, r_left = thin(torch.cat([b.to(dtype) for _, b in there], dim=1))
    right, r_right = thin(torch.cat([a.flatten(1).to(dtype) for a, _ in there], dim=0).mT)
    cores, start = [], 0
    for pair in pairs:
        stop = start + (0 if pair is None else len(pair[0]))
        cores.append(r_left[:, start:stop] @ r_right[:, start:stop].mT)
        start = stop
    return Core(left, right, torch.stack(cores), there[0][0].shape[1:])


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR decomposition: Q (n, P) with orthonormal columns and R (P, m) with `Q R = columns` (n, m), P = min(n, m).

    From the Cholesky factor of the columns' Gram matrix, which takes a fraction of the time of Householder reflections and loses two digits of
    float64 at most where the columns are well apart (Yamamoto et al. 2015); by those where they are not.
    """
    gram = columns.mT @ columns
    norms = gram.diagonal().sqrt()
    if columns.shape[0] >= columns.shape[1] and bool((norms > 0).all()):
        gram = gram / torch.outer(norms, norms)
        triangle, failed = torch.linalg.cholesky_ex(gram, upper=True)
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(gram)).to(gram), upper=True)
        if not failed and float(gram.norm() * inverse.norm() ** 2) <= _APART:
            return columns @ (inverse / norms[:, None]), triangle * norms
    q, r = torch.linalg.qr(columns)
    return q, r


def side_by_side(module: str, pairs: Sequence[Factor], weights: Sequence[float]) -> Factor:
    """`sum_k weights_k B_k @ A_k` exactly: the factors of one module, one after the other on the rank axis, in the dtype that holds them all."""
    check_shapes(module, pairs)
    dtype = promote([half for pair in pairs for half in pair])
    a = torch.cat([a.to(dtype) for a, _ in pairs], dim=0)
    return a, torch.cat([b.to(dtype) if weight == 1.0 else b.to(dtype) * weight for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)


def check_cut(rank: int | None, error: float | None, budget: int | None, modules: int) -> None:
    """Check what says where singular values are cut; a ValueError names what is out of range, or that there are several."""
    if (rank, error, budget).count(None) < 2:
        raise ValueError(f"give one of rank, error and budget, got rank={rank}, error={error} and budget={budget}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error is a share of the norm in [0, 1), got {error}")
    if budget is not None and budget < modules:
        raise ValueError(f"a budget of {budget} ranks is too small for {modules} modules, which keep one each: give more")


def cut(
    parts: Mapping[str, tuple[Core, Tensor, torch.dtype]], *, rank: int | None = None, error: float | None = None, budget: int | None = None
) -> tuple[dict[str, Factor], dict[str, float]]:
    """Balanced factors of the strongest singular directions of `Q_B C Q_A^T`, module by module.

    Args:
        parts: per module the bases, C (P, P') in them, and the dtype of the factors.
        rank: see `skill.truncate`, as `error` and `budget`. Without any of them all singular values that are not rounding are kept.
        error: a share of the norm.
        budget: ranks in total.

    Returns:
        The factors, and per module the norm of the singular values that it keeps.

    Raises:
        ValueError: values out of range, or several of them.

    """
    check_cut(rank, error, budget, len(parts))
    svds = {name: torch.linalg.svd(matrix, full_matrices=False) for name, (_, matrix, _) in parts.items()}
    values = {name: s for name, (_, s, _) in svds.items()}
    if rank is not None:
        keep = {name: min(rank, len(s)) for name, s in values.items()}
    elif error is not None:
        keep = _within(values, error)
    elif budget is not None:
        keep = _largest(values, budget)
    else:
        keep = {name: max(1, int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())) for name, s in values.items()}
    factors: dict[str, Factor] = {}
    for name, (bases, _, dtype) in parts.items():
        (u, s, vh), q = svds[name], keep[name]
        a, b = bases.factor(u[:, :q], s[:q], vh[:q])
        factors[name] = (a.to(dtype), b.to(dtype))
    return factors, {name: float(s[: keep[name]].norm()) for name, s in values.items()}


def check_shapes(module: str, pairs: Sequence[Factor]) -> None:
    """Check that factors of one module are of layers of one size; a ValueError names the sizes."""
    sizes = [(b.shape[0], tuple(a.shape[1:])) for a, b in pairs]
    if len(set(sizes)) > 1:
        raise ValueError(f"module {module!r} has another size in another skill, (out, in): {sizes}; these skills belong to different bases")


def promote(tensors: Sequence[Tensor]) -> torch.dtype:
    """Dtype that holds what all of them hold."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _within(values: Mapping[str, Tensor], error: float) -> dict[str, int]:
    """Ranks per module that together leave out at most `error` of the norm: the smallest singular values go first, wherever they are."""
    lost, _ = torch.cat(list(values.values())).sort()
    dropped = int((lost.square().cumsum(0) <= error**2 * lost.square().sum()).sum())
    return _without_smallest(values, dropped)


def _largest(values: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks per module of the `budget` largest singular values, the largest of every module among them."""
    rest = {name: s[1:] for name, s in values.items()}
    kept = _without_smallest(rest, max(0, sum(map(len, rest.values())) - (budget - len(values))), least=0)
    return {name: 1 + rank for name, rank in kept.items()}


def _without_smallest(values: Mapping[str, Tensor], dropped: int, least: int = 1) -> dict[str, int]:
    """How many singular values every module keeps without the smallest of all."""
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(values.values())])
    order = torch.cat(list(values.values())).argsort()
    gone = torch.bincount(owner[order[:dropped].cpu()], minlength=len(values)).tolist()
    return {name: max(least, len(s) - gone[i]) for i, (name, s) in enumerate(values.items())}
