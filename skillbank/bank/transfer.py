"""Versions from bank to bank, with what they stand on and their aliases.

A version is whole before its card shows it, so that half a version is none there either; what is there already does not travel again, so that
an interrupted transfer goes on when it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skillbank.bank.aliases import ALIASES_FILE, Move, join, take, to_bytes
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.links import closure
from skillbank.bank.publish import arrive, same_version, temporary
from skillbank.bank.reader import BankReader
from skillbank.bank.refs import Ref
from skillbank.bank.remote import Remote, download

if TYPE_CHECKING:
    from skillbank.bank.store import Bank

__all__ = ["pull", "push"]

Done = Callable[[int, int], None]


def push(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Done) -> list[Ref]:
    """See `Bank.push`."""
    remote = Remote(url)
    there = BankReader(remote)
    wanted = _wanted(bank, refs)
    write = remote.writer()
    numbers = {name: there.versions(name) for name in dict.fromkeys(ref.name for ref in wanted)}
    theirs = {name: there.moves(name) for name in numbers}
    moves = {name: join(name, bank.moves(name), theirs[name]) for name in numbers}
    sent = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        if ref.number in numbers[ref.name]:
            same_version(ref, bank.place.card(ref), remote.card(ref))
            continue
        write(_files(bank, ref), str(ref))
        sent.append(ref)
    for name, each in moves.items():
        if each != theirs[name]:
            write({f"{name}/{ALIASES_FILE}": to_bytes(each)}, f"Aliases of {name}")
    done(len(wanted), len(wanted))
    return sent


def pull(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Done) -> list[Ref]:
    """See `Bank.pull`."""
    remote = Remote(url)
    there = BankReader(remote)
    wanted = _wanted(there, refs)
    theirs: dict[str, list[Move]] = {name: there.moves(name) for name in dict.fromkeys(ref.name for ref in wanted)}
    for name, moves in theirs.items():
        join(name, bank.moves(name), moves)
    got = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        if bank.place.has(ref):
            same_version(ref, bank.place.card(ref), remote.card(ref))
            continue
        with temporary(bank.root) as folder:
            download(remote, ref, folder)
            arrive(bank.root, folder, ref)
        got.append(ref)
    for name, moves in theirs.items():
        if moves:
            take(bank.root / name, name, moves)
    done(len(wanted), len(wanted))
    return got


def _wanted(bank: BankReader, refs: Sequence[str | Ref]) -> list[Ref]:
    """Versions, all where none is named, what they stand on, and what the aliases of their names point at: aliases travel as a whole."""
    found = closure(bank, refs)
    aliased = {Ref(name, number) for name in {ref.name for ref in found} for number in bank.aliases(name).values()}
    more = sorted((ref for ref in aliased - {*found} if bank.place.has(ref)), key=str)
    return _wanted(bank, [*found, *more]) if more else found


def _files(bank: Bank, ref: Ref) -> dict[str, Path | bytes]:
    """Files of a version by their paths in a bank, its card last."""
    folder = bank.place.folder(ref)
    names = sorted(Card.from_bytes(card := (folder / CARD_FILE).read_bytes()).files)
    return {**{f"{ref.name}/{ref.number}/{name}": folder / name for name in names}, f"{ref.name}/{ref.number}/{CARD_FILE}": card}
