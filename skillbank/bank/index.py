"""Cards of a bank in one SQLite file, so that a listing does not read ten thousand files.

It is a cache and nothing more: it lies in the user's cache folder, is brought up to date whenever it is asked, and is made anew where it is
missing, damaged or of another format. Changes are known by the time stamps of folders: a version appears by a rename into the folder of its name,
and a tombstone by a rename into the folder of the version.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.layout import below, is_version, scan
from skillbank.bank.refs import Ref, UnknownRef
from skillbank.bank.sealed import read_plain

__all__ = ["CACHE", "Entry", "cache_folder", "entries", "trust", "trusted", "with_content"]

T = TypeVar("T")

CACHE = "SKILLBANK_CACHE"
_FORMAT = 3
_SETTLED = 2 * 10**9
"""Nanoseconds after which a time stamp is believed: within them a folder can change once more and keep it."""
_UNUSED = 30 * 86400
"""Seconds."""
_TRUSTED: dict[tuple[Path, str], str] = {}
"""What this process has looked up of `trust`: stamps by bank and version."""
_LOOKED_AT: dict[tuple[Path, str], str] = {}
"""Stamps of versions that are being read, from before their first byte was."""
_TABLES = """
CREATE TABLE IF NOT EXISTS folder (path TEXT PRIMARY KEY, stamp TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS version (
    name TEXT, number INTEGER, kind TEXT, base TEXT, hash TEXT, problem TEXT, sum INTEGER, stamp TEXT, PRIMARY KEY (name, number)
);
CREATE TABLE IF NOT EXISTS card (name TEXT, number INTEGER, data BLOB, sum INTEGER, PRIMARY KEY (name, number));
CREATE INDEX IF NOT EXISTS version_hash ON version (hash);
CREATE TABLE IF NOT EXISTS checked (path TEXT PRIMARY KEY, stamp TEXT NOT NULL) WITHOUT ROWID;
"""


class _Fields(NamedTuple):
    name: str
    number: int
    kind: str
    base: str
    hash: str
    problem: str
    read: Callable[[], bytes]
    known: bytes | None


class Entry(_Fields):
    """A version in a listing.

    Args:
        name: its name.
        number: its version number.
        kind: `base`, `skill` or `composition`.
        base: reference of its base in the same bank, or nothing.
        hash: content hash.
        problem: why the card cannot be read, and the way out, or nothing; the fields before are empty then.
        read: reads its card.
        known: bytes of the card, where the listing has them; the file may have been changed since.

    """

    @classmethod
    def of(cls, ref: Ref, data: bytes | None, problem: str = "is missing") -> Entry:
        """Entry of a version by the bytes of its card as they are now, None where it has none because of a problem."""
        try:
            if data is None:
                raise ValueError(problem)
            card = Card.from_bytes(data)
        except ValueError as error:
            return cls(ref.name, ref.number, "", "", "", _damaged(ref, error), lambda: b"", None)
        return cls(ref.name, ref.number, card.kind, (card.base and card.base["ref"]) or "", card.hash, "", lambda: data, data)

    @cached_property
    def ref(self) -> Ref:
        """Exact reference."""
        return Ref(self.name, self.number)

    @cached_property
    def data(self) -> bytes:
        """Bytes of the card, as the listing knows them."""
        return self.read() if self.known is None else self.known

    @cached_property
    def card(self) -> Card:
        """What the card says now: a ValueError names a version that was damaged since the listing, an UnknownRef one that was removed."""
        try:
            return Card.from_bytes(self.read())
        except FileNotFoundError:
            raise ValueError(_damaged(self.ref, "is missing")) from None
        except ValueError as error:
            raise ValueError(_damaged(self.ref, error)) from None


def _damaged(ref: Ref, what: object) -> str:
    return f"{ref}: {CARD_FILE} {what}; `skillbank rm {ref} --force` takes it away"


def cache_folder() -> Path:
    """Folder for what can be made anew: $SKILLBANK_CACHE, or `skillbank` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "skillbank"
    return Path(os.environ.get(CACHE) or default).expanduser()


def entries(root: Path, *, cards: bool = False) -> list[Entry]:
    """Every version of the bank in a folder, by name and number, with the bytes of the cards or without."""
    return _ask(root, "", "ORDER BY name, number", cards=cards)


def with_content(root: Path, prefix: str, name: str = "") -> list[Entry]:
    """Versions whose content hash begins so; where a name is given, of this name alone."""
    return _ask(root, name, "WHERE hash >= ? AND hash < ? AND ? IN ('', name) ORDER BY name, number", prefix, f"{prefix}g", name)


def trusted(root: Path, folder: Path) -> bool:
    """Whether a version was found whole before, see `trust`, and none of its files looks otherwise since."""
    key, stamp, settled = str(folder.relative_to(root)), *_version_stamp(folder)
    if settled and _TRUSTED.get((root, key)) == stamp:
        return True
    question = ("SELECT stamp FROM checked WHERE path = ? AND stamp = ?", (key, stamp))
    if not settled or not _with_file(root, lambda file: file.execute(*question).fetchall()):
        _LOOKED_AT[root, key] = stamp if settled else ""
        return False
    _TRUSTED[root, key] = stamp
    return True


def trust(root: Path, folder: Path) -> None:
    """Remember that every byte of a version was checked since `trusted` was asked, unless it was changed then or shortly before."""
    key, (stamp, _) = str(folder.relative_to(root)), _version_stamp(folder)
    if _LOOKED_AT.pop((root, key), "") == stamp:
        _TRUSTED[root, key] = stamp
        _with_file(root, lambda file: file.execute("INSERT OR REPLACE INTO checked VALUES (?, ?)", (key, stamp)).fetchall())


def _ask(root: Path, name: str, condition: str, *values: str, cards: bool = False) -> list[Entry]:
    """Bring the index up to date, for one name or all, and read from it."""
    what = "version JOIN card USING (name, number)" if cards else "version"
    columns = "name, number, kind, base, hash, problem, version.sum" + ", data, card.sum" * cards

    def of(row: tuple[Any, ...]) -> Entry:
        if _sum(*row[:6]) != row[6] or (cards and zlib.crc32(row[7]) != row[8]):
            raise sqlite3.DatabaseError("a row is damaged")
        return Entry._make((*row[:6], partial(card, *row[:2]), row[7] if cards and not row[5] else None))

    def card(name: str, number: int) -> bytes:
        try:
            return read_plain((folder := root / name / str(number)) / CARD_FILE)
        except FileNotFoundError:
            if is_version(folder):
                raise
            raise UnknownRef(f"{Ref(name, number)} was removed meanwhile") from None

    def read(file: sqlite3.Connection) -> list[Entry]:
        _refresh(file, root, name)
        return [of(row) for row in file.execute(f"SELECT {columns} FROM {what} {condition}", values)]

    return _with_file(root, read)


def _with_file(root: Path, use: Callable[[sqlite3.Connection], list[T]]) -> list[T]:
    """Open the index, or make it, and use it; in memory where no file can be had."""
    path = cache_folder() / "index" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.sqlite"
    for place in (str(path), str(path), ":memory:"):
        try:
            if place != ":memory:" and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _prune(path.parent)
            with closing(sqlite3.connect(place, timeout=60, isolation_level=None)) as file:
                _prepare(file)
                return use(file)
        except (OSError, sqlite3.OperationalError):  # no place to write, or not in time
            if place == ":memory:":
                raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):  # damaged, perhaps where the error quotes it, or another format
            _remove(path)
    raise AssertionError("an index in memory cannot be damaged")


