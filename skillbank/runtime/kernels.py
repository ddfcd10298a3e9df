"""The operations of routed.py in Triton: rows are sorted by slot, and every program multiplies a tile of rows of one slot on the tensor cores.

Bytes and FLOP per layer for P = N k pairs of a row and a slot, U slots that are used, rank R, b bytes per number: `shrink` reads (P I + U R I) b and
does 2 P R I; `expand` reads U R O b, writes P O b, reads it back once for the sum over k, and does 2 P R O. Nothing depends on S.
All grids depend on shapes only, so that a CUDA graph can hold them. Sums are in float32 and in a fixed order: results repeat to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiles", "expand", "prepare", "scatter", "shrink"]

TILE = 16
"""Rows of one program, the least that tensor cores multiply."""


class Tiles:
    """Pairs of a row and a slot in tiles of at most `TILE` pairs of one slot: as many tiles as there can be, those that are not needed empty.

    Args:
        index: (N, k).
        slots: S.

    """

    def __init__(self, index: Tensor, slots: int) -> None:
        self.k, self.pairs, self.slots = index.shape[1], index.numel(), slots
        found, self.order = index.flatten().sort(stable=True)  # pairs in the order of their slots (P,)
        self.bounds = torch.searchsorted(found, torch.arange(slots + 1, device=index.device))  # where those of each slot begin and end
        self.count = triton.cdiv(self.pairs, TILE) + min(slots, self.pairs)
        needed = ((self.bounds.diff() + TILE - 1) // TILE).cumsum(0)  # tiles up to and with each slot
        tile = torch.arange(self.count, device=index.device)
        self.slot = torch.searchsorted(needed, tile, right=True).clamp(max=slots - 1)
        before = needed - needed.diff(prepend=needed.new_zeros(1))
        self.start = self.bounds[self.slot] + (tile - before[self.slot]) * TILE
        self.end = torch.minimum(self.bounds[self.slot + 1], self.start + TILE)


def prepare(index: Tensor, slots: int, rank: int) -> Tiles:
    """Tiles of an index (N, k) into S slots."""
    return Tiles(index, slots)


def shrink(x: Tensor, m: Tensor, tiles: Tiles) -> Tensor:
    """(N, I), (S, R, I) -> (N, k, R)."""
    (rows, width), rank = x.shape, m.shape[1]
    parts = min(8, triton.cdiv(width, 512))  # more programs where there are few rows
    out = torch.empty(parts, tiles.pairs, rank, device=x.device, dtype=torch.float32)
    block = 128
    _shrink[(tiles.count, parts)](
        x, m, out, tiles.order, tiles.slot, tiles.start, tiles.end, tiles.k, rank, width, tiles.pairs, parts, TILE, _padded(rank), block
    )
    return out.sum(0).to(x.dtype).view(rows, tiles.k, rank)


def expand(coefficients: Tensor, m: Tensor, tiles: Tiles) -> Tensor:
    """(N, k, R), (S, R, I) -> (N, I)."""
    (rows, k, rank), width = coefficients.shape, m.shape[2]
    out = torch.empty(rows, k, width, device=m.device, dtype=m.dtype if k == 1 else torch.float32)
    block = 128
    _expand[(tiles.count, triton.cdiv(width, block))](
        coefficients.contiguous(), m, out, tiles.order, tiles.slot, tiles.start, tiles.end, rank, width, TILE, _padded(rank), block
    )
    return out.sum(1).to(m.dtype)


def scatter(coefficients: Tensor, x: Tensor, tiles: Tiles) -> Tensor:
    """(N, k, R), (N, I) -> (S, R, I)."""
    (_, k, rank), width = coefficients.shape, x.shape[1]
    out = torch.empty(tiles.slots, rank, width, device=x.device, dtype=x.dtype)
    block = 128
    _scatter[(tiles.slots, triton.cdiv(width, block))](
        coefficients.contiguous(), x, out, tiles.order, tiles.bounds, k, rank, width, TILE, _padded(rank), block
    )
    return out


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _pairs(order: Any, first: Any, last: Any, rows: tl.constexpr) -> Any:
    """Pairs of one tile, and which of its places are filled."""
    place = first + tl.arange(0, rows)
    inside = place < last
    return tl.load(order + place, mask=inside, other=0), inside


@triton.jit
def _shrink(
    x: Any,
    m: Any,
    out: Any,
    order: Any,
    slot: Any,
    start: Any,
    end: Any,
    k: Any,
    rank: Any,
    width: Any,
    pairs: Any,
    parts: Any,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
) -> None:
    tile, part = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(start + tile), tl.load(end + tile)
    if first < last:
        pair, inside = _pairs(order, first, last, rows)
        r, column = tl.arange(0, ranks), tl.arange(0, block)
        base = m + tl.load(slot + tile) * rank * width
        total = tl.zeros((rows, ranks), dtype=tl.float32)
        for at in range(part * block, width, parts * block):
            here = at + column
            values = tl.load(x + (pair // k)[:, None] * width + here[None, :], mask=inside[:, None] & (here < width)[None, :], other=0.0)
            factor = tl.load(base + r[None, :] * width + here[:, None], mask=(r < rank)[None, :] & (here < width)[:, None], other=0.0)
            total = tl.dot(values, factor, total, input_precision="ieee")
        tl.store(out + part * pairs * rank + pair[:, None] * rank + r[None, :], total, mask=inside[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    coefficients: Any,
    m: Any,
    out: Any,
    order: Any,
    slot: Any,
    start: Any,
    end: Any,
    rank: Any,
    width: Any,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    first, last = tl.load(start + tile), tl.load(end + tile)
    if first < last:
        pair, inside = _pairs(order, first, last, rows)
        r, here = tl.arange(0, ranks), tl.program_id(1) * block + tl.arange(0, block)
        known = (r < rank)[None, :] & inside[:, None]
        values = tl.load(coefficients + pair[:, None] * rank + r[None, :], mask=known, other=0.0)
        base = m + tl.load(slot + tile) * rank * width
        factor = tl.load(base + r[:, None] * width + here[None, :], mask=(r < rank)[:, None] & (here < width)[None, :], other=0.0)
        total = tl.dot(values.to(factor.dtype), factor, input_precision="ieee")
        tl.store(out + pair[:, None] * width + here[None, :], total, mask=inside[:, None] & (here < width)[None, :])


@triton.jit
def _scatter(
    coefficients: Any,
    x: Any,
    out: Any,
    order: Any,
    bounds: Any,
    k: Any,
    rank: Any,
    width: Any,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    first, last = tl.load(bounds + slot), tl.load(bounds + slot + 1)
    r, here = tl.arange(0, ranks), tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((ranks, block), dtype=tl.float32)
    for at in range(first, last, rows):
        pair, inside = _pairs(order, at, last, rows)
        values = tl.load(coefficients + pair[None, :] * rank + r[:, None], mask=inside[None, :] & (r < rank)[:, None], other=0.0)
        row = tl.load(x + (pair // k)[:, None] * width + here[None, :], mask=inside[:, None] & (here < width)[None, :], other=0.0)
        total = tl.dot(values.to(row.dtype), row, total, input_precision="ieee")
    tl.store(out + slot * rank * width + r[:, None] * width + here[None, :], total, mask=(r < rank)[:, None] & (here < width)[None, :])
