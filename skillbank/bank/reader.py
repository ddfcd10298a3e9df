"""Reading a bank: names, versions, references, cards and what they hold.

Nothing here imports torch until a tensor is read, so that listing is fast.
"""

from __future__ import annotations

import builtins
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from skillbank.bank.aliases import ALIASES_FILE, Move, table
from skillbank.bank.card import CARD_FILE, KINDS, Card
from skillbank.bank.folder import Folder, Place
from skillbank.bank.index import Entry
from skillbank.bank.layout import TOMBSTONE_FILE
from skillbank.bank.links import common_base, lineage
from skillbank.bank.query import Where
from skillbank.bank.records import Thing, read_payload
from skillbank.bank.refs import Ref, UnknownRef, check_name
from skillbank.words import did_you_mean

__all__ = ["BankReader"]


class BankReader:
    """The reading half of a `Bank`."""

    def __init__(self, root: str | os.PathLike[str] | Place = "adapters") -> None:
        self.place: Place
        if not isinstance(root, str | os.PathLike):
            self.place = root
        elif "://" in str(root):
            from skillbank.bank.remote import Remote

            self.place = Remote(str(root))
        else:
            self.place = Folder(Path(root))

    def __repr__(self) -> str:
        """Return `Bank('adapters')`."""
        return f"Bank({str(self.place)!r})"

    @property
    def root(self) -> Path:
        """Folder of the bank.

        Raises:
            ValueError: the bank is elsewhere.

        """
        if isinstance(self.place, Folder):
            return self.place.root
        raise ValueError(f"{self} is elsewhere, where it is only read: work on a bank in a folder and push it there")

    def names(self) -> Iterator[tuple[str, builtins.list[int]]]:
        """Every name with its versions, both in order.

        Raises:
            FileNotFoundError: there is no bank at the root.

        """
        yield from self.place.names()

    def versions(self, name: str) -> builtins.list[int]:
        """Version numbers of a name, ascending; empty where there is none."""
        return self.place.versions(check_name(name))

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
        check_name(name)
        try:
            return self.place.moves(name)
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
        if isinstance(ref.version, int) and self.place.has(ref):
            return ref
        newest = self.place.newest(ref.name)
        if ref.version is None and newest is not None:
            return Ref(ref.name, newest)
        if isinstance(ref.version, str) and newest is not None:
            aliases = self.aliases(ref.name)
            if ref.version not in aliases:
                raise UnknownRef(f"{ref.name!r} has no alias {ref.version!r} in {self}: {did_you_mean(ref.version, aliases)}")
            ref = Ref(ref.name, aliases[ref.version])
            if self.place.has(ref):
                return ref
        if isinstance(ref.version, int) and (said := self.removed(ref)):
            raise UnknownRef(said)
        if newest is None:
            gone = max((each.number for each in self.place.tombstones() if each.name == ref.name), default=None)
            said = "" if gone is None else self.removed(Ref(ref.name, gone))
            raise UnknownRef(f"no {ref.name!r} in {self}: {said or did_you_mean(ref.name, (name for name, _ in self.names()))}")
        raise UnknownRef(f"{ref.name!r} has no version {ref.version} in {self}: there is {', '.join(map(str, self.versions(ref.name)))}")

    def removed(self, ref: Ref) -> str:
        """When a version was removed and why, in words; nothing where it was not.

        Raises:
            ValueError: its tombstone was changed.

        """
        try:
            stone = self.place.tombstone(ref)
        except ValueError as error:
            raise ValueError(f"{ref}: {TOMBSTONE_FILE} {error}") from None
        return f"{ref} was removed {stone['when']}{stone['reason'] and ': '}{stone['reason']}" if stone else ""

    def path(self, ref: str | Ref) -> Path:
        """Folder of a version, which PEFT can load."""
        return self.place.folder(self.resolve(ref))

    def card(self, ref: str | Ref) -> Card:
        """Card of a version.

        Raises:
            ValueError: the card is missing or was changed.

        """
        return self._card(self.resolve(ref))

    def list(
        self,
        kind: str | None = None,
        pattern: str | None = None,
        *,
        base: str | Ref | None = None,
        where: Iterable[str | Where] = (),
        text: str = "",
        damaged: Callable[[str], object] | None = None,
    ) -> builtins.list[Entry]:
        """Every version that is asked for, by name and number.

        Args:
            kind: `base`, `skill` or `composition`; None for all.
            pattern: shell pattern that the name matches, such as `walker/*`.
            base: reference of the base that it belongs to.
            where: conditions on the card that all hold, such as `metrics.return > 600`, see `Where`.
            text: what the card contains, anywhere, whatever the case.
            damaged: told of every version whose card cannot be read, which then is left out; None makes it an error. A card that was changed
                in its place after a listing has read it is an error where `Entry.card` is looked at.

        Raises:
            ValueError: an unknown kind, a condition of another form, or a card that cannot be read among the names that are asked for.
            UnknownRef: no such base.
            FileNotFoundError: there is no bank.

        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r}: a bank holds {', '.join(KINDS)}")
        conditions = [each if isinstance(each, Where) else Where.parse(each) for each in where]
        found = self.place.entries(cards=bool(text or conditions))
        if pattern is not None:
            matches = re.compile(fnmatch.translate(pattern)).match
            found = [entry for entry in found if matches(entry.name)]
        for entry in found:
            if entry.problem:
                if damaged is None:
                    raise ValueError(entry.problem)
                damaged(entry.problem)
        found = [entry for entry in found if not entry.problem]
        if kind is not None:
            found = [entry for entry in found if entry.kind == kind]
        if base is not None:
            exact = str(self.resolve(base))
            found = [entry for entry in found if entry.base == exact]
        if text:
            found = [entry for entry in found if text.lower() in entry.data.decode().lower()]
        if conditions:
            found = [entry for entry in found for card in [json.loads(entry.data.decode())] if all(condition(card) for condition in conditions)]
        return found

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
        try:
            card, folder, trusted = self._card(ref), self.place.folder(ref), self.place.trusted(ref)
            problems = [*check_files(folder, ref, card, trusted=trusted), *check_links(self, ref, card, missing=card.kind == "composition")]
            if problems:
                raise ValueError(f"{problems[0]}: restore it from a copy, `skillbank verify` lists all that is wrong")
            thing = self._read(ref, card, folder, trusted)
        except (ValueError, FileNotFoundError):
            self.resolve(ref)  # an UnknownRef where it was removed meanwhile
            raise
        if not trusted:
            self.place.trust(ref)
        return thing

    def _read(self, ref: Ref, card: Card, folder: Path, trusted: bool) -> Thing:
        try:
            return read_payload(card.kind, folder, trusted=trusted, links=card.links)
        except ValueError as error:
            raise ValueError(f"{ref}: {error}") from None

    def _card(self, ref: Ref) -> Card:
        try:
            return Card.from_bytes(self.place.card(ref))
        except FileNotFoundError:
            raise ValueError(f"{ref}: {CARD_FILE} is missing") from None
        except ValueError as error:
            raise ValueError(f"{ref}: {CARD_FILE} {error}") from None

    def _by_content(self, ref: Ref, prefix: str) -> Ref:
        found = self.place.with_content(prefix, ref.name)
        if not found:
            raise UnknownRef(f"no content {str(ref)!r} in {self}: `skillbank list` and `skillbank show` say what there is")
        if len({entry.hash for entry in found}) > 1:
            listed = ", ".join(f"{entry.ref} ({entry.hash[:16]})" for entry in found[:5])
            raise ValueError(f"{str(ref)!r} is ambiguous, it fits {listed}: give more digits")
        return found[0].ref
