"""Which folders of a bank are versions, and which names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from skillbank.bank.card import CARD_FILE
from skillbank.bank.refs import is_name, parse_version

__all__ = ["PARTIAL_FILE", "TEMPORARY", "TOMBSTONE_FILE", "Listing", "below", "is_linked", "is_version", "numbers", "scan", "strays"]

TEMPORARY = ".tmp-"
PARTIAL_FILE = ".partial"
"""In the folder of a version while it is pushed from elsewhere; without a card beside it the version is none yet."""
TOMBSTONE_FILE = "tombstone.json"
"""Alone in the folder of a version that was removed."""


class Listing(NamedTuple):
    """What one folder of a bank holds: version numbers in order, folders that lead to further names, and whether a version is arriving."""

    versions: list[int]
    deeper: list[str]
    arriving: bool


def scan(folder: str | Path) -> Listing:
    """Look into the root of a bank, or the folder of a name."""
    versions: list[int] = []
    deeper: list[str] = []
    arriving = False
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        number = parse_version(entry.name)
        if number is None:
            if not entry.name.isdigit():
                deeper.append(entry.name)
            continue
        inside = _names(entry.path)
        if _is_whole(inside):
            versions.append(number)
        arriving |= PARTIAL_FILE in inside or not inside
    return Listing(sorted(versions), sorted(deeper), arriving)


def numbers(folder: str | Path) -> list[int]:
    """Numbers that name something in the folder of a name, highest first, whatever it is."""
    return sorted((number for each in os.listdir(folder) if (number := parse_version(each)) is not None), reverse=True)


def is_version(folder: str | Path) -> bool:
    """Whether a numbered folder holds a version: not one that was removed, one that is arriving, or nothing."""
    try:
        return not os.path.islink(folder) and _is_whole(_names(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False


def below(name: str, deeper: list[str]) -> list[str]:
    """Names that folders in the folder of a name lead to; the root has no name."""
    return [each for each in (f"{name}/{last}" if name else last for last in deeper) if is_name(each)]


def is_linked(root: Path, name: str) -> bool:
    """Whether a link stands on the way to the folder of a name."""
    parts = name.split("/")
    return any(os.path.islink(os.path.join(root, *parts[:count])) for count in range(1, len(parts) + 1))


def strays(root: Path) -> Iterator[tuple[str, str, str]]:
    """What looks like versions or names and is neither, as the name of the folder that it lies in, what it is called, and why."""
    waiting = [""]
    while waiting:
        name = waiting.pop()
        found = scan(root / name)
        waiting += (deeper := below(name, found.deeper))
        for entry in os.scandir(root / name):
            full = f"{name}/{entry.name}" if name else entry.name
            if entry.is_symlink() and not entry.name.startswith(".") and entry.is_dir():
                yield name, entry.name, "is a link: what is behind it is not read"
            elif entry.name in found.deeper and full not in deeper and any(scan(here).versions for here, _, _ in os.walk(entry.path)):
                yield name, entry.name, "is no name, so that no reference leads to the versions in it: rename the folder"


def _names(folder: str | Path) -> set[str]:
    with os.scandir(folder) as inside:
        return {each.name for each in inside}


def _is_whole(names: set[str]) -> bool:
    if TOMBSTONE_FILE in names or (PARTIAL_FILE in names and CARD_FILE not in names):
        return False
    return any(not name.startswith(".") for name in names)
