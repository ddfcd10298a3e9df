"""What can be wrong in a bank, found and named: files, cards, links and base weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skillbank.bank.card import CARD_FILE, README_FILE, Card, content_hash
from skillbank.bank.layout import PARTIAL_FILE, TOMBSTONE_FILE
from skillbank.bank.links import Circle, order, recompute_fingerprint
from skillbank.bank.records import read_payload
from skillbank.bank.refs import Ref
from skillbank.bank.sealed import file_digest

if TYPE_CHECKING:
    from skillbank.bank.reader import BankReader

__all__ = ["Problem", "check_files", "check_links", "check_whole", "verify"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which version, in which file, what, and which versions stand on that version."""

    ref: str
    file: str
    what: str
    affects: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        return f"{self.ref}: {self.file} {self.what}" + (f" (affects {', '.join(self.affects)})" if self.affects else "")


def verify(bank: BankReader, ref: str | Ref | None, *, done: Callable[[int, int], None], workers: int | None) -> list[Problem]:
    """Every problem of one version and the aliases of its name, or of all versions and aliases; `done(so far, of)` after every version."""
    names = dict(bank.names())
    if ref is None:
        refs = [Ref(name, number) for name, numbers in names.items() for number in numbers]
        problems = [*_check_tombstones(bank), *_check_strays(bank)]
    else:
        refs, problems = [bank.resolve(ref)], []
        names = {refs[0].name: names[refs[0].name]}
    for name, numbers in names.items():
        problems += _check_aliases(bank, name, numbers)
    done(0, len(refs))
    with ThreadPoolExecutor(workers) as pool:  # hashing and reading let go of the interpreter's lock
        for count, found in enumerate(pool.map(lambda each: list(_check_version(bank, each)), refs), 1):
            problems += found if not found or bank.place.has(refs[count - 1]) else []  # it may have been removed meanwhile
            done(count, len(refs))
    problems += _check_circle(bank, refs)
    return _with_affected(bank, problems) if problems else []


def _with_affected(bank: BankReader, problems: list[Problem]) -> list[Problem]:
    """The same problems with every version that stands on a wrong one, directly or not."""
    above: dict[str, list[str]] = {}
    for name, numbers in bank.names():
        for each in (Ref(name, number) for number in numbers):
            try:
                card = bank.card(each)
            except (ValueError, KeyError):
                continue
            for link in card.stands_on:
                above.setdefault(link, []).append(str(each))

    def all_above(ref: str) -> tuple[str, ...]:
        seen: set[str] = set()
        waiting = [ref]
        while waiting:
            new = set(above.get(waiting.pop(), ())) - seen
            seen |= new
            waiting += new
        return tuple(sorted(seen))

    return [replace(problem, affects=all_above(problem.ref)) for problem in problems]


def check_files(folder: Path, ref: Ref, card: Card, *, trusted: bool = False) -> Iterator[Problem]:
    """Files that are missing, strange, or not what the card says; where they are `trusted`, their bytes are not read."""
    present = {entry.name: entry for entry in os.scandir(folder)}
    for name in sorted(set(present) - set(card.files) - {CARD_FILE, PARTIAL_FILE}):
        yield Problem(str(ref), name, "is not in the card: take it out of the folder")
    for name, entry in sorted(card.files.items()):
        if name not in present:
            yield Problem(str(ref), name, "is missing")
        elif not present[name].is_file(follow_symlinks=False):
            yield Problem(str(ref), name, "is no plain file")
        elif present[name].stat().st_size != entry["size"]:
            yield Problem(str(ref), name, f"has {present[name].stat().st_size} bytes, its card says {entry['size']}")
        elif not trusted and file_digest(folder / name) != entry["sha256"]:
            yield Problem(str(ref), name, "does not match the hash in its card: it was changed after it was written")
    if content_hash(card.files) != card.hash:
        yield Problem(str(ref), CARD_FILE, "has a content hash that its own files do not give")


def check_whole(bank: BankReader, ref: Ref) -> None:
    """Check every file of a version that is to go elsewhere; a ValueError names the first that is wrong."""
    if problem := next(check_files(bank.path(ref), ref, bank.card(ref), trusted=bank.place.trusted(ref)), None):
        raise ValueError(f"{problem}: it was left where it is; restore it from a copy")