def _prepare(file: sqlite3.Connection) -> None:
    file.execute("PRAGMA synchronous = OFF")  # a cache that the power's failure damages is made anew
    version = file.execute("PRAGMA user_version").fetchone()[0]
    if version == _FORMAT:
        return
    if version:
        raise sqlite3.DatabaseError(f"format {version}")
    file.executescript(f"PRAGMA journal_mode = WAL; {_TABLES} PRAGMA user_version = {_FORMAT};")


def _refresh(file: sqlite3.Connection, root: Path, name: str) -> None:
    where, names = ("WHERE path = ?", [name]) if name else ("", [])
    known: dict[str, str] = dict(file.execute(f"SELECT path, stamp FROM folder {where}", names))
    waiting = [name] if name else list({"": "", **known})
    again: set[str] = set()
    recent = time.time_ns() - _SETTLED
    changes: list[_Change] = []
    while waiting:
        path = waiting.pop()
        try:
            found = os.stat(f"{root}/{path}")
            stamp = _stamp(found)
            if found.st_mtime_ns > recent or stamp != known.get(path) or path in again:
                deeper, made = _rescan(file, root, path, stamp)
                waiting += [each for each in deeper if each not in known and not name]
                changes += made
        except (FileNotFoundError, NotADirectoryError):
            tables = {"folder": "path", "version": "name", "card": "name"}
            changes += [(f"DELETE FROM {table} WHERE {key} = ?", (path,)) for table, key in tables.items()]
            above = path.rpartition("/")[0]
            if path and not name and above not in again:  # never there, if the index is damaged: look at what is
                again.add(above)
                waiting.append(above)
    if changes:
        file.execute("BEGIN IMMEDIATE")
        for statement, values in changes:
            file.execute(statement, values)
        file.execute("COMMIT")


