"""Merges that choose entry by entry of the deltas B @ A: exact on them, tile by tile, whatever the factors are.

What they give has no low rank. `merge` fits it to one and says in the certificate what that cuts off.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from skillbank.merge.dense import Combine, on_entries
from skillbank.merge.registry import method
from skillbank.merge.tiles import Tiles

__all__ = [
    *("breadcrumbs", "breadcrumbs_ties", "consensus", "dare", "dare_ties", "della", "della_ties", "emr", "magmax", "magnitude"),
    *("nearswap", "sce", "tall_mask", "ties"),
]

_CUT = {"single": "most entries are cut"}
_DRAWN = {"single": "entries are dropped at random", "order": "every skill has its own random numbers, in order"}


def _share(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"{name} is a share of the entries in (0, 1], got {value!r}")
    return value


def _step(values: Tensor) -> Tensor:
    """1 where a value is positive, else 0, as numbers: comparisons and `where` take several times as long."""
    return values.sign().clamp_min_(0)


def _largest(tiles: Tiles, share: float) -> Combine:
    """The largest `share` of every skill's entries, the others 0."""
    if share >= 1:
        return lambda tile, _: tile
    least = tiles.quantile(torch.abs, share)
    below = torch.nextafter(least, torch.zeros_like(least)).tolist()
    return lambda tile, _: torch.stack([hardshrink(each, value) for each, value in zip(tile, below, strict=True)])


def _agreeing(tile: Tensor, shares: Tensor | float = 1.0) -> Tensor:
    """Mean over the skills of those entries whose sign is that of their sum; the disjoint mean of TIES."""
    sign = tile.sum(0).sign()
    agreeing = (tile * sign).clamp_min_(0)
    parts = (agreeing.sign() * shares).sum(0)
    return sign * (agreeing * shares).sum(0) / (parts + (1 - parts.sign()))  # by 1 where there are none


def _trimmed(tiles: Tiles, density: float) -> Combine:
    return _largest(tiles, _share("density", density))


@method("magnitude", breaks=_CUT)
@on_entries
def magnitude(tiles: Tiles, *, density: float = 0.5) -> Combine:
    """Weighted sum of the largest entries of every skill.

    Args:
        tiles: weighted deltas.
        density: share of the entries that a skill keeps, in (0, 1].

    """
    trim = _trimmed(tiles, density)
    return lambda tile, number: trim(tile, number).sum(0)


@method("ties", weight=1.0, breaks=_CUT)
@on_entries
def ties(tiles: Tiles, *, density: float = 0.2) -> Combine:
    """Trim, elect signs, and mean of what agrees: the sign of an entry is that of the sum of the trimmed weighted deltas. arXiv 2306.01708.

    Trimmed module by module, where the paper trims all modules together.

    Args:
        tiles: weighted deltas.
        density: share of the entries that a skill keeps, in (0, 1].

    """
    trim = _trimmed(tiles, density)
    return lambda tile, number: _agreeing(trim(tile, number))


def _dropped(tiles: Tiles, density: float, seed: int) -> Combine:
    keep = _share("density", density)
    return lambda tile, number: tile / keep * _step(keep - tiles.uniform(tile, number, seed))


@method("dare", breaks=_DRAWN)
@on_entries
def dare(tiles: Tiles, *, density: float = 0.5, seed: int = 0) -> Combine:
    """Weighted sum of deltas whose entries are dropped at random, the others divided by `density`: the exact sum on average. arXiv 2311.03099.

    Args:
        tiles: weighted deltas.
        density: probability that an entry stays, in (0, 1].
        seed: of what is drawn.

    """
    drop = _dropped(tiles, density, seed)
    return lambda tile, number: drop(tile, number).sum(0)


@method("dare_ties", weight=1.0, breaks=_DRAWN)
@on_entries
def dare_ties(tiles: Tiles, *, density: float = 0.5, seed: int = 0) -> Combine:
    """`dare` for the entries, then the signs and the mean of `ties`.

    Args:
        tiles: weighted deltas.
        density: probability that an entry stays, in (0, 1].
        seed: of what is drawn.

    """
    drop = _dropped(tiles, density, seed)
    return lambda tile, number: _agreeing(drop(tile, number))


