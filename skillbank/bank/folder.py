"""A bank in a folder of this machine: `<root>/<name>/<version>/` holds one version, `<root>/<name>/aliases.json` the aliases of a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from skillbank.bank.aliases import Move, read_moves
from skillbank.bank.card import CARD_FILE
from skillbank.bank.index import Entry, entries, trust, trusted, with_content
from skillbank.bank.layout import TOMBSTONE_FILE, below, is_linked, is_version, numbers, scan, strays
from skillbank.bank.refs import Ref, is_name, parse_version
from skillbank.bank.removal import tombstone
from skillbank.bank.sealed import read_plain

__all__ = ["Folder", "Place"]


class Place(Protocol):
    """Where a bank is, as its readers see it."""

    def names(self) -> Iterator[tuple[str, list[int]]]:
        """Every name with its versions, both in order; a FileNotFoundError where there is no bank."""
        ...

    def versions(self, name: str) -> list[int]:
        """Version numbers of a name, ascending."""
        ...

    def newest(self, name: str) -> int | None:
        """Highest version number of a name, None where there is no version."""
        ...

    def has(self, ref: Ref) -> bool:
        """Whether an exact reference is a version."""
        ...

    def entries(self, *, cards: bool = False) -> list[Entry]:
        """Every version, by name and number, with the bytes of the cards or without; a FileNotFoundError where there is no bank."""
        ...

    def with_content(self, prefix: str, name: str = "") -> list[Entry]:
        """Versions, of a name or of all, whose content hash begins so."""
        ...

    def card(self, ref: Ref) -> bytes:
        """Bytes of a card; a FileNotFoundError without one."""
        ...

    def moves(self, name: str) -> list[Move]:
        """Moves of the aliases of a name, oldest first; a ValueError where their file is damaged."""
        ...

    def tombstone(self, ref: Ref) -> dict[str, Any] | None:
        """What a removed version left, None where none was."""
        ...

    def tombstones(self) -> list[Ref]:
        """Versions that were removed."""
        ...

    def strays(self) -> list[tuple[str, str, str]]:
        """What looks like versions or names and is neither: the name that it lies under, what it is called, and why."""
        ...

    def folder(self, ref: Ref) -> Path:
        """Folder of a version on this machine."""
        ...

    def trusted(self, ref: Ref) -> bool:
        """Whether a version was found whole before, and none of its files in that folder looks otherwise since."""
        ...

    def trust(self, ref: Ref) -> None:
        """Remember that a version was found whole."""
        ...


class Folder:
    """A bank in a folder.

    Args:
        root: the folder; made by the first `put`. `~` is expanded.

    Raises:
        ValueError: the path is a file.

    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{str(self.root)!r} is a file: a bank is a folder")

    def __str__(self) -> str:
        """Path."""
        return str(self.root)

    def names(self) -> Iterator[tuple[str, list[int]]]:
        """See `Place`."""
        self._check()
        yield from self._walk("")

    def versions(self, name: str) -> list[int]:
        """See `Place`."""
        try:
            return [] if is_linked(self.root, name) else scan(self.root / name).versions
        except (FileNotFoundError, NotADirectoryError):
            return []

    def newest(self, name: str) -> int | None:
        """See `Place`."""
        try:
            return next((number for number in numbers(self.root / name) if self.has(Ref(name, number))), None)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, ref: Ref) -> bool:
        """See `Place`."""
        return is_version(self.folder(ref)) and not is_linked(self.root, ref.name)

    def entries(self, *, cards: bool = False) -> list[Entry]:
        """See `Place`."""
        self._check()
        return entries(self.root, cards=cards)

    def with_content(self, prefix: str, name: str = "") -> list[Entry]:
        """See `Place`."""
        return with_content(self.root, prefix, name)

    def card(self, ref: Ref) -> bytes:
        """See `Place`."""
        return read_plain(self.folder(ref) / CARD_FILE)

    def moves(self, name: str) -> list[Move]:
        """See `Place`."""
        return read_moves(self.root / name)

    def tombstone(self, ref: Ref) -> dict[str, Any] | None:
        """See `Place`."""
        return tombstone(self.folder(ref))

    def tombstones(self) -> list[Ref]:
        """See `Place`."""
        found = (path.parent.relative_to(self.root) for path in self.root.rglob(TOMBSTONE_FILE))
        numbers = ((each, parse_version(each.name)) for each in found if not any(part.startswith(".") for part in each.parts))
        found_refs = ((each.parent.as_posix(), number) for each, number in numbers if number is not None)
        return sorted((Ref(name, number) for name, number in found_refs if is_name(name)), key=str)

    def strays(self) -> list[tuple[str, str, str]]:
        """See `Place`."""
        return list(strays(self.root))

    def folder(self, ref: Ref) -> Path:
        """See `Place`."""
        return self.root / ref.name / str(ref.number)

    def trusted(self, ref: Ref) -> bool:
        """See `Place`."""
        return trusted(self.root, self.folder(ref))

    def trust(self, ref: Ref) -> None:
        """See `Place`."""
        trust(self.root, self.folder(ref))

    def _check(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"no bank at {str(self.root)!r}: give the folder of a bank, or put something into it first")

    def _walk(self, name: str) -> Iterator[tuple[str, list[int]]]:
        found = scan(self.root / name)
        if name and found.versions:
            yield name, found.versions
        for each in below(name, found.deeper):
            yield from self._walk(each)
