"""Sealed JSON: a canonical text that carries its own SHA-256, so that no byte of it can change unseen.

The seal is a top-level field: the SHA-256 of the whole file with the 64 digits of the seal itself written as zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["canonical", "file_digest", "fsync", "locked", "seal", "unseal", "write_new"]

_LARGEST = 16 * 2**20
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
        raise ValueError("does not match its seal: it was changed after it was written")
    try:
        body: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is sealed but no JSON") from None
    del body["seal"]
    return body


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


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
