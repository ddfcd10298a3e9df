"""The bank: a folder of immutable versions."""

from __future__ import annotations

import builtins
import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillbank.bank.aliases import ANY, Expected, move
from skillbank.bank.card import Card, check_extra, content_hash, tool_versions
from skillbank.bank.links import links
from skillbank.bank.publish import file_entry, publish, temporary
from skillbank.bank.reader import BankReader
from skillbank.bank.records import Thing, kind_of, write_payload
from skillbank.bank.refs import Ref, check_name
from skillbank.bank.removal import dependents, gc, remove

if TYPE_CHECKING:
    from skillbank.bank.verify import Problem

__all__ = ["Bank"]

Done = Callable[[int, int], None]


def _silent(_so_far: int, _of: int) -> None:
    pass


class Bank(BankReader):
    """A versioned folder of bases, skills and compositions.

    Args:
        root: the folder, made by the first `put` (`~` is expanded); or a URL that fsspec knows, such as `s3://bucket/bank` or
            `hf://user/repo`, which is read where it is and never written to: what is read of it is kept in the user's cache folder.

    Raises:
        ValueError: a path that is a file, or a URL that cannot be opened.

    """

    def verify(self, ref: str | Ref | None = None, *, done: Done = _silent, workers: int | None = None) -> builtins.list[Problem]:
        """Check every byte of a version, or of the whole bank, and its links; an empty list says that all is well.

        Args:
            ref: one version; None for all.
            done: called with the numbers of versions that are checked, and of all.
            workers: threads.

        """
        from skillbank.bank.verify import verify

        return verify(self, ref, done=done, workers=workers)

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

    def push(self, url: str, *refs: str | Ref, done: Done = _silent) -> builtins.list[Ref]:
        """Copy versions, what they stand on and their aliases to a bank elsewhere; all versions where none is named.

        Args:
            url: any URL that fsspec knows, such as `s3://bucket/bank` or `hf://user/repo`, or a folder. A repository on the Hub is made, private,
                where there is none.
            refs: which.
            done: called with the numbers of versions that are there, and of all.

        Returns:
            What was not there yet.

        Raises:
            UnknownRef: no such version here.
            ValueError: a version or an alias is another one there, a version is damaged here or was removed there, or somebody else has written to
                the repository meanwhile.
            PermissionError: the user may not write to the repository.
            ConnectionError: the Hub cannot be reached.

        """
        from skillbank.bank.transfer import push

        return push(self, url, refs, done=done)

    def pull(self, url: str, *refs: str | Ref, done: Done = _silent) -> builtins.list[Ref]:
        """Copy versions from a bank elsewhere to this one, every file checked as it arrives; otherwise as `push`."""
        from skillbank.bank.transfer import pull

        with self._writing():
            return pull(self, url, refs, done=done)

    def gc(self, *, dry_run: bool = False) -> builtins.list[Path]:
        """Remove what interrupted processes left behind, and return it; a dry run only tells."""
        with self._writing():
            return gc(self, dry_run=dry_run)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        root = self.root  # an error where the bank is elsewhere
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"no space left for the bank {str(root)!r}; nothing half was stored: make room and try again") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise PermissionError(f"the bank {str(root)!r} is not writable: {error.strerror} ({error.filename}); nothing was stored") from error
            raise
