"""A bank elsewhere, in any place that fsspec can read: `s3://`, `gs://`, `hf://`, `memory://`, or a folder.

It has the same folders and files. What is read of a version is copied to the user's cache folder first, every file checked against the card.
What is written there becomes visible in one step: the last file comes last, and on the Hub all come in one commit. A folder of this machine is
written to as its own bank does, see `home`.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from skillbank.bank.aliases import ALIASES_FILE, Move, parse_moves
from skillbank.bank.card import CARD_FILE, Card
from skillbank.bank.folder import Folder
from skillbank.bank.hub import STREAMS, Commits, on_hub, reaching, repository_of
from skillbank.bank.index import Entry, cache_folder
from skillbank.bank.layout import PARTIAL_FILE, TEMPORARY, TOMBSTONE_FILE
from skillbank.bank.publish import arrive, temporary
from skillbank.bank.refs import Ref, is_name, parse_version
from skillbank.bank.removal import parse_tombstone
from skillbank.bank.sealed import file_digest, locked, write_new

__all__ = ["Remote", "download"]

Write = Callable[[Mapping[str, Path | bytes], str], None]

_CHUNK = 2**22
_READERS = 16
"""Cards that are read at the same time."""


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
            self.files, root = url_to_fs(url, **(STREAMS if on_hub(url) else {}))
            if on_hub(url):
                repository_of(root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url!r} cannot be opened: {error}") from None
        self.root = root.rstrip("/").removeprefix("models/" if on_hub(url) else "")
        self.cache = Folder(cache_folder() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:32])

    def __str__(self) -> str:
        """URL."""
        return self.url

    @property
    def home(self) -> Path | None:
        """The folder, where it is one of this machine."""
        from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

        return Path(self.root or "/") if isinstance(self.files, LocalFileSystem) else None

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
        try:
            with reaching(self.url):
                self.files.info(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def versions(self, name: str) -> list[int]:
        """See `Place`."""
        self.files.invalidate_cache()
        return sorted(ref.number for ref in self._holding(CARD_FILE, name, depth=2) if ref.name == name)

    def newest(self, name: str) -> int | None:
        """See `Place`."""
        return max(self.versions(name), default=None)

    def has(self, ref: Ref) -> bool:
        """See `Place`."""
        card, stone = (self.path(ref.name, str(ref.number), file) for file in (CARD_FILE, TOMBSTONE_FILE))
        with reaching(self.url):
            return bool(self.files.exists(card) and not self.files.exists(stone))

    def entries(self, *, cards: bool = False) -> list[Entry]:
        """See `Place`; the cards are always read."""
        refs = [Ref(name, number) for name, numbers in self.names() for number in numbers]
        with ThreadPoolExecutor(_READERS) as readers:
            return [Entry.of(ref, card) for ref, card in zip(refs, readers.map(self._card, refs), strict=True)]

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

    def _card(self, ref: Ref) -> bytes | None:
        try:
            return self.card(ref)
        except FileNotFoundError:
            return None

    def read(self, *parts: str) -> bytes:
        """Bytes of a file."""
        with reaching("/".join((self.url, *parts))):
            data: bytes = self.files.cat_file(self.path(*parts))
        return data

    def writer(self) -> Write:
        """Function that writes files by their paths, given with a word for what they are, so that none is seen before the last.

        On the Hub it writes only while nobody else has written there since it was asked for: ask before looking at what to write.
        """
        return Commits(self.url, self.files, self.root).write if on_hub(self.url) else self._in_turn

    def _in_turn(self, files: Mapping[str, Path | bytes], what: str) -> None:
        """Write files one by one, the last one beside and moved to its place, so that it is whole wherever moving is atomic.

        Before each a mark is looked for that lies there as long as nobody else has begun with the same version, or put it there.
        """
        *first, last = files
        partial, mark = self.path(last.rpartition("/")[0], PARTIAL_FILE), uuid.uuid4().hex.encode()

        def check() -> None:
            try:
                alone = not first or self.files.cat_file(partial) == mark
            except FileNotFoundError:
                alone = False
            if not alone:
                raise ValueError(f"{self.url}: {what} is written there by somebody else as well: push again when they are done")

        if first:
            self.files.makedirs(partial.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(partial, mark)
        for path in first:
            check()
            self._put(self.path(path), files[path])
        beside = self.path(f"{TEMPORARY}{uuid.uuid4().hex}")
        self._put(beside, files[last])
        try:
            check()
        except ValueError:
            self.files.rm_file(beside)
            raise
        self.files.mv(beside, self.path(last))
        if first:
            with suppress(FileNotFoundError):  # who put the same there took it away
                self.files.rm_file(partial)

    def _put(self, path: str, data: Path | bytes) -> None:
        if isinstance(data, bytes):
            self.files.pipe_file(path, data)
        else:
            self.files.put_file(str(data), path)

    def path(self, *parts: str) -> str:
        """Path of a file."""
        return "/".join((self.root, *parts))

    def _holding(self, file: str, name: str = "", depth: int | None = None) -> Iterator[Ref]:
        """Numbered folders, below a name or all, that hold a file of this name; those of removed versions hold a tombstone alone."""
        try:
            with reaching(self.url):
                paths = self.files.find(self.path(name).rstrip("/"), maxdepth=depth)
        except FileNotFoundError:
            return
        inside: dict[str, set[str]] = defaultdict(set)
        for path in paths:
            folder, _, found = path.removeprefix(self.root).strip("/").rpartition("/")
            inside[folder].add(found)
        for folder, names in inside.items():
            above, _, number = folder.rpartition("/")
            held = file in names and (file == TOMBSTONE_FILE or TOMBSTONE_FILE not in names)
            if held and is_name(above) and (version := parse_version(number)) is not None:
                yield Ref(above, version)


def download(remote: Remote, ref: Ref, folder: Path) -> None:
    """Copy a version into an empty folder, its card last, every file checked on the way.

    Raises:
        ValueError: a file is not what the card says.

    """
    card = remote.card(ref)
    for name, entry in sorted(Card.from_bytes(card).files.items()):
        digest = hashlib.sha256()
        path = remote.path(ref.name, str(ref.number), name)
        with reaching(remote.url), remote.files.open(path, "rb") as source, (folder / name).open("xb") as file:
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
