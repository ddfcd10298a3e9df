"""Merges that know what a layer's inputs look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from skillbank.merge.lift import Merged, Part, shares
from skillbank.merge.registry import method

__all__ = ["regmean"]


@method("regmean", breaks={"sign": "a mean has no negative weights"})
def regmean(part: Part, *, grams: Sequence[Mapping[str, Tensor]] | None = None, diagonal: float = 0.1) -> Merged:
    """Least squares on the inputs of every layer: the M with the least `sum_k w_k ||(M - D_k) X_k||^2`. arXiv 2212.09849.

    `M = (sum_k w_k D_k G_k)(sum_k w_k G_k)^-1`, in factors: `B_cat` and `[A_k G_k](sum_k w_k G_k)^-1`. To every G a millionth of its mean diagonal is
    added, so that inputs that never occur are not divided by.

    Args:
        part: of skills with weights that are not negative.
        grams: of every skill, {module: G = X X^T (I', I')} of the inputs that the layer has in that skill's task.
        diagonal: share that is taken from the entries off the diagonal, in [0, 1].

    """
    if grams is None or len(grams) <= part.places[-1]:
        raise ValueError(f"regmean needs the Gram matrices of the inputs for every skill, got {len(grams or ())}: give grams=[...]")
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
