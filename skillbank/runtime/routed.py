"""A few weighted skills per row, of many: work in proportion to how many a row has, not to how many there are, and training through it.

Where every row has routes of its own, everything is made of three operations on the factors of S slots, as matrices m (S, R, I) of rows in the
rank's order: `shrink`: (N, k, R) products of row n with the R rows of each of its k slots; `expand`: (N, I) sums of those rows by coefficients
(N, k, R); `scatter`: (S, R, I) what `expand` has as its gradient. On a GPU they are kernels of our own, elsewhere the three kernels of
`embedding_bag`. Where rows share routes, as the tokens of a prompt or the samples of an observation do, their factors are gathered once for all.

Shapes: N rows, G groups of rows with the same routes, k slots of each, S slots, R rank of one, I in, O out.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Operations", "Prepared", "prepare", "routed"]


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


class Prepared(NamedTuple):
    """Operations, and what they were told of an index; it serves all layers with as many slots and the same rank."""

    ops: Operations
    told: Any


def prepare(index: Tensor, slots: int, rank: int, *, ops: Operations | None = None) -> Prepared:
    """For `routed`; `ops` is what computes it, by default our kernels on a GPU and `embedding_bag` elsewhere."""
    ops = ops or (_kernels() if index.is_cuda else _Bags())
    return Prepared(ops, ops.prepare(index, slots, rank))


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prepared: Prepared, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        ops, told = prepared
        hidden = ops.shrink(x, a, told)
        ctx.prepared = prepared
        ctx.save_for_backward(x, a, b, weights, hidden)
        return ops.expand(hidden * weights[:, :, None], b, told)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weights, hidden = ctx.saved_tensors
        ops, told = ctx.prepared
        _, need_x, need_a, need_b, need_weights = ctx.needs_input_grad
        dy = gradients[0].contiguous()
        before = ops.shrink(dy, b, told)
        inner = before * weights[:, :, None]
        dx = ops.expand(inner, a, told) if need_x else None
        da = ops.scatter(inner, x, told) if need_a else None
        db = ops.scatter(hidden * weights[:, :, None], dy, told) if need_b else None
        return None, dx, da, db, (before * hidden).sum(-1) if need_weights else None


def routed(x: Tensor, a: Tensor, b: Tensor, index: Tensor, weights: Tensor, *, prepared: Prepared | None = None) -> Tensor:
    """`sum_j weights[g, j] B[index[g, j]] A[index[g, j]] x[n]` for every row n of group g, (N, O).

    Args:
        x: (N, I), the N / G rows of a group next to each other.
        a: (S, R, I).
        b: (S, R, O), every B transposed.
        index: (G, k) int64 in 0..S-1.
        weights: (G, k).
        prepared: of the index, where it is known already.

    """
    if len(index) < len(x):
        return _shared(x, a, b, index, weights)
    prepared = prepared or prepare(index, len(a), a.shape[1])
    result: Tensor = _Routed.apply(prepared, x.contiguous().to(a.dtype), a, b, weights.to(a.dtype))  # type: ignore[no-untyped-call]
    return result


def _shared(x: Tensor, a: Tensor, b: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As two products of each group with the factors of its k slots, one below the other."""
    down, up = (factors[index].flatten(1, 2) for factors in (a, b))
    hidden = x.to(a.dtype).view(len(index), -1, x.shape[1]) @ down.mT
    return (hidden * weights.to(hidden.dtype).repeat_interleave(a.shape[1], 1)[:, None] @ up).flatten(0, 1)


def _kernels() -> Operations:
    from skillbank.runtime import kernels

    return kernels
