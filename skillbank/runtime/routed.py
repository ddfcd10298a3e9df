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
    """The three operations of an index (N, k), and what they all need of it, made once."""

    def prepare(self, index: Tensor, slots: int, rank: int) -> Any:
        """What the operations are told of an index into S slots of rank R."""
        ...

    def shrink(self, x: Tensor, m: Tensor, prepared: Any) -> Tensor:
        """(N, I), (S, R, I) -> (N, k, R)."""
        ...

    def expand(self, coefficients: Tensor, m: Tensor, prepared: Any) -> Tensor:
        """(N, k, R), (S, R, I) -> (N, I)."""
        ...

    def scatter(self, coefficients: Tensor, x: Tensor, prepared: Any) -> Tensor:
        """(N, k, R), (N, I) -> (S, R, I)."""
        ...


class _Bags:
    """The operations by `embedding_bag`: a row is a bag of k R rows of the factors.

    Prepared are the rows of the factors (N k R,), where each bag starts (N,), which bag each row is in, and S.
    """

    def prepare(self, index: Tensor, slots: int, rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
        each, bags = index.shape[1] * rank, torch.arange(len(index), device=index.device)
        rows = (index[:, :, None] * rank + torch.arange(rank, device=index.device)).flatten()
        return rows, bags * each, bags.repeat_interleave(each), slots

    def shrink(self, x: Tensor, m: Tensor, prepared: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        rows, starts, bag, _ = prepared
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, m.flatten(0, 1), rows, starts, bag, 0)
        return products.view(len(x), -1, m.shape[1])

    def expand(self, coefficients: Tensor, m: Tensor, prepared: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        rows, starts, _, _ = prepared
        return nn.functional.embedding_bag(rows, m.flatten(0, 1), starts, mode="sum", per_sample_weights=coefficients.flatten())

    def scatter(self, coefficients: Tensor, x: Tensor, prepared: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        rows, _, bag, slots = prepared
        rank = coefficients.shape[2]
        result = x.new_zeros(slots * rank, x.shape[1])
        return result.index_add_(0, rows, coefficients.flatten()[:, None] * x[bag]).view(slots, rank, -1)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Operations, x: Tensor, a: Tensor, b: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        prepared = ops.prepare(index, len(a), a.shape[1])
        hidden = ops.shrink(x, a, prepared)
        ctx.ops, ctx.prepared = ops, prepared
        ctx.save_for_backward(x, a, b, weights, hidden)
        return ops.expand(hidden * weights[:, :, None], b, prepared)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weights, hidden = ctx.saved_tensors
        ops: Operations = ctx.ops
        _, need_x, need_a, need_b, _, need_weights = ctx.needs_input_grad
        dy = gradients[0].contiguous()
        before = ops.shrink(dy, b, ctx.prepared)
        inner = before * weights[:, :, None]
        dx = ops.expand(inner, a, ctx.prepared) if need_x else None
        da = ops.scatter(inner, x, ctx.prepared) if need_a else None
        db = ops.scatter(hidden * weights[:, :, None], dy, ctx.prepared) if need_b else None
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
