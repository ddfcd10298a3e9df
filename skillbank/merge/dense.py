"""From a function on the entries of a module to a merge method: its dense result, tile by tile, fitted to a low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from skillbank.merge.lift import Merged, dtype_of, on_modules, present
from skillbank.merge.registry import Method, check_options, find
from skillbank.merge.tiles import DenseTiles, Tiles
from skillbank.skill import Core, Skill

__all__ = ["Combine", "combined", "fitted", "on_entries"]

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
    def lifted(skills: Sequence[Skill], weights: Tensor, *, module: str, most: int | None, **options: Any) -> Merged:
        skills, weights = present(skills, weights)
        there = [skill[module][0] for skill in skills if module in skill]
        tiles = _tiles(skills, weights, module)
        rank = min(tiles.shape) if most == 0 else most or sum(map(len, there))
        return fitted(tiles, function(tiles, **options), rank, there[0].shape[1:])

    shape = signature(function)
    whole = signature(lifted, follow_wrapped=False).parameters
    own = [each for each in shape.parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    parameters = [whole["skills"], whole["weights"], whole["module"], whole["most"], *own]
    vars(lifted)["__signature__"] = shape.replace(parameters=parameters)
    method = on_modules(lifted)
    vars(method)["entries"] = function
    return method


def _tiles(skills: Sequence[Skill], weights: Tensor, module: str) -> Tiles:
    dtype = torch.promote_types(dtype_of(skills, module), torch.float32)
    a, b = next(skill[module] for skill in skills if module in skill)
    empty = a.new_zeros(1, a[0].numel(), dtype=dtype), b.new_zeros(len(b), 1, dtype=dtype)
    pairs = []
    for skill, weight in zip(skills, weights.tolist(), strict=True):
        a, b = skill.factors.get(module, empty)
        pairs.append((a.flatten(1).to(dtype), b.to(dtype) * weight))
    return Tiles(pairs, module)


def fitted(tiles: Tiles, combine: Combine, rank: int, shape: torch.Size) -> Merged:
    """Fit of a dense merge M at a rank: the best one where the rank is not much less than full, else by subspace iteration, which is near it.

    Args:
        tiles: what is merged.
        combine: the merged rows of a tile.
        rank: of the fit.
        shape: of A without its rank.

    """
    if 4 * (rank + _MORE) >= min(tiles.shape):
        dense = torch.cat([combine(tile, number) for number, tile in enumerate(tiles)])
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
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
    combine = inner(tiles, **(options or {}))
    return torch.cat([combine(tile, number) for number, tile in enumerate(tiles)])
