"""The bank: a folder of immutable versions.

`<root>/<name>/<version>/` holds one version, `<root>/<name>/aliases.json` the aliases of a name. The listing of the folders is the index. A
version is written into a hidden folder beside and renamed, so readers need no lock and never see half of one; a second writer of the same
number takes the next.

Nothing here imports torch until a tensor is read or written, so that listing is fast.
"""

from __future__ import annotations

import builtins
import errno
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from skillbank.bank.aliases import ALIASES_FILE, ANY, Expected, Move, move, read_moves, table
from skillbank.bank.card import CARD_FILE, KINDS, Card, check_extra, content_hash, tool_versions
from skillbank.bank.links import common_base, lineage, links
from skillbank.bank.publish import file_entry, publish, temporary
from skillbank.bank.query import Where
from skillbank.bank.records import Thing, kind_of, read_payload, write_payload
from skillbank.bank.refs import Ref, UnknownRef, check_name, parse_version
from skillbank.bank.removal import TOMBSTONE_FILE, dependents, gc, remove, tombstone
from skillbank.words import did_you_mean

if TYPE_CHECKING:
    from skillbank.bank.verify import Problem

__all__ = ["Bank", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    ref: Ref
    card: Card


class Bank:
    """A versioned folder of bases, skills and compositions.

    Args:
        root: the folder; made by the first `put`. `~` is expanded.

    Raises:
        ValueError: a URL, or a path that is a file.

    """

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

    def verify(
        self, ref: str | Ref | None = None, *, done: Callable[[int, int], None] = lambda _so_far, _of: None, workers: int | None = None
    ) -> builtins.list[Problem]:
        """Check every byte of a version, or of the whole bank, and its links; an empty list says that all is well.

        Args:
            ref: one version; None for all.
            done: called with the numbers of versions that are checked, and of all.
            workers: threads.

        """
        from skillbank.bank.verify import verify

        return verify(self, ref, done=done, workers=workers)

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

    def put(self, thing: Thing, name: str, *, card: Mapping[str, Any] | None = None, adapter: Mapping[str, Any] | None = None) -> Ref:
        """Store a new version, or find the one that holds the same already.

        Args:
            thing: a Skill, a Base or a Composition.
            name: such as `walker/walk`.
            card: `base` (a reference or `{"ref", "fingerprint"}`, or `{"name", "fingerprint"}` of one outside the bank; a composition has its
                own), `parents` (references, or `{"ref", "weight", "hash"}`), `conf`, `data`, `metrics`, `tags`, `license`, `notes`.
            adapter: options of `write_adapter` (base_name, fan_in_fan_out, task_type).

        Returns:
            The exact reference. The same kind, content and base under the same name give the same reference and nothing is written.

        Raises:
            UnknownRef: a base or parent that the bank does not have.
            ValueError: a name, a field or a value that cannot be stored, or a base without a module that the skill adapts.
            PermissionError: the bank is not writable.

        """
        check_name(name)
        kind = kind_of(thing)
        extra = {key: value for key, value in (card or {}).items() if value is not None}
        check_extra({key: value for key, value in extra.items() if key not in ("base", "parents")})
        thing, base, parents = links(self, thing, extra.pop("base", None), extra.pop("parents", ()))
        hashes = {str(link["ref"]): str(link["hash"]) for link in (base, *parents) if link is not None}
        with self._writing(), temporary(self.root) as folder:
            write_payload(thing, folder, hashes, adapter or {})
            files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
            made = Card(kind=kind, hash=content_hash(files), files=files, base=base, parents=parents)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            made = replace(made, **{**extra, "tags": tuple(extra.get("tags", ()))}, tools=tool_versions(), created=created)
            return publish(self, folder, name, made)

    def alias(self, name: str, alias: str, version: int | None, *, expect: Expected = ANY, protect: bool | None = None) -> Ref | None:
        """Point an alias of a name at one of its versions, or take it away; every move is kept, see `moves`.

        Args:
            name: the name.
            alias: the alias.
            version: its number, None to take the alias away.
            expect: move it only if it points at this version now (None: at nothing); `"any"` does not look.
            protect: from now on it moves only together with `protect=False`; None leaves that as it is.

        Returns:
            The exact reference that it points at now.

        Raises:
            UnknownRef: no such name or version.
            ValueError: it points elsewhere than expected, or is protected.
            PermissionError: the bank is not writable.

        """
        ref = None if version is None else self.resolve(Ref(name, version))
        self.resolve(Ref(name))
        with self._writing():
            move(self.root / name, name, alias, version, expect=expect, protect=protect)
        return ref

    def dependents(self, ref: str | Ref) -> builtins.list[Ref]:
        """Versions that have `ref` as their base or as a parent."""
        return dependents(self, ref)

    def remove(self, ref: str | Ref, *, force: bool = False, reason: str = "") -> Ref:
        """Take a version away; its number is never used again. Nothing brings it back but a copy.

        Raises:
            UnknownRef: no such version.
            ValueError: versions or aliases need it, and it was not forced.
            PermissionError: the bank is not writable.

        """
        exact = self.resolve(ref)
        with self._writing():
            remove(self, exact, force=force, reason=reason)
        return exact

    def gc(self, *, dry_run: bool = False) -> builtins.list[Path]:
        """Remove what interrupted processes left behind, and return it; a dry run only tells."""
        with self._writing():
            return gc(self, dry_run=dry_run)

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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise PermissionError(f"{self} is not writable: {error.strerror} ({error.filename}); nothing was stored") from error
            raise


def _version(entry: os.DirEntry[str]) -> int | None:
    """Version number of a folder that holds something."""
    number = parse_version(entry.name)
    if number is None or not entry.is_dir(follow_symlinks=False):
        return None
    with os.scandir(entry.path) as inside:
        names = {each.name for each in inside}
    return number if TOMBSTONE_FILE not in names and any(not name.startswith(".") for name in names) else None