def check_links(bank: BankReader, ref: Ref, card: Card, *, missing: bool = True) -> Iterator[Problem]:
    """Base and parents that have another content than the card says or, where `missing`, that are gone."""
    for count, (text, content) in enumerate(card.links):
        role = "base" if count == 0 and card.base is not None and card.base["ref"] is not None else "parent"
        try:
            found = bank.card(text).hash
        except KeyError:
            if missing:
                yield Problem(str(ref), CARD_FILE, f"names the {role} {text!r}, which is not in the bank")
            continue
        except ValueError as error:
            yield Problem(str(ref), CARD_FILE, f"names the {role} {text!r}, which is damaged ({error})")
            continue
        if found != content:
            yield Problem(str(ref), CARD_FILE, f"names the {role} {text!r} with content {content[:12]}, but the bank has {found[:12]} there")


def _check_version(bank: BankReader, ref: Ref) -> Iterator[Problem]:
    try:
        card = bank.card(ref)
    except ValueError as error:
        yield Problem(str(ref), CARD_FILE, str(error).removeprefix(f"{ref}: {CARD_FILE} "))
        return
    except KeyError:  # removed since the bank was listed
        return
    try:
        problems = list(check_files(bank.path(ref), ref, card))
    except KeyError:
        return
    except (ValueError, FileNotFoundError) as error:  # of a bank elsewhere, where a file is missing or not what the card says
        yield Problem(str(ref), CARD_FILE, f"names files that cannot be had: {error}")
        return
    yield from problems
    yield from check_links(bank, ref, card)
    if not problems:
        yield from _check_content(bank, ref, card)


def _check_content(bank: BankReader, ref: Ref, card: Card) -> Iterator[Problem]:
    """Read what intact files hold, and compare the base's weights with the fingerprint."""
    try:
        read_payload(card.kind, bank.path(ref), links=card.links)
    except (ValueError, KeyError, OSError) as error:
        yield Problem(str(ref), min(set(card.files) - {README_FILE}, default=CARD_FILE), f"cannot be read: {error}")
        return
    if card.base is None or card.base["ref"] is None:
        return
    base, expected = card.base["ref"], str(card.base["fingerprint"])
    try:
        found = recompute_fingerprint(bank, ref, card)
    except KeyError:
        return  # a link to nothing, which check_links names
    except (ValueError, OSError) as error:
        yield Problem(str(ref), CARD_FILE, f"cannot be compared with its base {base!r}: {error}")
        return
    if found != expected:
        yield Problem(str(ref), CARD_FILE, f"fits a base with fingerprint {expected[:12]}, but {base!r} has {found[:12]}")


def _check_circle(bank: BankReader, refs: Iterable[Ref]) -> Iterator[Problem]:
    def stands_on(ref: str) -> tuple[str, ...]:
        try:
            return bank.card(ref).stands_on
        except (ValueError, KeyError):
            return ()

    try:
        order(refs, stands_on)
    except Circle as error:
        yield Problem(error.refs[0], CARD_FILE, str(error).partition(" ")[2])


def _check_strays(bank: BankReader) -> Iterator[Problem]:
    return (Problem(name or str(bank.place), file, what) for name, file, what in bank.place.strays())


def _check_tombstones(bank: BankReader) -> Iterator[Problem]:
    for ref in bank.place.tombstones():
        try:
            bank.place.tombstone(ref)
        except ValueError as error:
            yield Problem(str(ref), TOMBSTONE_FILE, str(error))


def _check_aliases(bank: BankReader, name: str, numbers: list[int]) -> Iterator[Problem]:
    try:
        aliases = bank.aliases(name)
    except ValueError as error:
        yield Problem(name, "aliases.json", str(error).removeprefix(f"{name}: aliases.json "))
        return
    for alias, number in aliases.items():
        if number not in numbers and not bank.place.has(Ref(name, number)):
            yield Problem(name, "aliases.json", f"points {alias!r} at version {number}, which is not in the bank")
