"""How a version gets into a bank: written in a hidden folder, flushed to the disk, renamed to the next free number.

Readers need no lock and never see half of one; a second writer of the same number takes the next.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillbank.bank.card import CARD_FILE, README_FILE, Card, readme
from skillbank.bank.layout import TEMPORARY, TOMBSTONE_FILE, is_linked, numbers
from skillbank.bank.refs import Ref
from skillbank.bank.sealed import file_digest, fsync, locked, made, rename, write_new

if TYPE_CHECKING:
    from skillbank.bank.index import Entry
    from skillbank.bank.store import Bank

__all__ = ["arrive", "file_entry", "lock_of", "publish", "same_version", "temporary"]

_FLUSHES = 4
"""At once."""


@contextmanager
def temporary(root: Path) -> Iterator[Path]:
    """An empty hidden folder in a bank, gone after the block; while its lock is held, `gc` leaves it alone."""
    made(root)
    folder = root / f"{TEMPORARY}{uuid.uuid4().hex}"
    lock = lock_of(folder)
    with locked(lock):
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    """Lock file of a temporary folder, beside it."""
    return folder.with_name(f"{folder.name}.lock")


def file_entry(path: Path) -> dict[str, Any]:
    """What a card says of a file."""
    return {"sha256": file_digest(path), "size": path.stat().st_size}


def publish(bank: Bank, folder: Path, name: str, card: Card) -> Ref:
    """Finish a version in its temporary folder and rename it to the next free number; one that is there already is found instead."""
    write_new(folder / README_FILE, readme(name, card).encode())
    card = replace(card, files={**card.files, README_FILE: file_entry(folder / README_FILE)})
    write_new(folder / CARD_FILE, data := card.to_bytes())
    Card.from_bytes(data)
    _flush(folder)
    parent = _home(bank.root, name)
    number = 0
    while True:
        taken = _last_taken(parent)  # before the search for equals: what comes in between makes the rename fail
        for other in bank.place.with_content(card.hash, name):
            if _is_same(bank, other, card):
                return other.ref
        number = max(number, taken) + 1
        try:
            rename(folder, parent / str(number))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        fsync(parent)
        return Ref(name, number)


def arrive(root: Path, folder: Path, ref: Ref) -> None:
    """Rename a complete version from another bank to its own number; one with the same card, or what is left of one, may be there already.

    Raises:
        ValueError: there is another version of that number, or was one.

    """
    _flush(folder)
    target = _home(root, ref.name) / str(ref.number)
    try:
        rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if (target / TOMBSTONE_FILE).exists():
            raise ValueError(f"{ref} was removed from {str(root)!r} meanwhile: put it there under another name") from None
        if (target / CARD_FILE).exists():
            same_version(ref, (target / CARD_FILE).read_bytes(), (folder / CARD_FILE).read_bytes())
        else:
            _take_out(root, target, folder)
            arrive(root, folder, ref)
    fsync(target.parent)


def _take_out(root: Path, target: Path, folder: Path) -> None:
    """Take out of the way what lies where a version is to go and has no card, if all of it comes again, so that nothing is lost."""
    with suppress(FileNotFoundError), temporary(root) as aside:  # somebody else may take it out
        kept = (path for path in sorted(target.iterdir()) if not path.name.startswith("."))
        if other := next((path.name for path in kept if not _begins(folder / path.name, path)), None):
            raise ValueError(
                f"{str(target)!r} has no {CARD_FILE}, and its {other} is not what is to go there: restore it, or take that folder away if nobody is "
                "writing to it"
            )
        rename(target, rest := aside / target.name)
        if any((rest / name).exists() for name in (CARD_FILE, TOMBSTONE_FILE)):  # which came meanwhile
            rename(rest, target)


def _begins(path: Path, part: Path) -> bool:
    """Whether a file begins with the bytes of another, which is a plain file."""
    if part.is_symlink() or not (part.is_file() and path.is_file()):
        return False
    with path.open("rb") as whole, part.open("rb") as file:
        return all(whole.read(len(chunk)) == chunk for chunk in iter(partial(file.read, 2**22), b""))


def same_version(ref: Ref, ours: bytes, theirs: bytes) -> None:
    """Check that two banks mean the same version by a reference: equal cards, which seal everything else."""
    if ours != theirs:
        raise ValueError(f"{ref} is another version here than there: put one of them under another name, or take it away on one side")


def _flush(folder: Path) -> None:
    """Bring a folder down to the disk; its files at once, so that they share what the file system writes for each."""
    with ThreadPoolExecutor(_FLUSHES) as pool:
        list(pool.map(fsync, sorted(folder.iterdir())))
    fsync(folder)


def _home(root: Path, name: str) -> Path:
    """Folder of a name, made where there is none."""
    if is_linked(root, name):
        raise ValueError(f"{name!r} lies behind a link in the bank {str(root)!r}, where nothing is read or written: put a folder in its place")
    return made(root / name)


def _is_same(bank: Bank, other: Entry, card: Card) -> bool:
    """Whether a version of the same content is of the same kind and base; one that was removed meanwhile, or whose card is damaged, is not."""
    try:
        return other.kind == card.kind and bank.card(other.ref).base == card.base
    except (ValueError, KeyError):
        return False


def _last_taken(parent: Path) -> int:
    """Highest number of a version of a name that is, or was, or that something else lies at; 0 if there is none."""
    for number in numbers(parent):
        path = parent / str(number)
        if path.is_symlink() or not path.is_dir() or any(not each.name.startswith(".") for each in path.iterdir()):
            return number
    return 0
