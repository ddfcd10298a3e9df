"""Sealed JSON: a canonical text that carries its own SHA-256, so that no byte of it can change unseen; and files read and written with care.

The seal is a top-level field: the SHA-256 of the whole file with the 64 digits of the seal itself written as zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "canonical",
    "file_digest",
    "fsync",
    "locked",
    "made",
    "read_object",
    "read_plain",
    "rename",
    "seal",
    "unseal",
    "write_new",
    "write_object",
]

_LARGEST = 16 * 2**20
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_BLANK = b"0" * 64
_SEAL = re.compile(rb'(?<=^  "seal": ")[0-9a-f]{64}(?=",?$)', re.MULTILINE)  # fields of the top level, and they alone, stand behind two spaces


def canonical(value: object, what: str = "value") -> bytes:
    """JSON with sorted keys, two spaces and a final newline, in UTF-8: equal values give equal bytes.

    Raises:
        ValueError: a value that JSON has no word for (a tensor, NaN, an infinity); the message calls it `what`.

    """
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))  # keys become strings before they are sorted
        return (json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be written as JSON ({error}): use strings, finite numbers, booleans, lists and mappings") from None


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical bytes of `body` with a seal."""
    blank = canonical({**body, "seal": _BLANK.decode()})
    return _SEAL.sub(hashlib.sha256(blank).hexdigest().encode(), blank)


def unseal(data: bytes) -> dict[str, Any]:
    """Body of sealed bytes; inverse of `seal`.

    Raises:
        ValueError: a byte is not what `seal` wrote.

    """
    if len(data) > _LARGEST:
        raise ValueError(f"has {len(data)} bytes, more than the {_LARGEST} that are read")
    seals = _SEAL.findall(data)
    if len(seals) != 1 or hashlib.sha256(_SEAL.sub(_BLANK, data)).hexdigest().encode() != seals[0]:
        raise ValueError("does not match its seal: it was changed after it was written; restore it from a copy")
    try:
        body = _object(data)
        del body["seal"]
    except (ValueError, KeyError):
        raise ValueError("is sealed but no JSON that skillbank writes") from None
    return body


def read_plain(path: Path, largest: int = _LARGEST) -> bytes:
    """Bytes of a small file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a link, a pipe or a device, or too many bytes.

    """
    try:
        handle = os.open(path, _READ)
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise ValueError("is no plain file") from None
        raise error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no plain file")
        if found.st_size > largest:
            raise ValueError(f"has {found.st_size} bytes, more than the {largest} that are read")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def read_object(path: Path, largest: int = _LARGEST) -> dict[str, Any]:
    """Mapping in a JSON file; a ValueError names the file where it is none."""
    try:
        return _object(read_plain(path, largest))
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from None


def _object(data: bytes) -> dict[str, Any]:
    """Mapping in the bytes of JSON with finite numbers and with every key once."""
    try:
        body = _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({str(error)[:100]})") from None
    if not isinstance(body, dict):
        raise ValueError("is no JSON object")
    return body


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)


def write_object(path: Path, value: object, what: str, largest: int = _LARGEST) -> None:
    """Write a mapping as a new JSON file; inverse of `read_object`.

    Raises:
        ValueError: a value that JSON has no word for, or more than can be read; the message calls it `what`.

    """
    if len(data := canonical(value, what)) > largest:
        raise ValueError(f"{what} has {len(data)} bytes as JSON, more than the {largest} that are read of {path.name}: make it smaller")
    write_new(path, data)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which the system lets go of when the process ends.

    Raises:
        TimeoutError: another holds it, and this one is not to wait.

    """
    from filelock import FileLock

    with FileLock(path, blocking=wait):
        yield


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet; `fsync` brings it down to the disk."""
    with path.open("xb") as file:
        file.write(data)


def made(folder: Path) -> Path:
    """A folder, made with those above it where there is none; each is flushed into the one that it lies in."""
    if not folder.is_dir():
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            fsync(each.parent)
    return folder


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder; a failure that a network reports of what has worked is none."""
    mine = os.stat(source)
    try:
        os.replace(source, target)
    except OSError:
        with suppress(OSError):
            if os.path.samestat(mine, os.stat(target)):
                return
        raise


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
