"""Versions from bank to bank: to and from any place that fsspec can write to, such as a folder, `s3://`, `gs://` or `memory://`.

A remote bank has the same folders and files. The card of a version is written last, so that half a version is none there either; what is there
already does not travel again, so that an interrupted transfer goes on when it is started again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from skillbank.bank.aliases import ALIASES_FILE, Move, join, parse_moves, table, take, to_bytes
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.publish import PARTIAL_FILE, TEMPORARY, arrive, same_version, temporary
from skillbank.bank.refs import Ref, UnknownRef, parse_version
from skillbank.bank.sealed import write_new
from skillbank.words import did_you_mean

if TYPE_CHECKING:
    from skillbank.bank.store import Bank

__all__ = ["Remote", "pull", "push"]

_CHUNK = 2**22


class Remote:
    """A bank elsewhere.

    Args:
        url: a URL that fsspec knows, or a path.

    Raises:
        ValueError: a protocol that fsspec does not know, or whose package is not installed.

    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.url = url
        try:
            self.files, self.root = url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"{url!r} needs a package that is not installed: {error}") from None
        self.root = self.root.rstrip("/")

    @cached_property
    def versions(self) -> dict[str, list[int]]:
        """Complete versions by name, as they were when this was first asked."""
        found: dict[str, list[int]] = {}
        for path in self.files.find(self.root) if self.files.exists(self.root) else ():
            *name, number, file = path.removeprefix(self.root).strip("/").split("/")
            if file == CARD_FILE and name and (version := parse_version(number)) is not None and not any(part.startswith(".") for part in name):
                found.setdefault("/".join(name), []).append(version)
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def read(self, *parts: str) -> bytes:
        """Bytes of a file."""
        data: bytes = self.files.cat_file(self.path(*parts))
        return data

    def write(self, data: bytes, *parts: str) -> None:
        """Write a file beside and move it to its place, so that it is whole wherever moving is atomic."""
        beside = self.path(f"{TEMPORARY}{uuid.uuid4().hex}")
        self.files.pipe_file(beside, data)
        self.files.mv(beside, self.path(*parts))

    def path(self, *parts: str) -> str:
        """Path of a file."""
        return "/".join((self.root, *parts))

    def card(self, ref: Ref) -> Card:
        """Card of a version."""
        try:
            return Card.from_bytes(self.read(ref.name, str(ref.number), CARD_FILE))
        except ValueError as error:
            raise ValueError(f"{self.url}: {ref}: {CARD_FILE} {error}") from None

    def moves(self, name: str) -> list[Move]:
        """Moves of the aliases of a name."""
        if not self.files.exists(self.path(name, ALIASES_FILE)):
            return []
        try:
            return parse_moves(self.read(name, ALIASES_FILE))
        except ValueError as error:
            raise ValueError(f"{self.url}: {name}: {ALIASES_FILE} {error}") from None

    def resolve(self, ref: str | Ref) -> Ref:
        """Return the exact reference that a name, a version or an alias means there; an UnknownRef says what is close."""
        ref = Ref.parse(ref)
        numbers = self.versions.get(ref.name, [])
        if not numbers:
            raise UnknownRef(f"no {ref.name!r} at {self.url}: {did_you_mean(ref.name, self.versions)}")
        version: int | str | None = numbers[-1] if ref.version is None else ref.version
        if isinstance(version, str):
            aliases = {alias: each.version for alias, each in table(self.moves(ref.name)).items()}
            if aliases.get(version) is None:
                raise UnknownRef(f"{ref.name!r} has no alias {version!r} at {self.url}: {did_you_mean(version, aliases)}")
            version = aliases[version]
        if version not in numbers:
            raise UnknownRef(f"{ref.name!r} has no version {version} at {self.url}: there is {', '.join(map(str, numbers))}")
        return Ref(ref.name, version)


def push(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Callable[[int, int], None]) -> list[Ref]:
    """See `Bank.push`."""
    remote = Remote(url)
    wanted = _closure(refs or [Ref(name, number) for name, numbers in bank.names() for number in numbers], bank.resolve, bank.card)
    moves = {name: join(name, bank.moves(name), remote.moves(name)) for name in dict.fromkeys(ref.name for ref in wanted)}
    sent = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        folder, there = bank.path(ref), (ref.name, str(ref.number))
        card = (folder / CARD_FILE).read_bytes()
        if ref.number in remote.versions.get(ref.name, ()):
            same_version(ref, card, remote.read(*there, CARD_FILE))
            continue
        remote.files.makedirs(remote.path(*there), exist_ok=True)
        remote.files.pipe_file(remote.path(*there, PARTIAL_FILE), b"")
        for name in sorted(Card.from_bytes(card).files):
            remote.files.put_file(str(folder / name), remote.path(*there, name))
        remote.write(card, *there, CARD_FILE)
        remote.files.rm_file(remote.path(*there, PARTIAL_FILE))
        sent.append(ref)
    for name, each in moves.items():
        if each and each != remote.moves(name):
            remote.write(to_bytes(each), name, ALIASES_FILE)
    done(len(wanted), len(wanted))
    return sent


def pull(bank: Bank, url: str, refs: Sequence[str | Ref] = (), *, done: Callable[[int, int], None]) -> list[Ref]:
    """See `Bank.pull`."""
    remote = Remote(url)
    wanted = _closure(refs or [Ref(name, number) for name, numbers in remote.versions.items() for number in numbers], remote.resolve, remote.card)
    theirs = {name: remote.moves(name) for name in dict.fromkeys(ref.name for ref in wanted)}
    for name, moves in theirs.items():
        join(name, bank.moves(name), moves)
    got = []
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        if ref.number in bank.versions(ref.name):
            same_version(ref, (bank.path(ref) / CARD_FILE).read_bytes(), remote.read(ref.name, str(ref.number), CARD_FILE))
            continue
        with temporary(bank.root) as folder:
            card = remote.read(ref.name, str(ref.number), CARD_FILE)
            for name, entry in sorted(Card.from_bytes(card).files.items()):
                _download(remote, ref, name, folder / name, entry["sha256"])
            write_new(folder / CARD_FILE, card)
            arrive(bank, folder, ref)
        got.append(ref)
    for name, moves in theirs.items():
        if moves:
            take(bank.root / name, name, moves)
    done(len(wanted), len(wanted))
    return got


def _closure(refs: Iterable[str | Ref], resolve: Callable[[str | Ref], Ref], card: Callable[[Ref], Card]) -> list[Ref]:
    """Versions and everything that they stand on, which comes first."""
    order: dict[Ref, None] = {}

    def visit(ref: Ref) -> None:
        if ref in order:
            return
        for link in card(ref).stands_on:
            visit(Ref.parse(link))
        order[ref] = None

    for ref in refs:
        visit(resolve(ref))
    return list(order)


def _download(remote: Remote, ref: Ref, name: str, target: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with remote.files.open(remote.path(ref.name, str(ref.number), name), "rb") as source, target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"{remote.url}: {ref}: {name} did not arrive as its card says: it was changed there or on the way; nothing of it was stored")
