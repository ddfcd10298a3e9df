"""Many compositions of one base in one batch: every row by a version of its own, in as few passes of the net as the slots allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.bank import Bank, Base, Checkpoint, Composition
from skillbank.gate import Routes
from skillbank.load import build, build_base, check_base
from skillbank.merge import merge
from skillbank.mixture import every_pass
from skillbank.model import Batch
from skillbank.runtime.compiled import Compiled
from skillbank.runtime.residents import Residents
from skillbank.runtime.slots import Slots
from skillbank.runtime.streams import Streams
from skillbank.skill import Skill

__all__ = ["Server"]


@dataclass(frozen=True, eq=False)
class _Recipe:
    """Skills by name, and their weights, or the gate that gives them."""

    skills: tuple[str, ...]
    weights: Tensor | nn.Module


class Server:
    """Predictions of any versions on one base.

    Skills are fetched from the bank when they are first asked for and stay in slots until others need the room. A merge that is a weighted sum is
    its skills with their weights, any other is a skill of its own.

    Args:
        base: reference of the base.
        bank: where the versions are.
        slots: skills on the device at once.
        rank: largest rank of a skill.
        rows: largest number of rows in one pass of the net.
        device: where to predict.
        compile: predictions through torch.compile; one compilation per number of rows and of skills per row.

    Raises:
        UnknownRef: the bank has no such version.
        ValueError: it is no base.

    """

    def __init__(
        self,
        base: str,
        bank: Bank | str | Path = "adapters",
        *,
        slots: int = 64,
        rank: int = 64,
        rows: int = 1024,
        device: str | torch.device = "cpu",
        compile: bool = False,
    ) -> None:
        self.bank = bank if isinstance(bank, Bank) else Bank(bank)
        self.base, self.rows = str(self.bank.resolve(base)), rows
        thing = self.bank.get(self.base)
        if not isinstance(thing, Base | Checkpoint):
            raise ValueError(f"{base!r} is a {self.bank.card(self.base).kind}, a server needs a base")
        self.model = build_base(thing).to(device).eval().requires_grad_(False)
        self.slots = Slots(self.model.net, slots, rank=rank)
        self.residents = Residents(self.slots, self._fetch)
        self._answer = Compiled(self.model) if compile else self.model
        self._recipes: dict[str, _Recipe] = {}

    @torch.no_grad()
    def predict(self, batch: Batch, refs: Sequence[str], *, seeds: Sequence[int] | None = None, **options: Any) -> Tensor:
        """Predictions (B, ...), row i by version `refs[i]`: what `load(refs[i]).predict` gives for that row, to rounding.

        Args:
            batch: of the model, B rows.
            refs: B; skills and compositions on the base, or the base itself.
            seeds: B; with them, whatever is drawn at random for a row is what `torch.manual_seed(seeds[i])` gives it alone.
            options: of the model's `predict`.

        Raises:
            UnknownRef: the bank has no such version.
            ValueError: another number of references or seeds than of rows, a version on another base, more skills in one row than there are slots,
                a larger rank than theirs, or a gate that weights tokens or layers, or sees something else than the base's context.

        """
        rows = len(next(iter(batch.values())))
        if len(refs) != rows or (seeds is not None and len(seeds) != rows):
            raise ValueError(f"got {rows} rows, {len(refs)} references and {len(seeds or refs)} seeds: give one of each per row")
        found: list[tuple[Tensor, Tensor]] = []
        for some, recipes in self._passes([self._recipe(ref) for ref in refs]):
            index = torch.tensor(some)
            part = {key: value[index.to(value.device)] for key, value in batch.items()}
            repeats = (options.get("samples") or 1) * getattr(self.model, "repeats", 1)
            self.slots.cell.mix(self._routes(part, recipes), repeats)
            with nullcontext() if seeds is None else Streams([seeds[i] for i in some], len(some) * repeats):
                found.append((index, self._answer.predict(part, **options)))
        order = torch.cat([index for index, _ in found]).argsort()
        return torch.cat([prediction for _, prediction in found])[order.to(found[0][1].device)]

    def _passes(self, recipes: Sequence[_Recipe]) -> Iterator[tuple[list[int], list[_Recipe]]]:
        """Rows in groups whose skills are resident at once; rows of the same version stay together where they can."""
        order = sorted(range(len(recipes)), key=lambda i: recipes[i].skills)
        some: list[int] = []
        names: set[str] = set()
        for i in order:
            more = names | set(recipes[i].skills)
            if some and (len(more) > self.slots.count or len(some) == self.rows):
                yield some, [recipes[j] for j in some]
                some, more = [], set(recipes[i].skills)
            some, names = [*some, i], more
        yield some, [recipes[j] for j in some]

    def _routes(self, batch: Batch, recipes: Sequence[_Recipe]) -> Routes:
        """Slots and weights for every row, those with fewer skills filled up with weights of 0."""
        places = self.residents.place(name for recipe in recipes for name in recipe.skills)
        device = self.slots.a[0].device
        most = max(1, *(len(recipe.skills) for recipe in recipes))
        index = torch.zeros(len(recipes), most, dtype=torch.long)
        weights = torch.zeros(len(recipes), most, device=device)
        for i, recipe in enumerate(recipes):
            index[i, : len(recipe.skills)] = torch.tensor([places[name] for name in recipe.skills], dtype=torch.long)
        for recipe in dict.fromkeys(recipes):
            if not recipe.skills:
                continue
            rows = torch.tensor([i for i, other in enumerate(recipes) if other is recipe], device=device)
            given = recipe.weights
            if isinstance(given, nn.Module):
                given = given(self.model.context({key: value[rows.to(value.device)] for key, value in batch.items()}))
                if isinstance(given, Routes):
                    given = given.dense(len(recipe.skills))
                if given.dim() > 2:
                    raise ValueError("a gate that weights tokens cannot share a batch with others: load its version by itself")
            weights[rows, : len(recipe.skills)] = given.to(weights)
        return Routes(index.to(device), weights)

    def _recipe(self, ref: str) -> _Recipe:
        """Of a version, the same object for the same version."""
        exact = str(self.bank.resolve(ref))
        if exact not in self._recipes:
            self._recipes[exact] = self._read(exact)
        return self._recipes[exact]

    def _read(self, exact: str) -> _Recipe:
        thing = self.bank.get(exact)
        if exact == self.base:
            return _Recipe((), torch.zeros(0))
        if isinstance(thing, Skill):
            check_base(self.bank, exact, self.model.net)
            return _Recipe((exact,), torch.ones(1))
        if not isinstance(thing, Composition) or str(self.bank.resolve(thing.base)) != self.base:
            raise ValueError(f"{exact!r} is no skill or composition on the base {self.base!r}: give it a server of its own")
        for skill in thing.skills:
            check_base(self.bank, skill, self.model.net)
        names = tuple(str(self.bank.resolve(skill)) for skill in thing.skills)
        if thing.gate is not None:
            gate = build(thing.gate)
            gate.load_state_dict(thing.tensors)
            view = getattr(gate, "view", {})
            if every_pass(self.model, gate) or any(getattr(self.model, key, None) != value for key, value in view.items()):
                what = f"sees {view}" if view else "weights every token or layer by itself"
                raise ValueError(f"the gate of {exact!r} {what}, so its rows cannot share a batch with others: load this version by itself")
            return _Recipe(names, gate.to(self.slots.a[0].device).eval().requires_grad_(False))
        assert thing.merge is not None
        if set(thing.merge) <= {"method", "weights"} and thing.merge.get("method", "stack") == "stack":
            return _Recipe(names, torch.tensor(thing.merge.get("weights") or [1 / len(names)] * len(names)))
        return _Recipe((exact,), torch.ones(1))

    def _fetch(self, name: str) -> Skill:
        thing = self.bank.get(name)
        if isinstance(thing, Skill):
            return thing
        assert isinstance(thing, Composition)
        assert thing.merge is not None
        return merge([cast("Skill", self.bank.get(ref)) for ref in thing.skills], **thing.merge)
