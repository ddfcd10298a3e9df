"""A few weighted skills per row, of many: work in proportion to how many a row has, not to how many there are, and training through it.

Everything is made of three operations on the factors of S slots, as matrices m (S, R, I) of rows in the rank's order:
`shrink`: (N, k, R) products of row n with the R rows of each of its k slots; `expand`: (N, I) sums of those rows by coefficients (N, k, R);
`scatter`: (S, R, I) what `expand` has as its gradient. On a GPU they are kernels of our own, elsewhere the three kernels of `embedding_bag`.

Shapes: N rows, k slots of each, S slots, R rank of one, I in, O out.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Operations", "routed"]


class Operations(Protocol):
    """The three operations; `index` is (N, k)."""

    def shrink(self, x: Tensor, m: Tensor, index: Tensor) -> Tensor:
        """(N, I), (S, R, I) -> (N, k, R)."""
        ...

    def expand(self, coefficients: Tensor, m: Tensor, index: Tensor) -> Tensor:
        """(N, k, R), (S, R, I) -> (N, I)."""
        ...

    def scatter(self, coefficients: Tensor, x: Tensor, index: Tensor, slots: int) -> Tensor:
        """(N, k, R), (N, I) -> (S, R, I)."""
        ...


class _Bags:
    """The operations by `embedding_bag`: a row is a bag of k R rows of the factors."""

    def shrink(self, x: Tensor, m: Tensor, index: Tensor) -> Tensor:
        flat, offsets, bag = self._bags(index, m.shape[1])
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, m.flatten(0, 1), flat, offsets, bag, 0)
        return products.view(*index.shape, m.shape[1])

    def expand(self, coefficients: Tensor, m: Tensor, index: Tensor) -> Tensor:
        flat, offsets, _ = self._bags(index, m.shape[1])
        return nn.functional.embedding_bag(flat, m.flatten(0, 1), offsets, mode="sum", per_sample_weights=coefficients.flatten())

    def scatter(self, coefficients: Tensor, x: Tensor, index: Tensor, slots: int) -> Tensor:
        rank = coefficients.shape[2]
        flat, _, bag = self._bags(index, rank)
        result = x.new_zeros(slots * rank, x.shape[1])
        return result.index_add_(0, flat, coefficients.flatten()[:, None] * x[bag]).view(slots, rank, -1)

    def _bags(self, index: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the factors (N k R,), where each bag starts (N,), and which bag each belongs to."""
        rows, each = len(index), index.shape[1] * rank
        ranks = torch.arange(rank, device=index.device)
        bags = torch.arange(rows, device=index.device)
        return (index[:, :, None] * rank + ranks).flatten(), bags * each, bags.repeat_interleave(each)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Operations, x: Tensor, a: Tensor, b: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        hidden = ops.shrink(x, a, index)
        ctx.ops = ops
        ctx.save_for_backward(x, a, b, index, weights, hidden)
        return ops.expand(hidden * weights[:, :, None], b, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, index, weights, hidden = ctx.saved_tensors
        ops: Operations = ctx.ops
        _, need_x, need_a, need_b, _, need_weights = ctx.needs_input_grad
        dy = gradients[0].contiguous()
        before = ops.shrink(dy, b, index)
        inner = before * weights[:, :, None]
        dx = ops.expand(inner, a, index) if need_x else None
        da = ops.scatter(inner, x, index, len(a)) if need_a else None
        db = ops.scatter(hidden * weights[:, :, None], dy, index, len(b)) if need_b else None
        return None, dx, da, db, None, (before * hidden).sum(-1) if need_weights else None


def routed(x: Tensor, a: Tensor, b: Tensor, index: Tensor, weights: Tensor, *, ops: Operations | None = None) -> Tensor:
    """`sum_j weights[n, j] B[index[n, j]] A[index[n, j]] x[n]` for every row n, (N, O).

    Args:
        x: (N, I).
        a: (S, R, I).
        b: (S, R, O), every B transposed.
        index: (N, k) int64 in 0..S-1.
        weights: (N, k).
        ops: what computes it; default: our kernels on a GPU, `embedding_bag` elsewhere.

    """
    if ops is None:
        ops = _kernels() if x.is_cuda else _Bags()
    result: Tensor = _Routed.apply(ops, x.contiguous(), a, b, index, weights.to(a.dtype))  # type: ignore[no-untyped-call]
    return result


def _kernels() -> Operations:
    from skillbank.runtime import kernels

    return kernels
