"""Versions from bank to bank, with what they stand on and their aliases.

A version is whole before its card shows it, so that half a version is none there either; what is there already does not travel again, so that
an interrupted transfer goes on when it is started again. What appears meanwhile is never written over in a folder, where versions are renamed to
their place, and on the Hub; elsewhere it is looked for again right before each write.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skillbank.bank.aliases import ALIASES_FILE, Move, join, take, to_bytes
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.folder import Folder
from skillbank.bank.links import closure
from skillbank.bank.publish import arrive, same_version, temporary
from skillbank.bank.reader import BankReader
from skillbank.bank.refs import Ref
from skillbank.bank.remote import Remote, download
from skillbank.bank.verify import check_whole

if TYPE_CHECKING:
    from skillbank.bank.store import Bank

__all__ = ["pull", "push"]

Done = Callable[[int, int], None]


def push(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Done) -> list[Ref]:
    """See `Bank.push`."""
    remote = Remote(url)
    home = remote.home
    there = BankReader(remote if home is None else Folder(home))
    wanted = _wanted(bank, refs)
    write = remote.writer()
    numbers = {name: there.versions(name) for name in dict.fromkeys(ref.name for ref in wanted)}
    theirs = {name: there.moves(name) for name in numbers}
    moves = {name: join(name, bank.moves(name), theirs[name]) for name in numbers}
    sent = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        if ref.number not in numbers[ref.name]:
            remote.files.invalidate_cache()  # somebody may have put it there meanwhile
        if (ref.number in numbers[ref.name] or there.place.has(ref)) and (card := _card(there, ref)) is not None:
            same_version(ref, bank.place.card(ref), card)
            continue
        _check_removed(there, ref)
        check_whole(bank, ref)
        if home is None:
            write(_files(bank, ref), str(ref))
        else:
            _copy(bank, ref, home)
        sent.append(ref)
    for name, each in moves.items():
        if each == theirs[name]:
            continue
        if home is not None:
            take(home / name, partial(join, name, bank.moves(name)))
        elif (joined := join(name, bank.moves(name), now := there.moves(name))) != now:
            write({f"{name}/{ALIASES_FILE}": to_bytes(joined)}, f"Aliases of {name}")
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
        if bank.place.has(ref) and (card := _card(bank, ref)) is not None:
            same_version(ref, card, remote.card(ref))
            continue
        _check_removed(bank, ref)
        with temporary(bank.root) as folder:
            download(remote, ref, folder)
            arrive(bank.root, folder, ref)
        got.append(ref)
    for name, moves in theirs.items():
        if moves:
            take(bank.root / name, partial(join, name, theirs=moves))
    done(len(wanted), len(wanted))
    return got


def _wanted(bank: BankReader, refs: Sequence[str | Ref]) -> list[Ref]:
    """Versions, all where none is named, what they stand on, and what the aliases of their names point at: aliases travel as a whole."""
    found = closure(bank, refs)
    aliased = {Ref(name, number) for name in {ref.name for ref in found} for number in bank.aliases(name).values()}
    more = sorted((ref for ref in aliased - {*found} if bank.place.has(ref)), key=str)
    return _wanted(bank, [*found, *more]) if more else found


def _card(bank: BankReader, ref: Ref) -> bytes | None:
    """Bytes of a card, None where a version has lost it."""
    try:
        return bank.place.card(ref)
    except FileNotFoundError:
        return None


def _check_removed(bank: BankReader, ref: Ref) -> None:
    """Check that a version was not removed from the bank that it is to go to."""
    if said := bank.removed(ref):
        raise ValueError(f"{said}; its number is not used again in {bank}: name what else is to go there, or put it under another name")


def _copy(bank: Bank, ref: Ref, home: Path) -> None:
    """Copy a version to a bank in another folder."""
    with temporary(home) as folder:
        for path, data in _files(bank, ref).items():
            target = folder / path.rpartition("/")[2]
            target.write_bytes(data) if isinstance(data, bytes) else shutil.copyfile(data, target)
        arrive(home, folder, ref)


def _files(bank: Bank, ref: Ref) -> dict[str, Path | bytes]:
    """Files of a version by their paths in a bank, its card last."""
    folder = bank.place.folder(ref)
    names = sorted(Card.from_bytes(card := (folder / CARD_FILE).read_bytes()).files)
    return {**{f"{ref.name}/{ref.number}/{name}": folder / name for name in names}, f"{ref.name}/{ref.number}/{CARD_FILE}": card}
