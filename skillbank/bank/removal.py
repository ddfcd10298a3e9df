"""Taking versions away, and sweeping up what was never finished.

A removed version leaves a tombstone in its folder, so that its number is never given to another. The tombstone is written first: from then on
nobody sees the version, whatever happens to the rest.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillbank.bank.aliases import ALIASES_LOCK, ALIASES_TEMPORARY
from skillbank.bank.card import CARD_FILE
from skillbank.bank.layout import PARTIAL_FILE, TEMPORARY, TOMBSTONE_FILE
from skillbank.bank.publish import lock_of, temporary
from skillbank.bank.refs import Ref, UnknownRef
from skillbank.bank.sealed import fsync, locked, read_plain, rename, seal, unseal, write_new

if TYPE_CHECKING:
    from skillbank.bank.index import Entry
    from skillbank.bank.store import Bank

__all__ = ["dependents", "gc", "parse_tombstone", "remove", "tombstone"]

_FORMAT = 1
_FIELDS = ("kind", "hash", "reason", "when")


def dependents(bank: Bank, ref: str | Ref) -> list[Ref]:
    """Versions that name `ref` as their base or as a parent, by name and number."""
    exact = str(bank.resolve(ref))
    return [entry.ref for entry in bank.list(text=exact) if _stands_on(entry, exact)]


def _stands_on(entry: Entry, ref: str) -> bool:
    try:
        return ref in entry.card.stands_on
    except UnknownRef:
        return False


def remove(bank: Bank, ref: Ref, *, force: bool, reason: str) -> None:
    """Take a version away and leave a tombstone, which says nothing of kind and content where the card is damaged.

    Raises:
        ValueError: other versions or aliases need it, or the card of one that may is damaged, and it was not forced.

    """
    if not force:
        needed = [str(each) for each in dependents(bank, ref)]
        needed += [f"alias {alias!r}" for alias, number in bank.aliases(ref.name).items() if number == ref.number]
        if needed:
            raise ValueError(f"{ref} is needed by {', '.join(needed[:5])}{' and others' if needed[5:] else ''}: remove these first, or force it")
    folder = bank.path(ref)
    try:
        card = bank.card(ref)
        kind, content = card.kind, card.hash
    except ValueError:  # only where it is forced: otherwise the damage was named
        kind = content = ""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    body = {"format": _FORMAT, "kind": kind, "hash": content, "reason": reason, "when": when}
    with temporary(folder.parent) as beside:  # in the folder of the name, whose time stamp tells the index
        write_new(beside / TOMBSTONE_FILE, seal(body))
        fsync(beside / TOMBSTONE_FILE)
        rename(beside / TOMBSTONE_FILE, folder / TOMBSTONE_FILE)
    fsync(folder)
    _clear(folder)


def tombstone(folder: Path) -> dict[str, Any] | None:
    """What a removed version left: kind, hash, reason and when; None where nothing was removed.

    Raises:
        ValueError: it was changed.

    """
    try:
        return parse_tombstone(read_plain(folder / TOMBSTONE_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_tombstone(data: bytes) -> dict[str, Any]:
    """What the bytes of a tombstone say; a ValueError says what is wrong with them."""
    body = unseal(data)
    if body.get("format") != _FORMAT or set(body) != {"format", *_FIELDS} or not all(isinstance(body[key], str) for key in _FIELDS):
        raise ValueError(f"has format {body.get('format')!r} and the fields {sorted(body)}, this skillbank reads {_FORMAT} with {list(_FIELDS)}")
    return body


def gc(bank: Bank, *, dry_run: bool) -> list[Path]:
    """Remove what interrupted writers and removers left behind; returns it. Writers that are still at it are left alone.

    Raises:
        FileNotFoundError: there is no bank.

    """
    if not bank.root.is_dir():
        raise FileNotFoundError(f"no bank at {str(bank.root)!r}: give the folder of a bank")
    left: list[Path] = []
    for here, folders, files in os.walk(bank.root):
        folder, before = Path(here), len(left)
        left += [path for path in sorted(folder / name for name in (*folders, *files) if name.startswith(TEMPORARY)) if _free(path, dry_run)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.startswith(ALIASES_TEMPORARY) for name in files):
            left += _free_aliases(folder, dry_run)
        if TOMBSTONE_FILE in files and (rest := [folder / name for name in sorted((*folders, *files)) if name != TOMBSTONE_FILE]):
            left += rest
            if not dry_run:
                _clear(folder)
            folders.clear()
        if PARTIAL_FILE in files and CARD_FILE in files:  # the rest of a push that was killed at its very end
            left.append(folder / PARTIAL_FILE)
            if not dry_run:
                (folder / PARTIAL_FILE).unlink()
        if len(left) > before and not dry_run:
            fsync(folder)
    return sorted(left)


def _free(path: Path, dry_run: bool) -> bool:
    """Whether a temporary folder, or the lock of one, is nobody's; it is removed then."""
    folder = path.with_suffix("")
    try:
        with locked(lock_of(folder), wait=False):
            if not dry_run:
                if folder.is_symlink() or folder.is_file():
                    folder.unlink()
                elif folder.exists():
                    shutil.rmtree(folder)
                lock_of(folder).unlink(missing_ok=True)
    except TimeoutError:
        return False
    return path == folder


def _free_aliases(folder: Path, dry_run: bool) -> list[Path]:
    with locked(folder / ALIASES_LOCK):
        found = sorted(folder.glob(f"{ALIASES_TEMPORARY}*"))
        for path in found if not dry_run else ():
            path.unlink()
    return found


def _clear(folder: Path) -> None:
    """Empty the folder of a removed version, but for its tombstone."""
    for entry in os.scandir(folder):
        if entry.name != TOMBSTONE_FILE:
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    fsync(folder)
