"""Reading a bank: names, versions, references, cards and what they hold.

`<root>/<name>/<version>/` holds one version, `<root>/<name>/aliases.json` the aliases of a name. The listing of the folders is the index.

Nothing here imports torch until a tensor is read, so that listing is fast.
"""

from __future__ import annotations

import builtins
import fnmatch
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from skillbank.bank.aliases import ALIASES_FILE, Move, read_moves, table
from skillbank.bank.card import CARD_FILE, KINDS, Card
from skillbank.bank.links import common_base, lineage
from skillbank.bank.publish import PARTIAL_FILE
from skillbank.bank.query import Where
from skillbank.bank.records import Thing, read_payload
from skillbank.bank.refs import Ref, UnknownRef, check_name, parse_version
from skillbank.bank.removal import TOMBSTONE_FILE, tombstone
from skillbank.words import did_you_mean

__all__ = ["BankReader", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    ref: Ref
    card: Card


class BankReader:
    """The reading half of a `Bank`."""

    def __init__(self, root: str | os.PathLike[str] = "adapters") -> None:
        if "://" in str(root):
            raise ValueError(f"{str(root)!r} is a URL: this version of skillbank opens local folders only")
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{str(self.root)!r} is a file: a bank is a folder")

    def __repr__(self) -> str:
        """Return `Bank('adapters')`."""
        return f"Bank({str(self.root)!r})"

    def names(self) -> Iterator[tuple[str, builtins.list[int]]]:
        """Every name with its versions, both in order.

        Raises:
            FileNotFoundError: there is no bank at the root.

        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"no bank at {str(self.root)!r}: give the folder of a bank, or put something into it first")
        yield from self._walk("")

    def versions(self, name: str) -> builtins.list[int]:
        """Version numbers of a name, ascending; empty where there is none."""
        folder = self.root / check_name(name)
        if not folder.is_dir():
            return []
        return sorted(number for entry in os.scandir(folder) if (number := _version(entry)) is not None)

    def aliases(self, name: str) -> dict[str, int]:
        """`{alias: version}` of a name.

        Raises:
            ValueError: the file of the aliases is damaged.

        """
        return {alias: cast("int", each.version) for alias, each in table(self.moves(name)).items()}

    def moves(self, name: str) -> builtins.list[Move]:
        """How the aliases of a name came to point where they do, oldest first.

        Raises:
            ValueError: the file of the aliases is damaged.

        """
        try:
            return read_moves(self.root / check_name(name))
        except ValueError as error:
            raise ValueError(f"{name}: {ALIASES_FILE} {error}") from None

    def resolve(self, ref: str | Ref) -> Ref:
        """Return the exact reference that `ref` means now.

        Raises:
            UnknownRef: it means nothing; the message says what is close.
            ValueError: not a reference, or a content prefix that several contents share.

        """
        ref = Ref.parse(ref)
        if ref.content is not None:
            return self._by_content(ref, ref.content)
        versions = self.versions(ref.name)
        if not versions:
            raise UnknownRef(f"no {ref.name!r} in {self}: {did_you_mean(ref.name, (name for name, _ in self.names()))}")
        if ref.version is None:
            return Ref(ref.name, versions[-1])
        if isinstance(ref.version, str):
            aliases = self.aliases(ref.name)
            if ref.version not in aliases:
                raise UnknownRef(f"{ref.name!r} has no alias {ref.version!r}: {did_you_mean(ref.version, aliases)}")
            ref = Ref(ref.name, aliases[ref.version])
        if ref.version not in versions:
            if (stone := tombstone(self._folder(ref))) is not None:
                raise UnknownRef(f"{ref} was removed {stone['when']}{stone['reason'] and ': '}{stone['reason']}")
            raise UnknownRef(f"{ref.name!r} has no version {ref.version}: there is {', '.join(map(str, versions))}")
        return ref

    def path(self, ref: str | Ref) -> Path:
        """Folder of a version, which PEFT can load."""
        return self._folder(self.resolve(ref))

    def card(self, ref: str | Ref) -> Card:
        """Card of a version.

        Raises:
            ValueError: the card is missing or was changed.

        """
        return self._card(self.resolve(ref))

    def list(
        self, kind: str | None = None, pattern: str | None = None, *, base: str | Ref | None = None, where: Iterable[str | Where] = ()
    ) -> builtins.list[Entry]:
        """Every version that is asked for, by name and number.

        Args:
            kind: `base`, `skill` or `composition`; None for all.
            pattern: shell pattern that the name matches, such as `walker/*`.
            base: reference of the base that it belongs to.
            where: conditions on the card that all hold, such as `metrics.return > 600`, see `Where`.

        Raises:
            ValueError: an unknown kind or a condition of another form.
            UnknownRef: no such base.

        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r}: a bank holds {', '.join(KINDS)}")
        names = [(name, numbers) for name, numbers in self.names() if pattern is None or fnmatch.fnmatchcase(name, pattern)]
        entries = [Entry(ref, self._card(ref)) for name, numbers in names for ref in (Ref(name, number) for number in numbers)]
        conditions = [each if isinstance(each, Where) else Where.parse(each) for each in where]
        conditions += [] if kind is None else [Where("kind", "=", kind)]
        conditions += [] if base is None else [Where("base.ref", "=", str(self.resolve(base)))]
        return [entry for entry in entries if all(condition(entry.card) for condition in conditions)]

    def base_of(self, refs: Iterable[str | Ref]) -> Ref:
        """Exact reference of the base that all of `refs` share; a ValueError names the bases where they differ."""
        return common_base(self, refs)

    def lineage(self, ref: str | Ref) -> dict[str, Any]:
        """Where a version comes from: `{"ref", "kind", "hash", "weight", "base", "parents"}`, base and parents of the same form or None."""
        return lineage(self, ref)

    def get(self, ref: str | Ref) -> Thing:
        """Read a skill, a base or a composition, after checking every file and every link of the version against its card.

        Raises:
            UnknownRef: no such version.
            ValueError: a file is missing or was changed, or a link is broken; the message names version and file.

        """
        from skillbank.bank.verify import check_files, check_links

        ref = self.resolve(ref)
        card = self._card(ref)
        problems = [*check_files(self._folder(ref), ref, card), *check_links(self, ref, card, missing=card.kind == "composition")]
        if problems:
            raise ValueError(f"{problems[0]}: restore it from a copy, `skillbank verify` lists all that is wrong")
        return read_payload(card.kind, self._folder(ref))

    def _walk(self, name: str) -> Iterator[tuple[str, builtins.list[int]]]:
        numbers: builtins.list[int] = []
        deeper: builtins.list[str] = []
        for entry in os.scandir(self.root / name):
            number = _version(entry)
            if number is not None:
                numbers.append(number)
            elif not entry.name.startswith(".") and not entry.name.isdigit() and entry.is_dir(follow_symlinks=False):
                deeper.append(entry.name)
        if name and numbers:
            yield name, sorted(numbers)
        for each in sorted(deeper):
            yield from self._walk(f"{name}/{each}" if name else each)

    def _folder(self, ref: Ref) -> Path:
        return self.root / ref.name / str(ref.number)

    def _card(self, ref: Ref) -> Card:
        try:
            return Card.from_bytes((self._folder(ref) / CARD_FILE).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{ref}: {CARD_FILE} is missing") from None
        except ValueError as error:
            raise ValueError(f"{ref}: {CARD_FILE} {error}") from None

    def _by_content(self, ref: Ref, prefix: str) -> Ref:
        names = [(ref.name, self.versions(ref.name))] if ref.name else list(self.names())
        found = [
            (card.hash, each)
            for name, numbers in names
            for each in (Ref(name, number) for number in numbers)
            if (card := self._card(each)).hash.startswith(prefix)
        ]
        if not found:
            raise UnknownRef(f"no content {str(ref)!r} in {self}: `skillbank list` and `skillbank show` say what there is")
        if len({content for content, _ in found}) > 1:
            listed = ", ".join(f"{each} ({content[:16]})" for content, each in found[:5])
            raise ValueError(f"{str(ref)!r} is ambiguous, it fits {listed}: give more digits")
        return found[0][1]


def _version(entry: os.DirEntry[str]) -> int | None:
    """Version number of a folder that holds something."""
    number = parse_version(entry.name)
    if number is None or not entry.is_dir(follow_symlinks=False):
        return None
    with os.scandir(entry.path) as inside:
        names = {each.name for each in inside}
    if TOMBSTONE_FILE in names or (PARTIAL_FILE in names and CARD_FILE not in names):
        return None
    return number if any(not name.startswith(".") for name in names) else None
