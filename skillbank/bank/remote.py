"""A bank elsewhere, in any place that fsspec can read: `s3://`, `gs://`, `hf://`, `memory://`, or a folder.

It has the same folders and files. What is read of a version is copied to the user's cache folder first, every file checked against the card.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillbank.bank.aliases import ALIASES_FILE, Move, parse_moves
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.folder import Folder
from skillbank.bank.index import Entry, cache_folder
from skillbank.bank.layout import TEMPORARY, TOMBSTONE_FILE
from skillbank.bank.publish import arrive, temporary
from skillbank.bank.refs import Ref, is_name, parse_version
from skillbank.bank.removal import parse_tombstone
from skillbank.bank.sealed import file_digest, fsync, locked, write_new

__all__ = ["Remote", "download"]

_CHUNK = 2**22


class Remote:
    """A bank at a URL.

    Args:
        url: a URL that fsspec knows, or a path.

    Raises:
        ValueError: a protocol that fsspec does not know, or whose package is not installed.

    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.url = url
        try:
            self.files, self.root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url!r} cannot be opened: {error}") from None
        self.root = self.root.rstrip("/")
        self.cache = Folder(cache_folder() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:32])

    def __str__(self) -> str:
        """URL."""
        return self.url

    def names(self) -> Iterator[tuple[str, list[int]]]:
        """See `Place`."""
        if not self.exists():
            raise FileNotFoundError(f"no bank at {self.url!r}: push one there first")
        found: dict[str, list[int]] = defaultdict(list)
        for ref in self._holding(CARD_FILE):
            found[ref.name].append(ref.number)
        yield from ((name, sorted(found[name])) for name in sorted(found))

    def exists(self) -> bool:
        """Whether there is anything."""
        self.files.invalidate_cache()
        return bool(self.files.exists(self.root))

    def versions(self, name: str) -> list[int]:
        """See `Place`."""
        self.files.invalidate_cache()
        return sorted(ref.number for ref in self._holding(CARD_FILE, name, depth=2) if ref.name == name)

    def newest(self, name: str) -> int | None:
        """See `Place`."""
        return max(self.versions(name), default=None)

    def has(self, ref: Ref) -> bool:
        """See `Place`."""
        return bool(self.files.exists(self.path(ref.name, str(ref.number), CARD_FILE)))

    def entries(self, *, cards: bool = False) -> list[Entry]:
        """See `Place`; the cards are always read."""
        refs = [Ref(name, number) for name, numbers in self.names() for number in numbers]
        paths = {ref: self.path(ref.name, str(ref.number), CARD_FILE) for ref in refs}
        found = self.files.cat(list(paths.values()), on_error="return") if refs else {}
        return [Entry.of(ref, card if isinstance(card := found.get(path), bytes) else None, self.card) for ref, path in paths.items()]

    def with_content(self, prefix: str, name: str = "") -> list[Entry]:
        """See `Place`."""
        return [each for each in self.entries() if each.hash.startswith(prefix) and name in ("", each.ref.name)]

    def card(self, ref: Ref) -> bytes:
        """See `Place`."""
        return self.read(ref.name, str(ref.number), CARD_FILE)

    def moves(self, name: str) -> list[Move]:
        """See `Place`."""
        try:
            return parse_moves(self.read(name, ALIASES_FILE))
        except FileNotFoundError:
            return []

    def tombstone(self, ref: Ref) -> dict[str, Any] | None:
        """See `Place`."""
        try:
            return parse_tombstone(self.read(ref.name, str(ref.number), TOMBSTONE_FILE))
        except FileNotFoundError:
            return None

    def tombstones(self) -> list[Ref]:
        """See `Place`."""
        return sorted(self._holding(TOMBSTONE_FILE), key=str)

    def strays(self) -> list[tuple[str, str, str]]:
        """See `Place`; links are none of a bank elsewhere, and other folders are nobody's there."""
        return []

    def folder(self, ref: Ref) -> Path:
        """See `Place`; what is not in the cache, or is damaged there, is copied."""
        target = self.cache.folder(ref)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            if not self._holds(ref, self.card(ref)):
                with temporary(self.cache.root) as folder:
                    download(self, ref, folder)
                    shutil.rmtree(target, ignore_errors=True)
                    arrive(self.cache.root, folder, ref)
        return target

    def trusted(self, ref: Ref) -> bool:
        """See `Place`."""
        return self.cache.trusted(ref)

    def trust(self, ref: Ref) -> None:
        """See `Place`."""
        self.cache.trust(ref)

    def _holds(self, ref: Ref, card: bytes) -> bool:
        """Whether the cache has the version with this card, every byte of it."""
        folder = self.cache.folder(ref)
        try:
            if (folder / CARD_FILE).read_bytes() != card:
                return False
            return self.trusted(ref) or all(file_digest(folder / name) == entry["sha256"] for name, entry in Card.from_bytes(card).files.items())
        except FileNotFoundError:
            return False

    def read(self, *parts: str) -> bytes:
        """Bytes of a file."""
        data: bytes = self.files.cat_file(self.path(*parts))
        return data

    def write(self, data: bytes, *parts: str) -> None:
        """Write a file beside and move it to its place, so that it is whole wherever moving is atomic."""
        beside = self.path(f"{TEMPORARY}{uuid.uuid4().hex}")
        self.files.pipe_file(beside, data)
        self.flush(beside.rpartition("/")[2])
        self.files.mv(beside, self.path(*parts))
        self.flush(*parts[:-1])

    def flush(self, *parts: str) -> None:
        """Bring a file, or the entries of a folder, down to the disk where it is one of this machine; elsewhere that is done when it is there."""
        if "file" in self.files.protocol:
            fsync(Path(self.path(*parts)))

    def path(self, *parts: str) -> str:
        """Path of a file."""
        return "/".join((self.root, *parts))

    def _holding(self, file: str, name: str = "", depth: int | None = None) -> Iterator[Ref]:
        """Numbered folders, below a name or all, that hold a file of this name."""
        for path in self.files.find(self.path(name).rstrip("/"), maxdepth=depth):
            *folders, number, found = path.removeprefix(self.root).strip("/").split("/")
            if found == file and is_name("/".join(folders)) and (version := parse_version(number)) is not None:
                yield Ref("/".join(folders), version)


def download(remote: Remote, ref: Ref, folder: Path) -> None:
    """Copy a version into an empty folder, its card last, every file checked on the way.

    Raises:
        ValueError: a file is not what the card says.

    """
    card = remote.card(ref)
    for name, entry in sorted(Card.from_bytes(card).files.items()):
        digest = hashlib.sha256()
        with remote.files.open(remote.path(ref.name, str(ref.number), name), "rb") as source, (folder / name).open("xb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                if file.tell() > entry["size"]:
                    break
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError(
                f"{remote.url}: {ref}: {name} did not arrive as its card says: it was changed there or on the way; nothing of it was stored"
            )
    write_new(folder / CARD_FILE, card)