def _magprune(tiles: Tiles, density: float, spread: float, seed: int) -> Combine:
    _share("density", density)
    if density < 1 and not (0 <= spread < density and spread <= 1 - density + 1e-9):
        raise ValueError(f"spread must leave all probabilities in (0, 1], got density {density} and spread {spread}: take a smaller one")

    def prune(tile: Tensor, number: int) -> Tensor:
        last = max(1, tile.shape[-1] - 1)
        place = tile.abs().argsort(-1).argsort(-1) / last
        keep = (density + spread * (2 * place - 1) if density < 1 else torch.ones_like(tile)).to(tile)
        return tile / keep * _step(keep - tiles.uniform(tile, number, seed))

    return prune


@method("della", breaks=_DRAWN)
@on_entries
def della(tiles: Tiles, *, density: float = 0.5, spread: float = 0.2, seed: int = 0) -> Combine:
    """Weighted sum of deltas whose small entries are dropped more often than their large ones, each divided by its own probability to stay.

    The probability grows with the place in the row from `density - spread` to `density + spread`; on average this is the exact sum.
    The first step of arXiv 2406.11617, without its election of signs: mergekit's `della_linear`. `della_ties` is the whole.

    Args:
        tiles: weighted deltas.
        density: mean probability that an entry stays, in (0, 1].
        spread: from the mean to the ends.
        seed: of what is drawn.

    """
    prune = _magprune(tiles, density, spread, seed)
    return lambda tile, number: prune(tile, number).sum(0)


@method("della_ties", weight=1.0, breaks=_DRAWN)
@on_entries
def della_ties(tiles: Tiles, *, density: float = 0.5, spread: float = 0.2, seed: int = 0) -> Combine:
    """`della` for the entries, then the signs and the mean of `ties`.

    Args:
        tiles: weighted deltas.
        density: mean probability that an entry stays, in (0, 1].
        spread: from the mean to the ends.
        seed: of what is drawn.

    """
    prune = _magprune(tiles, density, spread, seed)
    return lambda tile, number: _agreeing(prune(tile, number))


def _crumbs(tiles: Tiles, density: float, outliers: float) -> Combine:
    if not 0 <= outliers < 1 or not 0 < density <= 1 - outliers:
        raise ValueError(f"density and outliers are shares of the entries, at most 1 together, got {density} and {outliers}")
    large = _largest(tiles, density + outliers)
    if not outliers:
        return large
    out = _largest(tiles, outliers)
    return lambda tile, number: large(tile, number) - out(tile, number)


@method("breadcrumbs", breaks=_CUT)
@on_entries
def breadcrumbs(tiles: Tiles, *, density: float = 0.85, outliers: float = 0.01) -> Combine:
    """Weighted sum without the largest and without the smallest entries of every skill. arXiv 2312.06795.

    Args:
        tiles: weighted deltas.
        density: share of the entries that a skill keeps.
        outliers: share of its largest entries, which go.

    """
    crumbs = _crumbs(tiles, density, outliers)
    return lambda tile, number: crumbs(tile, number).sum(0)


@method("breadcrumbs_ties", weight=1.0, breaks=_CUT)
@on_entries
def breadcrumbs_ties(tiles: Tiles, *, density: float = 0.85, outliers: float = 0.01) -> Combine:
    """`breadcrumbs` for the entries, then the signs and the mean of `ties`.

    Args:
        tiles: weighted deltas.
        density: share of the entries that a skill keeps.
        outliers: share of its largest entries, which go.

    """
    crumbs = _crumbs(tiles, density, outliers)
    return lambda tile, number: _agreeing(crumbs(tile, number))


