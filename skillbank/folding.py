"""A skill added into the weights of its base: for good, or one at a time and taken out again bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skillbank.attach import check_fit, plain_modules
from skillbank.layers import is_transposed, weight_of
from skillbank.skill import Deltas, Skill

__all__ = ["Folding", "delta_like", "fold", "unfoldable"]


@torch.no_grad()
def fold(net: nn.Module, skill: Deltas) -> None:
    """Add the deltas of a skill, or of a `dense_merge`, into the base's weights, in place and for good: what is trained now stands on them.

    Sums are in float32 or better and rounded once. `Folding` takes a skill out again.

    Raises:
        ValueError: as `attach`, or a weight that is tied to another or quantised; the net is unchanged.

    """
    if not isinstance(skill, Skill):
        Folding(net).set(skill)  # which can go back: a delta may turn out to be undefined when others are in already
        return
    for name, layer in _foldable(net, skill).items():
        _add(layer, weight_of(layer).detach(), skill, name)


class Folding:
    """One skill at a time folded into the weights of a live net, and taken out again bit for bit, however often and in any dtype.

    The weights that a skill touches are kept as they were, once; every skill is added to those. Use it as a context, or call `clear`.

    Args:
        net: without an adapter on it. Nobody else may change the weights meanwhile.

    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._kept: dict[str, Tensor] = {}
        self._folded: dict[str, nn.Module] = {}
        self._skill: Deltas | None = None

    def set(self, skill: Deltas) -> None:
        """Fold this skill in, instead of the one before, which an error leaves there, such as a ValueError as from `fold`."""
        layers, before = _foldable(self.net, skill), self._skill
        self.clear()
        for name, layer in layers.items():
            if name not in self._kept:
                self._kept[name] = weight_of(layer).detach().clone()
        self._folded = layers  # before the first sum, so that whatever stops it is taken out again
        try:
            for name, layer in layers.items():
                _add(layer, self._kept[name], skill, name)
        except Exception:
            self.clear()
            if before is not None:
                self.set(before)
            raise
        self._skill = skill

    def clear(self) -> None:
        """Take the skill out: the weights are what they were, to the last bit."""
        with torch.no_grad():
            for name, layer in self._folded.items():
                weight_of(layer).copy_(self._kept[name])
        self._folded, self._skill = {}, None

    def __enter__(self) -> Folding:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the skill out."""
        self.clear()


def delta_like(layer: nn.Module, deltas: Deltas, module: str) -> Tensor:
    """Dense delta of a module as its layer stores weights, in float32 or better."""
    delta = deltas.delta(module, torch.float32)
    return delta.mT if is_transposed(layer) else delta


def unfoldable(net: nn.Module, skill: Deltas) -> dict[str, str]:
    """Modules of a skill whose weights it cannot be added to, and why not.

    Raises:
        ValueError: as `attach`.

    """
    check_fit(net, skill)
    plain = plain_modules(net)
    owners: dict[int, list[str]] = {}
    for name, layer in net.named_modules(remove_duplicate=False):
        for own, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{own}")
    found = {}
    for name in skill:
        weight = weight_of(plain[name])
        if not weight.is_floating_point() or weight.element_size() < 2:
            found[name] = f"has weights of {weight.dtype}, which no skill can be folded into"
        elif (tied := owners.get(id(weight))) is None:
            found[name] = "has a weight that is computed from others, which no skill can be added to"
        elif len(tied) > 1:
            found[name] = f"shares its weight, {tied}, so that a skill folded into one changes the others"
    return found


def _foldable(net: nn.Module, skill: Deltas) -> dict[str, nn.Module]:
    """Layers that a skill is added to."""
    for name, reason in unfoldable(net, skill).items():
        raise ValueError(f"module {name!r} {reason}: attach it")
    plain = plain_modules(net)
    return {name: plain[name] for name in skill}


def _add(layer: nn.Module, base: Tensor, skill: Deltas, module: str) -> None:
    delta = delta_like(layer, skill, module).to(base.device)
    with torch.no_grad():
        weight_of(layer).copy_(base.to(torch.promote_types(base.dtype, delta.dtype)) + delta)
