"""Many skills resident on one net, in slots: put, taken out and replaced without touching the others, the base or what is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from skillbank.attach import mark, plain_modules
from skillbank.layers import matrix, run_layers
from skillbank.mixture import Cell
from skillbank.runtime.fused import gated_linear
from skillbank.runtime.products import linear
from skillbank.runtime.routed import prepare, routed
from skillbank.skill import Skill

__all__ = ["Slots"]


class Slots(nn.Module):
    """S slots for skills on the linear layers of a net, weighted by a cell as a `Mixture` is: `Composed(model, gate, slots)`.

    Under `Routes` a row costs what its k skills cost, however many are resident; under weights of all slots it costs all of them. An empty slot
    is the base. Memory is `S R (I + O)` per module, whatever the ranks of the skills; a skill of lower rank leaves the rest of its slot at 0.

    Args:
        net: the base's, without a skill on it; changed in place.
        count: S.
        rank: largest rank of a skill.
        modules: paths of the layers; None for all linear ones.

    Raises:
        ValueError: a module that is no plain linear layer.

    """

    def __init__(self, net: nn.Module, count: int, *, rank: int, modules: Sequence[str] | None = None) -> None:
        super().__init__()
        if mark(net) is not None:
            raise ValueError("there is a skill on this net: detach it before you give the net slots")
        plain = plain_modules(net)
        names = [name for name, layer in plain.items() if matrix(layer) is not None] if modules is None else list(modules)
        for name in names:
            if name not in plain or matrix(plain[name]) is None:
                raise ValueError(f"module {name!r} is no linear layer of this net whose weights can be read: leave it out of the slots")
        self.names, self.count, self.rank, self.mark = names, count, rank, None
        self.cell = Cell(count)
        self.ranks: list[dict[str, int]] = [{} for _ in range(count)]
        """Per slot the rank of its skill by module; empty for an empty slot."""
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for name in names:
            layer, weight = plain[name], cast("Tensor", matrix(plain[name]))
            for factors, width in ((self.a, weight.shape[0]), (self.b, weight.shape[1])):
                factors.append(nn.Parameter(weight.new_zeros(count, rank, width), requires_grad=False))
            layer.forward = partial(_forward, layer, self, len(self.a) - 1)
        run_layers(net)

    @torch.no_grad()
    def put(self, slot: int, skill: Skill) -> None:
        """Put a skill into a slot, in the place of what was in it.

        Raises:
            IndexError: no such slot.
            ValueError: a module without slots, another size, or a larger rank; the slot is as it was.

        """
        self._check(slot)
        for name in skill:
            if name not in self.names:
                raise ValueError(f"the skill adapts the module {name!r}, which has no slots: make them with it")
            place = self.names.index(name)
            expected, found = (self.b[place].shape[2], (self.a[place].shape[2],)), skill.size(name)
            if expected != found:
                raise ValueError(f"module {name!r} is (out, in) {expected}, the skill's factor is {found}: it belongs to another base")
            if skill.ranks[name] > self.rank:
                raise ValueError(
                    f"module {name!r} of the skill has rank {skill.ranks[name]}, slots hold {self.rank}: make them larger, or truncate it"
                )
        ranks = skill.ranks
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            rank = ranks.get(name, 0)
            if rank:
                down, up = skill[name]
                a[slot, :rank].copy_(down)
                b[slot, :rank].copy_(up.mT)
            if rank < self.rank:
                a[slot, rank:].zero_()
                b[slot, rank:].zero_()
        self.ranks[slot] = ranks

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._check(slot)
        for factor in (*self.a, *self.b):
            factor[slot].zero_()
        self.ranks[slot] = {}

    def read(self, slot: int) -> Skill:
        """Skill in a slot, a detached copy; a ValueError if it is empty."""
        self._check(slot)
        factors = {}
        for name, rank in self.ranks[slot].items():
            place = self.names.index(name)
            a, b = (side[place].detach()[slot, :rank].clone() for side in (self.a, self.b))
            factors[name] = a, b.mT.contiguous()
        if not factors:
            raise ValueError(f"slot {slot} is empty")
        return Skill(factors)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.count:
            raise IndexError(f"there is no slot {slot}, there are {self.count}: 0 to {self.count - 1}")


def _forward(layer: nn.Module, slots: Slots, place: int, x: Tensor) -> Tensor:
    weight, bias, a, b = matrix(layer), cast("Tensor | None", layer.bias), slots.a[place], slots.b[place]
    assert weight is not None
    name = slots.names[place]
    routes = slots.cell.routes(name, x.shape)
    if routes is None:
        return gated_linear(x, weight, bias, a.flatten(0, 1), b.flatten(0, 1).mT, slots.cell.channels(name, None, x.shape))
    rows, made, key = x.flatten(0, -2), slots.cell.made, f"{len(routes.index)} routes"
    if len(routes.index) == len(rows) and key not in made:
        made[key] = prepare(routes.index, slots.count, slots.rank)
    y = linear(x, weight, bias)
    return y + routed(rows, a, b, routes.index, routes.weights, prepared=made.get(key)).view_as(y)
