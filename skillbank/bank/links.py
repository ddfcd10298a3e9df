"""Links between versions: the base and the parents of what is put, resolved to exact references and hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from skillbank.bank.card import BaseLink, Card, Parent
from skillbank.bank.records import Composition, Thing, kind_of, read_payload, stored_fingerprint
from skillbank.bank.refs import Ref

if TYPE_CHECKING:
    from skillbank.bank.reader import BankReader

__all__ = ["Circle", "closure", "common_base", "lineage", "links", "order", "recompute_fingerprint"]


class Circle(ValueError):  # noqa: N818
    """A version stands on itself, which only a forged card can say.

    Args:
        refs: the way from it back to it.

    """

    def __init__(self, refs: Sequence[str]) -> None:
        super().__init__(f"{refs[0]} stands on itself ({' on '.join(refs)}): one of their cards is forged, take it away")
        self.refs = refs


def links(bank: BankReader, thing: Thing, base: Any, parents: Iterable[Any]) -> tuple[Thing, BaseLink | None, tuple[Parent, ...]]:
    """Exact base and parents of `thing`, and `thing` itself with exact references where it is a composition.

    Args:
        bank: where the references are looked up.
        thing: what is put.
        base: a reference or `{"ref", "fingerprint"}`, `{"name", "fingerprint"}` of a base outside the bank, or None.
        parents: references, or `{"ref", "weight"}`.

    """
    if isinstance(thing, Composition):
        return _composition_links(bank, thing, base, parents)
    linked = tuple(_parent(bank, parent) for parent in parents)
    if base is None:
        return thing, None, linked
    if kind_of(thing) == "base":
        raise ValueError(f"a base has no base of its own, got base={base!r}: name what it was made from in parents")
    if isinstance(base, Mapping) and "ref" not in base:
        if not isinstance(base.get("name"), str) or set(base) - {"name", "fingerprint"}:
            raise ValueError(f"base={dict(base)!r}: give 'ref' for a base in the bank, 'name' for one elsewhere, and its 'fingerprint'")
        return thing, BaseLink(ref=None, hash=None, name=base["name"], fingerprint=base.get("fingerprint")), linked
    return thing, _base_link(bank, base, set(thing)), linked  # type: ignore[arg-type]


def common_base(bank: BankReader, refs: Iterable[str | Ref]) -> Ref:
    """Exact reference of the base that all these skills and compositions share; a base is its own.

    Raises:
        ValueError: no references, one without a base in the bank, or several bases.

    """
    found: dict[str, str] = {}
    for ref in map(bank.resolve, refs):
        card = bank.card(ref)
        base = str(ref) if card.kind == "base" else card.base and card.base["ref"]
        if not base:
            raise ValueError(f"{str(ref)!r} names no base in {bank}: put it with base=... in its card")
        found[str(ref)] = base
    if len(set(found.values())) != 1:
        raise ValueError(f"one common base is needed, got {found or 'no references'}")
    return Ref.parse(next(iter(found.values())))


def order(refs: Iterable[str | Ref], stands_on: Callable[[str], Iterable[str]]) -> list[str]:
    """Exact references and all that they stand on, which comes first.

    Raises:
        Circle: a version stands on itself.

    """
    graph: dict[str, tuple[str, ...]] = {}
    waiting = [str(ref) for ref in refs][::-1]
    while waiting:
        ref = waiting.pop()
        if ref not in graph:
            graph[ref] = tuple(stands_on(ref))
            waiting += reversed(graph[ref])
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise Circle(error.args[1]) from None


def lineage(bank: BankReader, ref: str | Ref) -> dict[str, Any]:
    """Where a version comes from, see `Bank.lineage`."""
    exact = str(bank.resolve(ref))
    cards: dict[str, Card] = {}

    def stands_on(ref: str) -> tuple[str, ...]:
        cards[ref] = bank.card(ref)
        return cards[ref].stands_on

    def tree(ref: str, weight: float | None = None) -> dict[str, Any]:
        card = cards[ref]
        base = None if card.base is None or card.base["ref"] is None else tree(card.base["ref"])
        parents = [tree(parent["ref"], parent["weight"]) for parent in card.parents]
        return {"ref": ref, "kind": card.kind, "hash": card.hash, "weight": weight, "base": base, "parents": parents}

    order([exact], stands_on)
    return tree(exact)


def closure(bank: BankReader, refs: Sequence[str | Ref]) -> list[Ref]:
    """Versions, all where none is named, and everything that they stand on, which comes first."""
    wanted = [bank.resolve(ref) for ref in refs or [Ref(name, number) for name, numbers in bank.names() for number in numbers]]
    return [Ref.parse(ref) for ref in order(wanted, lambda ref: bank.card(ref).stands_on)]


def recompute_fingerprint(bank: BankReader, ref: Ref, card: Card) -> str:
    """Fingerprint of the stored base over the modules that a skill, or the skills of a composition, touch."""
    if card.base is None or card.base["ref"] is None:
        raise ValueError(f"{ref} has no base in {bank}")
    holders = [str(ref)] if card.kind == "skill" else [parent["ref"] for parent in card.parents]
    modules = {module for holder in holders for module in _modules(bank, holder)}
    return stored_fingerprint(bank.path(card.base["ref"]), modules)


def _composition_links(bank: BankReader, thing: Composition, base: Any, parents: Iterable[Any]) -> tuple[Composition, BaseLink, tuple[Parent, ...]]:
    if base is not None or tuple(parents):
        raise ValueError("a composition has its own base and skills: leave base and parents out of its card")
    exact = Composition(
        str(bank.resolve(thing.base)), tuple(str(bank.resolve(skill)) for skill in thing.skills), thing.merge, thing.gate, thing.tensors
    )
    weights: Sequence[float | None] = exact.weights or [None] * len(exact.skills)
    linked = tuple(_parent(bank, {"ref": skill, "weight": weight}, "skill") for skill, weight in zip(exact.skills, weights, strict=True))
    return exact, _base_link(bank, exact.base, {module for skill in exact.skills for module in _modules(bank, skill)}), linked


def _parent(bank: BankReader, parent: Any, kind: str | None = None) -> Parent:
    entry = parent if isinstance(parent, Mapping) else {"ref": parent}
    if "ref" not in entry or set(entry) - {"ref", "hash", "weight"}:
        raise ValueError(f"parent {dict(entry)!r}: give a reference, or 'ref' with 'weight' and 'hash'")
    ref, weight = bank.resolve(entry["ref"]), entry.get("weight")
    card = bank.card(ref)
    if kind is not None and card.kind != kind:
        raise ValueError(f"{str(ref)!r} is a {card.kind}, a {kind} is needed here")
    if entry.get("hash", card.hash) != card.hash:
        raise ValueError(f"{str(ref)!r} has content {card.hash[:12]}, not {entry['hash'][:12]}: name the version that was used")
    if weight is not None and not isinstance(weight, int | float):
        raise ValueError(f"weight {weight!r} of {str(ref)!r} is no number")
    return Parent(ref=str(ref), hash=card.hash, weight=weight)


def _base_link(bank: BankReader, base: Any, modules: set[str]) -> BaseLink:
    entry = base if isinstance(base, Mapping) else {"ref": base}
    found = _parent(bank, {key: value for key, value in entry.items() if key in ("ref", "hash") and value is not None}, "base")
    fingerprint = stored_fingerprint(bank.path(found["ref"]), modules)
    if entry.get("fingerprint") not in (None, fingerprint):
        raise ValueError(
            f"the base has fingerprint {entry['fingerprint'][:12]}, {found['ref']!r} in the bank has {fingerprint[:12]}: the skill was made on "
            "other weights than the bank holds"
        )
    return BaseLink(ref=found["ref"], hash=found["hash"], name=None, fingerprint=fingerprint)


def _modules(bank: BankReader, ref: str) -> set[str]:
    return set(read_payload("skill", bank.path(ref)))  # type: ignore[arg-type]