def _rescan(file: sqlite3.Connection, root: Path, name: str, stamp: str) -> tuple[list[str], list[_Change]]:
    """Folders below this one, and what has to change in the tables for it."""
    versions, deeper, arriving = scan(root / name)
    known = dict(file.execute("SELECT number, CASE problem WHEN '' THEN stamp END FROM version WHERE name = ?", (name,)))
    gone, trusted = set(known) - set(versions), not arriving
    changes: list[_Change] = []
    for number in versions:
        folder = root / name / str(number)
        now = _stamp(os.stat(folder))
        if known.get(number) != now:
            data, problem = _read(folder / CARD_FILE)
            if data is None and not is_version(folder):  # it was removed since the folder was looked into
                gone.add(number)
                continue
            made = Entry.of(Ref(name, number), data, problem)
            changes.append(("INSERT OR REPLACE INTO version VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*made[:6], _sum(*made[:6]), now)))
            changes.append(("INSERT OR REPLACE INTO card VALUES (?, ?, ?, ?)", (name, number, data or b"", zlib.crc32(data or b""))))
            trusted &= not made.problem
    changes += [(f"DELETE FROM {table} WHERE name = ? AND number = ?", (name, number)) for number in gone for table in ("version", "card")]
    changes.append(("INSERT OR REPLACE INTO folder VALUES (?, ?)", (name, stamp if trusted else "")))
    return below(name, deeper), changes


def _sum(name: str, number: int, kind: str, base: str, content: str, problem: str) -> int:
    """Check sum of a row."""
    return zlib.crc32(f"{name} {kind} {base} {content} {problem}".encode(), number)


def _prune(folder: Path) -> None:
    """Remove the indexes of banks that nobody has asked for long."""
    for path in folder.glob("*.sqlite"):
        if time.time() - path.stat().st_mtime > _UNUSED:
            _remove(path)


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


_Change = tuple[str, tuple[object, ...]]


def _stamp(folder: os.stat_result) -> str:
    """What a folder looks like from outside; where the clock ran backwards, the number of folders in it still tells."""
    return f"{folder.st_ino}:{folder.st_mtime_ns}:{folder.st_ctime_ns}:{folder.st_nlink}:{folder.st_size}"


def _version_stamp(folder: Path) -> tuple[str, bool]:
    """What the files of a version look like from outside, and whether they would look different after another change."""
    found = sorted((each.name, each.stat(follow_symlinks=False)) for each in os.scandir(folder))
    stamp = ";".join(f"{name}:{each.st_ino}:{each.st_size}:{each.st_mtime_ns}:{each.st_ctime_ns}" for name, each in found)
    last = max((max(each.st_mtime_ns, each.st_ctime_ns) for _, each in found), default=0)
    return stamp, time.time_ns() - last >= _SETTLED


def _read(path: Path) -> tuple[bytes | None, str]:
    """Bytes of a card, or why there are none."""
    try:
        return read_plain(path), ""
    except FileNotFoundError:
        return None, "is missing"
    except ValueError as error:
        return None, str(error)
