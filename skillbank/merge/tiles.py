"""The deltas of one module, entry by entry, without ever holding all entries of all skills: tiles of rows, made from the factors when looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

from skillbank.core import Factor

__all__ = ["DenseTiles", "Tiles"]

_ENTRIES = 2**17
"""Of one skill in a tile."""
_SAMPLE = 256


@dataclass(frozen=True)
class Tiles:
    """Weighted deltas of K skills on one module.

    Args:
        pairs: A (R, I') and B (O, R) per skill, the weight multiplied into B.
        module: its path, so that each draws numbers of its own.

    """

    pairs: Sequence[Factor]
    module: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I')."""
        a, b = self.pairs[0]
        return len(b), a.shape[1]

    def __len__(self) -> int:
        """K."""
        return len(self.pairs)

    def __iter__(self) -> Iterator[Tensor]:
        """Tiles (K, rows, I') from the first row to the last."""
        for start in range(0, self.shape[0], self.step):
            yield self._block(slice(start, start + self.step), slice(None))

    @property
    def step(self) -> int:
        """Rows of a tile; the last may have fewer."""
        return max(1, _ENTRIES // self.shape[1])

    def quantile(self, score: Callable[[Tensor], Tensor], share: float) -> Tensor:
        """Least of the `share` largest scores, exactly: in one look at every entry where a sample brackets it well, in a few where not.

        Args:
            score: from a tile (K, rows, columns) to nonnegative scores (S, rows, columns), entry by entry.
            share: of all entries, in (0, 1].

        Returns:
            Thresholds (S,): the scores that are at least as large are the chosen share, and those that are equal to the last of it; 0 where fewer
            scores than that are positive.

        Raises:
            ValueError: a score that is not finite.

        """
        count = max(1, round(share * self.shape[0] * self.shape[1]))
        sample = score(self._sample()).flatten(1).sort(descending=True).values
        found = torch.full((len(sample),), torch.nan, dtype=sample.dtype, device=sample.device)
        slack = 0.02
        while found.isnan().any():
            if slack > 8:
                raise ValueError(f"entries of module {self.module!r} are not finite once they are weighted: take smaller weights")
            last = sample.shape[1] - 1
            at = share * last
            high = sample[:, int(max(0, at - slack * last))] if at > slack * last else torch.full_like(found, torch.inf)
            low = sample[:, int(min(last, at + slack * last))] if at + slack * last < last else torch.zeros_like(found)
            found = self._between(score, low, high, count, found)
            slack *= 4
        return found

    def uniform(self, tile: Tensor, number: int, seed: int) -> Tensor:
        """Random numbers in [0, 1) for every entry of tile `number`, the same at every look."""
        seeds = [crc32(f"{seed}/{self.module}/{k}/{number}".encode()) for k in range(len(tile))]
        return torch.stack([torch.rand(tile.shape[1:], generator=torch.Generator().manual_seed(each)) for each in seeds]).to(tile)

    def _between(self, score: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, count: int, found: Tensor) -> Tensor:
        """Largest score but `count - 1`, for those that it lies in [low, high] for."""
        above = [0] * len(low)
        inside: list[list[Tensor]] = [[] for _ in low]
        least = low.clamp_min(torch.finfo(low.dtype).smallest_normal)
        for tile in self:
            scores = score(tile).flatten(1)
            higher = scores > high[:, None]
            within = (scores >= least[:, None]) ^ higher
            for i, (values, mask, more) in enumerate(zip(scores, within, higher, strict=True)):
                inside[i].append(values[mask])
                above[i] += int(more.count_nonzero())
        found = found.clone()
        for i, parts in enumerate(inside):
            values, place = torch.cat(parts), count - above[i]
            if 1 <= place <= len(values):
                found[i] = values.kthvalue(len(values) - place + 1).values
            elif place > len(values) and low[i] == 0:
                found[i] = 0.0
        return found

    def _sample(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        rows, columns = (torch.randperm(size, generator=generator)[:_SAMPLE] for size in self.shape)
        return self._block(rows, columns)

    def _block(self, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        return torch.stack([b[rows] @ a[:, columns] for a, b in self.pairs])


@dataclass(frozen=True)
class DenseTiles(Tiles):
    """Deltas (K, O, I') that are there."""

    pairs: Sequence[Factor] = ()
    deltas: Tensor = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I')."""
        return self.deltas.shape[1], self.deltas.shape[2]

    def __len__(self) -> int:
        """K."""
        return len(self.deltas)

    def _block(self, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        return self.deltas[:, rows][:, :, columns]
