"""Merges that know what a layer's inputs look like, or how much its entries matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from skillbank.merge.dense import Combine, from_entries
from skillbank.merge.lift import Merged, Part, shares
from skillbank.merge.registry import method
from skillbank.merge.tiles import Tiles

__all__ = ["fisher", "regmean"]

Fisher = Mapping[str, tuple[Tensor, Tensor]]
_MEAN = {"sign": "a mean has no negative weights"}


@method("regmean", breaks=_MEAN)
def regmean(part: Part, *, grams: Sequence[Mapping[str, Tensor]] | None = None, diagonal: float = 0.1) -> Merged:
    """Least squares on the inputs of every layer: the M with the least `sum_k w_k ||(M - D_k) X_k||^2`. arXiv 2212.09849.

    `M = (sum_k w_k D_k G_k)(sum_k w_k G_k)^-1`, in factors: `B_cat` and `[A_k G_k](sum_k w_k G_k)^-1`. To every G a millionth of its mean diagonal is
    added, so that inputs that never occur are not divided by.

    Args:
        part: of skills with weights that are not negative.
        grams: of every skill, {module: G = X X^T (I', I')} of the inputs that the layer has in that skill's task; see `input_grams`.
        diagonal: share that is taken from the entries off the diagonal, in [0, 1].

    """
    if grams is None or len(grams) <= part.places[-1]:
        raise ValueError(f"regmean needs the Gram matrices of the inputs for every skill, got {len(grams or ())}: give grams=[...]")
    if not 0 <= diagonal <= 1:
        raise ValueError(f"diagonal is a share in [0, 1], got {diagonal}")
    here = part.core
    size = len(here.right)
    sums, pulled = here.right.new_zeros(size, size), here.left.new_zeros(here.left.shape[1], size)
    for each, weight, place in zip(here.cores, shares(part.weights).to(here.cores), part.places, strict=True):
        gram = grams[place].get(part.module)
        if gram is None or gram.shape != (size, size):
            raise ValueError(f"regmean needs a Gram matrix ({size}, {size}) of module {part.module!r} for every skill, one has none or another")
        full = gram.to(here.cores)
        full = (1 - diagonal) * full + diagonal * full.diagonal().diag()
        full = full + 1e-6 * full.diagonal().mean().clamp_min(1e-12) * torch.eye(size).to(full)
        sums += weight * full
        pulled += weight * each @ (here.right.mT @ full)
    right, triangle = torch.linalg.qr(torch.linalg.solve(sums, pulled.mT))
    return Merged(replace(here, right=right), triangle.mT)


@method("fisher", breaks=_MEAN)
def fisher(part: Part, *, fishers: Sequence[Fisher] | None = None) -> Merged | Tensor:
    """Mean of every entry weighted by how much it matters to each skill: `sum_k w_k F_k d_k / sum_k w_k F_k`. arXiv 2111.09832.

    The Fisher information of entry (o, i) is taken for the product of what its output and its input have, so that a layer takes O + I numbers. To
    each a millionth of its mean is added, so that where nothing matters this is the plain mean.

    Args:
        part: of skills with weights that are not negative.
        fishers: of every skill, {module: (mean g^2 (O), mean x^2 (I'))}; see `fisher_factors`.

    """
    if fishers is None or len(fishers) <= part.places[-1]:
        raise ValueError(f"fisher needs the Fisher factors of every skill, got {len(fishers or ())}: give fishers=[...]")
    given = [fishers[place].get(part.module) for place in part.places]
    shares(part.weights)  # refuses what is no mean
    return from_entries(part, lambda tiles: _by_importance(tiles, [_checked(each, tiles) for each in given], part.weights))


def _by_importance(tiles: Tiles, factors: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> Combine:
    outs, ins = (torch.stack(each) / torch.stack(each).mean() for each in zip(*factors, strict=True))  # no weight changes, numbers stay in range

    def combine(tile: Tensor, number: int) -> Tensor:
        rows = outs[:, number * tiles.step : number * tiles.step + tile.shape[1]].to(tile)
        matters = rows[:, :, None] * ins.to(tile)[:, None]
        return (matters * tile).sum(0) / torch.einsum("k,koi->oi", weights.to(tile), matters)

    return combine


def _checked(factor: tuple[Tensor, Tensor] | None, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Both halves, a millionth of their mean added."""
    if factor is None or (len(factor[0]), len(factor[1])) != tiles.shape:
        raise ValueError(f"fisher needs factors {tiles.shape} of module {tiles.module!r} for every skill, one has none or others")
    out, inner = (half.double() + 1e-6 * half.double().mean().clamp_min(1e-100) for half in factor)
    return out, inner
