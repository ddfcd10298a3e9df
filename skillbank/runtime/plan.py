"""How every adapted layer of a model is computed, and why: merged into its weight, merged anew for a row of weights, as factors, or by reference.

With m x n weights and rank R, a merge costs 2 m n R FLOP, factors cost 2 R (m + n) per row of the net, and `START` for every pass of it. So what
is the same for more than m n / (m + n) rows is cheaper merged, whatever the rank (for 256 x 1024: 205), and so are small layers in many passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from skillbank.attach import adapted_layers, attach, base_weights, detach, factors
from skillbank.folding import fold, unfoldable
from skillbank.mixture import Mixture
from skillbank.runtime.fused import fuse, unfuse, why_not
from skillbank.skill import Skill

__all__ = ["Choice", "Kind", "Plan", "Wanted", "carry_out", "plan_constant", "plan_gated"]

Kind = Literal["merged", "per row", "factors", "reference"]
Wanted = Kind | Mapping[str, Kind] | None

START = 1e6
"""FLOP that a processor does in the time that two more products take to start, some ten microseconds."""


@dataclass(frozen=True)
class Choice:
    """What is done for one module.

    Args:
        kind: `merged` into the weight for good; `per row` of weights, when a gate gives one (a batch of several goes by factors: products that each
            have a weight of their own never paid); `factors` beside the base's product; or `reference`, PEFT's layer and a hook.
        reason: why.
        size: (O, I).
        rank: R, the sum over the skills.
        repeats: rows of the net per row of weights that were counted on.
        passes: passes of the net that they are spread over.

    """

    kind: Kind
    reason: str
    size: tuple[int, int]
    rank: int
    repeats: int
    passes: int = 1

    @property
    def base(self) -> float:
        """FLOP of the base layer per row of the net."""
        return 2.0 * self.size[0] * self.size[1]

    @property
    def extra(self) -> float:
        """FLOP of the skills per row of the net."""
        out, width = self.size
        each_pass = START * self.passes / self.repeats
        return {"merged": 0.0, "per row": self.base * self.rank / self.repeats}.get(self.kind, 2.0 * self.rank * (out + width) + each_pass)


class Plan(Mapping[str, Choice]):
    """Choices by module; printed, a table."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self._choices = dict(choices)

    def __getitem__(self, module: str) -> Choice:
        """Choice for a module."""
        return self._choices[module]

    def __iter__(self) -> Iterator[str]:
        """Modules, in the order of the net."""
        return iter(self._choices)

    def __len__(self) -> int:
        """Number of modules."""
        return len(self._choices)

    def of(self, kind: Kind) -> list[str]:
        """Modules with a choice of this kind."""
        return [name for name, choice in self.items() if choice.kind == kind]

    def __str__(self) -> str:
        """Table: module, weight, rank, choice, cost per row of the net and reason."""
        rows = [("module", "out x in", "rank", "plan", "kFLOP/row", "skills add", "because")]
        for name, each in self.items():
            cost = f"{each.base / 1e3:.0f}", f"{each.extra / each.base:.1%}"
            rows.append((name, f"{each.size[0]} x {each.size[1]}", str(each.rank), each.kind, *cost, each.reason))
        base = sum(each.base for each in self.values())
        extra = sum(each.extra for each in self.values())
        rows.append(("in all", "", "", "", f"{base / 1e3:.0f}", f"{extra / base:.1%}" if base else "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip() for row in rows)


def plan_constant(net: nn.Module, skill: Skill, wanted: Wanted = None) -> Plan:
    """Best way to compute a skill, or a merge, that is the same for every input; the net is not changed.

    Args:
        net: the base's.
        skill: what is to go on it.
        wanted: a kind, or kinds by module, instead of what is best.

    Raises:
        ValueError: as `attach`; an unknown kind or module; or a module that cannot be done as wanted.

    """
    cannot, weights = unfoldable(net, skill), base_weights(net, skill)
    choices: dict[str, Choice] = {}
    for name in skill:
        dtype = weights[f"{name}.weight"].dtype
        if name in cannot:
            best: tuple[Kind, str] = ("factors", cannot[name].partition(",")[0])
        elif dtype.itemsize < 4:
            best = "factors", f"a sum in {str(dtype).removeprefix('torch.')} would be rounded"
        else:
            best = "merged", "the same for every input"
        out, inputs = skill.size(name)
        choices[name] = Choice(*best, (out, math.prod(inputs)), skill.ranks[name], 1)
    return _as_wanted(choices, wanted, {"merged": cannot, "per row": dict.fromkeys(skill, "has the same weights for every input")})


def plan_gated(net: nn.Module, mixture: Mixture, *, repeats: int = 1, passes: int = 1, memory: float = 2**30, wanted: Wanted = None) -> Plan:
    """Best way to compute what a gate weights for every input; the net is not changed.

    Args:
        net: with the mixture's stack on it.
        mixture: the mixture.
        repeats: rows of the net per row of weights: N samples times T denoise steps.
        passes: of the net that they are spread over: T; 0 where every token, or every layer, has weights of its own.
        memory: bytes that merged weights may take, of all modules together.
        wanted: as for `plan_constant`.

    Raises:
        ValueError: an unknown kind or module, or a module that cannot be done as wanted.

    """
    choices: dict[str, Choice] = {}
    slow: dict[str, str] = {}
    live, taken = factors(net), 0
    for name, adapted in adapted_layers(net).items():
        a, b = live[name]
        out, width, rank = len(b), a[0].numel(), len(a)
        merge, factored = 2 * out * width * rank, 2 * rank * (out + width) * repeats + START * passes
        size = out * width * a.element_size()
        if reason := why_not(adapted):
            best: tuple[Kind, str] = ("reference", reason)
            slow[name] = f"is computed with {reason}"
        elif not passes:
            best = "factors", "nothing shares its weights"
        elif merge >= factored:
            best = "factors", f"to merge costs {merge / 1e6:.3g} MFLOP, {repeats} rows in {passes} passes of factors {factored / 1e6:.3g}"
        elif taken + size > memory:
            best = "factors", f"merged weights would take more than {memory / 2**20:.0f} MiB"
        else:
            best = "per row", f"{repeats} rows in {passes} passes share their weights: {merge / 1e6:.3g} MFLOP, not {factored / 1e6:.3g}"
            taken += size
        choices[name] = Choice(*best, (out, width), rank, max(repeats, 1), max(passes, 1))
    return _as_wanted(choices, wanted, {"merged": dict.fromkeys(choices, "has weights that a gate changes"), "per row": slow, "factors": slow})


def carry_out(plan: Plan, net: nn.Module, what: Skill | Mixture) -> None:
    """Make a net compute as planned: put a skill on it, or let the mixture that is on it go another way."""
    if isinstance(what, Mixture):
        unfuse(net)
        fuse(net, what, merged=plan.of("per row"), leave=plan.of("reference"))
    else:
        detach(net)
        merged = plan.of("merged")
        if merged:
            fold(net, what.part(merged))
        if rest := [name for name in plan if name not in merged]:
            attach(net, what.part(rest))
            fuse(net, leave=plan.of("reference"))


def _as_wanted(choices: dict[str, Choice], wanted: Wanted, cannot: Mapping[Kind, Mapping[str, str]]) -> Plan:
    """Choices with what was asked for in their place."""
    asked = dict.fromkeys(choices, wanted) if isinstance(wanted, str) else dict(wanted or {})
    for name, kind in asked.items():
        if name not in choices:
            raise ValueError(f"the plan names the module {name!r}, the skills are on {list(choices)}")
        if kind not in get_args(Kind):
            raise ValueError(f"unknown plan {kind!r}: choose merged, per row, factors or reference")
        if reason := cannot.get(kind, {}).get(name):
            raise ValueError(f"module {name!r} cannot be planned as {kind!r}: it {reason}")
        choices[name] = replace(choices[name], kind=kind, reason="asked for")
    return Plan(choices)
