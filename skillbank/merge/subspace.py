"""Merges in the subspaces that skills span: least interference, and one skill without what others do."""

from __future__ import annotations

import torch
from torch import Tensor

from skillbank.merge.lift import on_cores
from skillbank.merge.registry import method

__all__ = ["project_out", "subtract_common", "wudi"]

_FIRST = "the first skill is the one that stays"


@method("wudi", weight=1.0)
@on_cores
def wudi(deltas: Tensor, noise: float) -> Tensor:
    """Least interference: the M with the least `sum_k ||(M - D_k) D_k^T||^2 / ||D_k||^2` over the weighted deltas D.

    In closed form, `M = (sum_k c_k D_k D_k^T D_k)(sum_k c_k D_k^T D_k)^+` with `c_k = 1 / ||D_k||^2`, where arXiv 2503.08099 descends by
    gradient and stops early, near the sum; this is the optimum, another model, and the larger the more alike the inputs of the skills are.
    """
    norms = deltas.flatten(1).norm(dim=1)
    there, norms = deltas[norms > noise], norms[norms > noise, None, None]
    if not len(there):
        return torch.zeros_like(deltas[0])
    inputs = torch.cat(list(there.mT / norms), dim=1)  # least squares, for the normal equations lose half of the digits
    outputs = torch.cat(list(there @ there.mT / norms), dim=1)
    return outputs @ torch.linalg.pinv(inputs, atol=8 * noise / float(norms.max()))


@method("subtract_common", weight=1.0, breaks={"order": _FIRST}, first=True)
@on_cores
def subtract_common(deltas: Tensor, _: float) -> Tensor:
    """The first skill less the mean of the others: general knowledge, or what skills have in common, taken out of one.

    `w_1 delta_1 - mean_{k > 1} w_k delta_k`, exactly. arXiv 2505.10939.
    """
    return deltas[0] - deltas[1:].sum(0) / max(1, len(deltas) - 1)


@method("project_out", weight=1.0, breaks={"order": _FIRST}, first=True)
@on_cores
def project_out(deltas: Tensor, noise: float) -> Tensor:
    """The first skill without what lies in the subspaces of the others: `delta - U U^T delta V V^T`, U and V spanning their outputs and inputs."""
    first, others = deltas[0], deltas[1:]
    if not len(others):
        return first
    left, right = _span(torch.cat(list(others), dim=1), noise), _span(torch.cat(list(others), dim=0).mT, noise)
    return first - left @ (left.mT @ first @ right) @ right.mT


def _span(columns: Tensor, noise: float) -> Tensor:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > noise]
