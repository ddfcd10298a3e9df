"""Several skills trained at once on one frozen base: one pass over all their examples, the base's products shared, factors and optimiser state apart.

What each skill sees, and what is drawn at random for it, is what it would be alone, so that its losses are the same.
Shapes: K skills, n examples of each, B = K n rows, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.attach import detach, factors, fresh, plain_modules
from skillbank.layers import matrix
from skillbank.mixture import Mixed
from skillbank.model import SEED_STRIDE, Batch, Batches, ModelModule
from skillbank.runtime.fused import gated_linear, unfuse
from skillbank.runtime.products import quicken
from skillbank.runtime.streams import Streams
from skillbank.skill import Skill

__all__ = ["Together", "together_batches"]


class Together(nn.Module):
    """K fresh skills on a model's net; a model for `fit`, whose loss is the sum of theirs: `fit(together, batches, together.groups())`.

    Every skill starts as `torch.manual_seed(seed); fresh(net, ...)` starts it, and goes on as `fit(..., seed=seed)` would, if `fit` gets the first
    seed. A clip of the gradient would be of all of them together.

    Args:
        model: base, changed in place, without a skill on it. It has `losses(batch)`, the loss of every example (B,), whose mean is `forward`.
        seeds: K, of the start of each and of what is drawn for it.
        ranks: one for all, or K; a smaller one costs what the largest does.
        scales: multiplier of B A, one for all, or K.
        targets: as for `fresh`; linear layers.

    Raises:
        ValueError: a model without such losses, or with skills, a layer that is not linear, or numbers of seeds, ranks and scales that differ.

    """

    replayable = False
    """A CUDA graph would draw from one stream."""

    def __init__(
        self,
        model: nn.Module,
        seeds: Sequence[int],
        *,
        ranks: int | Sequence[int] = 8,
        scales: float | Sequence[float] = 16.0,
        targets: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, Mixed):
            raise ValueError(f"{type(model).__name__} has skills on its net, whose place the new ones would take: give the base by itself")
        if not callable(getattr(model, "losses", None)):
            raise ValueError(f"{type(model).__name__} has no losses(batch), the loss of every example: without it skills cannot be told apart")
        count = len(seeds)
        self.seeds = list(seeds)
        self.ranks = [ranks] * count if isinstance(ranks, int) else list(ranks)
        scale = [float(scales)] * count if isinstance(scales, int | float) else [float(each) for each in scales]
        if not count or not len(self.ranks) == len(scale) == count:
            raise ValueError(f"got {count} seeds, {len(self.ranks)} ranks and {len(scale)} scales: give one of each per skill")
        self.model = cast("ModelModule", model)
        self.names, starts = _starts(self.net, seeds, self.ranks, targets)
        self.skills = nn.ModuleList(nn.ParameterList(start) for start in starts)
        self.register_buffer("scales", torch.tensor(scale, device=starts[0][0].device), persistent=False)
        self.latest = torch.zeros(count)
        """Loss of every skill in the last batch, (K,)."""
        plain = plain_modules(self.net)
        for place, name in enumerate(self.names):
            plain[name].forward = partial(_forward, plain[name], self, place)
        quicken(self.net)
        self.model.requires_grad_(False)

    scales: Tensor

    @property
    def net(self) -> nn.Module:
        """Net of the base."""
        return self.model.net

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # what is in the block may be compiled, the block itself not
    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses of the skills, (), for a batch (B, ...) that holds the examples of each one after another."""
        rows, count = len(next(iter(batch.values()))), len(self.skills)
        if rows % count:
            raise ValueError(f"a batch of {rows} rows is not for {count} skills: every one needs as many")
        first = torch.initial_seed()
        with Streams([(first + (seed - self.seeds[0]) * SEED_STRIDE) % 2**63 for seed in self.seeds], rows):
            losses = cast("Any", self.model).losses(batch).view(count, -1).mean(1)
        self.latest = losses.detach()
        return losses.sum()

    def groups(self, lr: Sequence[float | None] | None = None, weight_decay: Sequence[float | None] | None = None) -> list[dict[str, Any]]:
        """Parameters for `fit`, with a learning rate or a weight decay for each skill; None is the run's."""
        found: list[dict[str, Any]] = [{"params": list(skill.parameters())} for skill in self.skills]
        for key, values in {"lr": lr, "weight_decay": weight_decay}.items():
            for group, value in zip(found, values or [None] * len(found), strict=True):
                if value is not None:
                    group[key] = value
        return found

    def read(self, index: int) -> Skill:
        """One of the skills, its scale folded in; a detached copy."""
        found, rank = {}, self.ranks[index]
        for place, name in enumerate(self.names):
            a, b = (side.detach() for side in self._factor(index, place))
            found[name] = a[:rank] * float(self.scales[index]), b[:, :rank].clone()
        return Skill(found)

    def detach(self) -> None:
        """Take the skills off the net."""
        unfuse(self.net)

    def _factor(self, index: int, place: int) -> tuple[Tensor, Tensor]:
        skill = cast("nn.ParameterList", self.skills[index])
        return skill[2 * place], skill[2 * place + 1]


def together_batches(batches: Sequence[Batches]) -> Batches:
    """Batches for K skills from those of each: all of the same keys and sizes, one after another."""

    def joined(start: int) -> Iterator[Batch]:
        for each in zip(*(one(start) for one in batches), strict=True):
            yield {key: torch.cat([batch[key] for batch in each]) for key in each[0]}

    return joined


def _starts(
    net: nn.Module, seeds: Sequence[int], ranks: Sequence[int], targets: str | Sequence[str] | None
) -> tuple[list[str], list[list[nn.Parameter]]]:
    """Modules, and per skill A and B of every one, with ranks up to the largest filled with 0, where they stay: neither gets a gradient."""
    starts: list[list[nn.Parameter]] = []
    names: list[str] = []
    with torch.random.fork_rng():
        for seed, rank in zip(seeds, ranks, strict=True):
            torch.manual_seed(seed)
            fresh(net, rank=rank, targets=targets)
            live = factors(net)
            names, more = list(live), max(ranks) - rank
            detach(net)
            plain = plain_modules(net)
            for name in names:
                if matrix(plain[name]) is None:
                    raise ValueError(f"module {name!r} is no plain linear layer: leave it out of the targets, or train one by one")
            pad = nn.functional.pad
            padded = [(pad(a.detach(), (0, 0, 0, more)), pad(b.detach(), (0, more))) for a, b in live.values()]
            starts.append([nn.Parameter(side) for a, b in padded for side in (a, b.mT.contiguous().mT)])  # B lies as its gradient comes
    return names, starts


def _forward(layer: nn.Module, together: Together, place: int, x: Tensor) -> Tensor:
    weight, bias = matrix(layer), cast("Tensor | None", layer.bias)
    assert weight is not None
    pairs = [together._factor(index, place) for index in range(len(together.skills))]
    a, b = torch.stack([a for a, _ in pairs]), torch.stack([b.mT for _, b in pairs]).mT
    scales = together.scales.repeat_interleave(len(x) // len(pairs)).view(-1, *[1] * (x.dim() - 1))
    return gated_linear(x, weight, bias, a, b, scales)
