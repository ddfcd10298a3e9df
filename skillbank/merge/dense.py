"""From a function on the entries of a module to a merge method: its dense result, tile by tile, fitted to a low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from skillbank.core import Core
from skillbank.merge.lift import Merged, Part
from skillbank.merge.registry import Method, check_options, find
from skillbank.merge.tiles import DenseTiles, Tiles

__all__ = ["Combine", "combined", "fitted", "from_entries", "on_entries"]

Combine = Callable[[Tensor, int], Tensor]
"""From tile (K, rows, I') and its number to the merged rows (rows, I')."""

_LOOKS = 3
"""Of the subspace iteration, at everything and back."""
_MORE = 8


def on_entries(function: Callable[..., Combine]) -> Method:
    """Lift `function(tiles, **options) -> combine(tile, number)` to a merge method; the tiles are of weighted deltas, in float32 or better.

    The method also takes one of `rank`, `error` and `budget` (see `truncate`) for the fit of its dense result, at most the sum of the ranks where
    none is given.
    """

    @wraps(function)
    def lifted(part: Part, **options: Any) -> Merged | Tensor:
        return from_entries(part, lambda tiles: function(tiles, **options))

    vars(lifted)["entries"] = function
    return lifted


def from_entries(part: Part, function: Callable[[Tiles], Combine]) -> Merged | Tensor:
    """What an entrywise merge of a module comes to: dense where that is asked for, else fitted to a low rank."""
    tiles = _tiles(part)
    combine = function(tiles)
    if part.dense:
        return _rows(tiles, combine)
    rank = min(tiles.shape) if part.most == 0 else part.most or sum(len(a) for a, _ in part.there)
    return fitted(tiles, combine, rank, part.there[0][0].shape[1:])


def _tiles(part: Part) -> Tiles:
    dtype = torch.promote_types(part.dtype, torch.float32)
    a, b = part.there[0]
    empty = a.new_zeros(1, *a.shape[1:]), b.new_zeros(len(b), 1)
    pairs = [
        (a.flatten(1).to(dtype), b.to(dtype) * weight)
        for (a, b), weight in zip((pair or empty for pair in part.factors), part.weights.tolist(), strict=True)
    ]
    return Tiles(pairs, part.module)


def fitted(tiles: Tiles, combine: Combine, rank: int, shape: torch.Size) -> Merged:
    """Fit of a dense merge M at a rank: the best one where the rank is not much less than full, else by subspace iteration, which is near it.

    Args:
        tiles: what is merged.
        combine: the merged rows of a tile.
        rank: of the fit.
        shape: of A without its rank.

    """
    if 4 * (rank + _MORE) >= min(tiles.shape):
        u, s, vh = torch.linalg.svd(_rows(tiles, combine), full_matrices=False)
        return Merged(Core(u[:, :rank], vh[:rank].mT, s[None, :rank].diag_embed(), shape), s[:rank].diag(), float(s.norm()))
    right = torch.randn(tiles.shape[1], rank + _MORE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(tiles.pairs[0][0])
    square = 0.0
    for look in range(_LOOKS):
        left = torch.linalg.qr(torch.cat([combine(tile, number) @ right for number, tile in enumerate(tiles)]))[0]
        back, start = torch.zeros_like(right), 0
        for number, tile in enumerate(tiles):
            rows = combine(tile, number)
            back += rows.mT @ left[start : start + len(rows)]
            start += len(rows)
            square += float(rows.square().sum()) if look == 0 else 0.0
        right, triangle = torch.linalg.qr(back)
    u, s, vh = torch.linalg.svd(triangle.mT)
    bases = Core((left @ u)[:, :rank], (right @ vh.mT)[:, :rank], s[None, :rank].diag_embed(), shape)
    return Merged(bases, s[:rank].diag(), math.sqrt(square))


def combined(deltas: Tensor, module: str, name: str, options: Mapping[str, Any] | None = None) -> Tensor:
    """An entrywise merge method on deltas that are there, (K, O, I') to (O, I').

    Raises:
        ValueError: there is no such method, it is not entrywise, or it takes no such option.

    """
    inner = getattr(find(name).function, "entries", None)
    if inner is None:
        raise ValueError(f"inner merge method {name!r} does not work entry by entry: take ties, dare, magmax or another that does")
    check_options(name, inner, options or {})
    if not deltas.numel():
        return deltas[0]
    noise = 16 * torch.finfo(deltas.dtype).eps * deltas.abs().amax()
    tiles = DenseTiles(module=module, deltas=torch.where(deltas.abs() > noise, deltas, 0))  # what is rounding has no sign
    return _rows(tiles, inner(tiles, **(options or {})))


def _rows(tiles: Tiles, combine: Combine) -> Tensor:
    return torch.cat([combine(tile, number) for number, tile in enumerate(tiles)])