@method("sce", weight=1.0)
@on_entries
def sce(tiles: Tiles, *, density: float = 0.5) -> Combine:
    """Select, calculate, erase: the entries on which the skills differ most, each skill weighted by its energy there, the minority's signs left out.

    `sum_k c_k d_k [agrees] / sum_k c_k [agrees]` with `c_k` the squared norm of what is selected of skill k. A single skill is itself.
    arXiv 2408.07990.

    Args:
        tiles: weighted deltas.
        density: share of the entries that are selected, by their variance over the skills, in (0, 1].

    """
    _share("density", density)

    def variance(tile: Tensor) -> Tensor:
        return (tile - tile.mean(0)).square_().mean(0, keepdim=True)

    least = tiles.quantile(variance, density) if len(tiles) > 1 and density < 1 else torch.zeros(1)

    def selected(tile: Tensor) -> Tensor:
        return tile * (1 - _step(least.to(tile) - variance(tile)))

    energy = torch.stack([selected(tile).square().sum((1, 2)) for tile in tiles]).sum(0)[:, None, None]

    return lambda tile, _: _agreeing(selected(tile), energy)


@method("magmax", weight=1.0)
@on_entries
def magmax(tiles: Tiles) -> Combine:
    """Of every entry the weighted delta that is largest in magnitude, the positive one of two that are equal. arXiv 2407.06322."""

    def combine(tile: Tensor, _: int) -> Tensor:
        high, low = tile.amax(0), tile.amin(0)
        return torch.maximum(high, -low).copysign(high + low)

    return combine


@method("emr", weight=1.0)
@on_entries
def emr(tiles: Tiles) -> Combine:
    """The unified delta of EMR: the sign of the sum, with the largest magnitude among the skills that have it. arXiv 2405.17461."""

    def combine(tile: Tensor, _: int) -> Tensor:
        sign = tile.sum(0).sign()
        return sign * (tile * sign).clamp_min(0).amax(0)

    return combine


@method("consensus", weight=1.0)
@on_entries
def consensus(tiles: Tiles, *, threshold: float = 1.0, votes: int = 2) -> Combine:
    """The sum of the weighted deltas where at least `votes` of the skills matter, see `tall_mask`; what is selfish or useless goes. arXiv 2405.07813.

    Args:
        tiles: weighted deltas.
        threshold: lambda of `tall_mask`.
        votes: skills that an entry has to matter to, all of them where there are fewer.

    """
    if votes < 1 or threshold < 0:
        raise ValueError(f"votes must be at least 1 and threshold at least 0, got {votes} and {threshold}")
    least = min(votes, len(tiles))

    def combine(tile: Tensor, _: int) -> Tensor:
        total = tile.sum(0)
        votes = (1 - _step(threshold * (total - tile).abs() - tile.abs())).sum(0)
        return total * (votes - (least - 1)).clamp_(0, 1)

    return combine


@method("tall_mask", weight=1.0, breaks={"order": "the first skill is the one that is looked for"}, first=True)
@on_entries
def tall_mask(tiles: Tiles, *, threshold: float = 1.0) -> Combine:
    """What the sum of the weighted deltas holds of the first skill: its entries where `|d_1| >= threshold |sum_k d_k - d_1|`. arXiv 2405.07813.

    Args:
        tiles: weighted deltas.
        threshold: how much the first skill must be of an entry.

    """

    def combine(tile: Tensor, _: int) -> Tensor:
        total = tile.sum(0)
        return total * (1 - _step(threshold * (total - tile[0]).abs() - tile[0].abs()))

    return combine


@method("nearswap", weight=1.0, breaks={"order": "the second skill is drawn into the first"}, first=True)
@on_entries
def nearswap(tiles: Tiles, *, distance: float = 0.001) -> Combine:
    """The first skill, its entries drawn to those of the second where they are near: `a + min(1, distance / |b - a|) (b - a)`.

    Args:
        tiles: weighted deltas of one or two skills.
        distance: the farthest that an entry moves, in units of the weights.

    """
    if distance < 0:
        raise ValueError(f"distance must be at least 0, got {distance}")
    if len(tiles) > 2:
        raise ValueError(f"nearswap draws one skill to another, got {len(tiles)}")
    return lambda tile, _: tile[0] + (tile[-1] - tile[0]).clamp(-distance, distance)
