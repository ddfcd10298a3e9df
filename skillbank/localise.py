"""Where a skill's effect sits: the fewest of its directions that keep a share of it on examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from skillbank.attach import attach, channel_layers
from skillbank.model import Batch, Model, on
from skillbank.skill import Skill, truncate

__all__ = ["Graft", "graft"]


@dataclass(frozen=True)
class Graft:
    """A part of a skill that does most of what the whole does.

    Args:
        skill: the part.
        effect: share of what the whole skill takes off the loss, on the examples that were looked at.
        directions: how many singular directions of the deltas are in it.
        of: how many the whole skill has.
        importance: share of the effect that each direction of a module accounts for, (R) per module, the strongest direction first.

    """

    skill: Skill
    effect: float
    directions: int
    of: int
    importance: Mapping[str, Tensor]


def graft(model: Model, skill: Skill, batches: Iterable[Batch], *, keep: float = 0.95, steps: int = 8, seed: int = 0) -> Graft:
    """Find the fewest singular directions of a skill's deltas that keep a share of its effect, in the order of their importance.

    A direction accounts for `-int_0^1 dL/dc_i(t, ..., t) dt`, the gradient of the loss in its weight along the way from no skill to all of it, so
    that all of them add up to the effect (integrated gradients, arXiv 1703.01365). Task-specific skill localization (arXiv 2302.06600) looks for
    single entries of fully trained models. `overlap` of two grafts tells whether two skills do their work in the same place.

    Args:
        model: the base; the graft is attached to it.
        skill: on linear and convolution layers.
        batches: examples, all of them looked at in every evaluation.
        keep: share of the effect, in (0, 1].
        steps: of the integral.
        seed: of what the loss draws, the same in every evaluation.

    Raises:
        ValueError: no batches, a share out of range, an embedding layer, or a skill that does not lower the loss.

    """
    looked_at = list(batches)
    if not looked_at or not 0 < keep <= 1 or steps < 1:
        raise ValueError(f"a graft needs batches, steps, and a share to keep in (0, 1]; got {len(looked_at)} batches, steps={steps} and keep={keep}")
    whole = truncate(skill, error=0.0)
    attach(model.net, whole)
    weights = {name: cast("nn.Parameter", layer.weight) for name, (layer, _) in channel_layers(model.net).items()}
    stored = {name: weight.detach().clone() for name, weight in weights.items()}

    def at(share: Callable[[str], Tensor | float]) -> float:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(stored[name].movedim(1, -1).mul(share(name)).movedim(-1, 1))
        return _loss(model, looked_at, seed)

    importance = {name: torch.zeros(weight.shape[1], dtype=torch.float64) for name, weight in weights.items()}
    for step in range(steps):
        for weight in weights.values():
            weight.requires_grad_(True)
        at(dict.fromkeys(weights, (step + 0.5) / steps).__getitem__)
        for name, weight in weights.items():
            assert weight.grad is not None
            importance[name] -= (weight.grad * stored[name]).movedim(1, -1).flatten(0, -2).sum(0).double().cpu() / steps
            weight.grad = None
            weight.requires_grad_(False)
    base, full = at(lambda _: 0.0), at(lambda _: 1.0)
    if not base > full:
        raise ValueError(f"the skill has no effect to keep: the loss is {base:.6g} without it and {full:.6g} with it")
    order = torch.cat(list(importance.values())).argsort(descending=True)

    def first(count: int) -> dict[str, Tensor]:
        chosen = torch.zeros(len(order))
        chosen[order[:count]] = 1.0
        return dict(zip(importance, chosen.split([len(each) for each in importance.values()]), strict=True))

    def effect(count: int) -> float:
        chosen = first(count)
        return (base - at(lambda name: chosen[name].to(stored[name]))) / (base - full)

    count = _fewest(len(order), lambda each: effect(each) >= keep)
    kept = effect(count)
    chosen = {name: mask.bool() for name, mask in first(count).items() if mask.any()}
    part = Skill(
        {name: (whole[name][0][mask.to(whole[name][0].device)], whole[name][1][:, mask.to(whole[name][1].device)]) for name, mask in chosen.items()}
    )
    attach(model.net, part)
    return Graft(part, kept, count, len(order), {name: each / (base - full) for name, each in importance.items()})


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """Smallest count that is enough where every larger one is, by halving; `most` is."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _loss(model: Model, batches: Sequence[Batch], seed: int) -> float:
    """Mean loss; where parameters ask for it, its gradient is left in them."""
    module = cast("nn.Module", model)
    device = next(module.parameters()).device
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            loss = module(on(device, batch)) / len(batches)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
    return total
