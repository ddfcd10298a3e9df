"""Versions from bank to bank, with what they stand on and their aliases.

The card of a version is written last, so that half a version is none there either; what is there already does not travel again, so that an
interrupted transfer goes on when it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from skillbank.bank.aliases import ALIASES_FILE, Move, join, take, to_bytes
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.layout import PARTIAL_FILE
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
    wanted = closure(bank, refs)
    numbers = {name: there.versions(name) if remote.exists() else [] for name in dict.fromkeys(ref.name for ref in wanted)}
    moves = {name: join(name, bank.moves(name), there.moves(name)) for name in numbers}
    sent = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        if ref.number in numbers[ref.name]:
            same_version(ref, bank.place.card(ref), remote.card(ref))
            continue
        _send(bank, remote, ref)
        sent.append(ref)
    for name, each in moves.items():
        if each and each != there.moves(name):
            remote.write(to_bytes(each), name, ALIASES_FILE)
    done(len(wanted), len(wanted))
    return sent


def pull(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Done) -> list[Ref]:
    """See `Bank.pull`."""
    remote = Remote(url)
    there = BankReader(remote)
    wanted = closure(there, refs)
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


def _send(bank: Bank, remote: Remote, ref: Ref) -> None:
    folder, there = bank.place.folder(ref), (ref.name, str(ref.number))
    card = (folder / CARD_FILE).read_bytes()
    remote.files.makedirs(remote.path(*there), exist_ok=True)
    remote.files.pipe_file(remote.path(*there, PARTIAL_FILE), b"")
    for name in sorted(Card.from_bytes(card).files):
        remote.files.put_file(str(folder / name), remote.path(*there, name))
        remote.flush(*there, name)
    remote.flush(*there)
    remote.write(card, *there, CARD_FILE)
    remote.files.rm_file(remote.path(*there, PARTIAL_FILE))
    for count in range(len(there), -1, -1):
        remote.flush(*there[:count])
