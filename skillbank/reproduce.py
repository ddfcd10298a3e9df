"""A version made again from its card, and how the two compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skillbank.bank import Bank, Base, Card, Composition, Ref
from skillbank.bank.card import tool_versions
from skillbank.recipe import Made, compose, exact_conf, merge_versions, train
from skillbank.skill import Skill, distance

__all__ = ["Rebuilt", "rebuild"]


@dataclass(frozen=True)
class Rebuilt:
    """How a version that was made again compares with the one in the bank.

    Args:
        ref: exact reference.
        differences: what is not bit-equal, of the metrics of a merge what differs by more than rounding: `{part: size of the difference over the
            size of what is stored}`, infinite where one side lacks a part or has another shape or dtype; a part is a module, a tensor or a metric.
        changed: what has changed since it was made, and may be why: data sets by hash, tools by version.

    """

    ref: Ref
    differences: dict[str, float]
    changed: dict[str, str]

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences


def rebuild(ref: str | Ref, bank: Bank) -> Rebuilt:
    """Make a version again from its card and compare; nothing is put into the bank.

    The same bits can be expected on the same kind of machine with the same versions of the tools and the same number of threads.

    Raises:
        UnknownRef: no such version, or one that it stands on is gone.
        ValueError: its card has no configuration, because `train` and `compose` did not make it.

    """
    exact = bank.resolve(ref)
    card, stored = bank.card(exact), bank.get(exact)
    parents = [parent["ref"] for parent in card.parents]
    if isinstance(stored, Skill) and "certificate" in card.conf:
        again, _, _ = merge_versions(parents, bank, **card.conf["merge"])
        return Rebuilt(exact, {} if stored.fingerprint == again.fingerprint else distance(stored, again), _changed(card, {}))
    if not {"task", "seed"} <= set(card.conf) or not {"model", "skills"} & set(card.conf):
        raise ValueError(
            f"the card of {str(exact)!r} has no configuration: only what train.py, compose.py and `skillbank merge` made can be made again"
        )
    conf = {**exact_conf(card.conf, bank, card.base and card.base["ref"]), "logger": {}, "name": exact.name}
    if card.kind == "composition":
        made = compose({**conf, "skills": parents}, bank, resume=False)
    else:
        made = train({**conf, "base": card.base and card.base["ref"], "start": parents}, bank, resume=False)
    return Rebuilt(exact, _differences(stored, made, card), _changed(card, made.card["data"]))


def _differences(stored: object, made: Made, card: Card) -> dict[str, float]:
    if isinstance(stored, Skill):
        assert isinstance(made.thing, Skill)
        return {} if stored.fingerprint == made.thing.fingerprint else distance(stored, made.thing)
    if isinstance(stored, Composition) and stored.merge is not None:
        now = made.card["metrics"]
        then = {key: card.metrics.get(key, math.nan) for key in now}
        return {key: abs(now[key] - then[key]) for key in now if not math.isclose(now[key], then[key], rel_tol=1e-9)}
    assert isinstance(stored, Base | Composition)
    assert isinstance(made.thing, Base | Composition)
    return _apart(stored.tensors, made.thing.tensors)


def _apart(stored: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, float]:
    found = dict.fromkeys(sorted(stored.keys() ^ made.keys()), math.inf)
    for name in sorted(stored.keys() & made.keys()):
        old, new = stored[name], made[name].to(stored[name].device)
        alike = (old.dtype, old.shape) == (new.dtype, new.shape)
        if not (alike and torch.equal(old, new)):
            found[name] = float((new.double() - old.double()).norm() / old.double().norm().clamp_min(1e-30)) if alike else math.inf
    return found


def _changed(card: Card, data: Mapping[str, str]) -> dict[str, str]:
    tools = tool_versions()
    found = {name: f"{old[:12]} is {data.get(name, 'gone')[:12]}" for name, old in card.data.items() if data.get(name) != old}
    return found | {tool: f"{old} is {tools.get(tool, 'gone')}" for tool, old in card.tools.items() if tools.get(tool) != old}
