"""Ways in which a process and its disk can fail, each at a point of what a forked process does below a folder.

A fault is armed in the process that is to meet it: `fault(folder, point)`. A point is the number of an open, rename, remove, mkdir, rmdir or fsync,
unless the fault says otherwise.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["ENDED", "FAULTS", "HUNG", "ODD", "REFUSED", "SURVIVED", "Fault", "apart", "attempt", "suffer"]

Fault: TypeAlias = "Callable[[Path, int], None]"

ENDED, SURVIVED, REFUSED, ODD = range(4)
"""How an operation came out: it met no fault, it succeeded all the same, it raised an error for people, it raised something else."""
HUNG = -signal.SIGALRM
_SECONDS = 60
_EVENTS = frozenset({"open", "open to write", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync"})
_MAKES = frozenset({"open to write", "os.rename", "os.mkdir", "os.fsync"})
_CHANGES = _EVENTS - {"open", "os.fsync"}
_MET: list[str] = []
"""Faults that this process met."""
_LAST: list[Callable[[], None]] = []
"""What happens after an operation that met no fault."""


class Disk:
    """What a disk holds of a folder when the power fails: the names and the contents that were flushed.

    Every file is kept open, so that its number is not given to another.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.contents: dict[int, bytes] = {}
        for path in (root, *root.rglob("*")):
            self.flush(path)

    def flush(self, path: Path) -> None:
        """A file or the names in a folder come down to the disk."""
        number = os.fstat(os.open(path, os.O_RDONLY)).st_ino
        if path.is_dir():
            self.names[number] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(path)}
        else:
            self.contents[number] = path.read_bytes()

    def leave(self, target: Path, names_stay: bool) -> None:
        """Write what is left; where all names stay, what they name is empty if it was not flushed."""

        def write(number: int, source: Path, target: Path) -> None:
            target.mkdir()
            now = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(source)} if names_stay else self.names.get(number, {})
            for name, (inner, is_folder) in now.items():
                if is_folder:
                    write(inner, source / name, target / name)
                else:
                    (target / name).write_bytes(self.contents.get(inner, b""))

        write(self.root.stat().st_ino, self.root, target)


def _strike(root: Path, point: int, strike: Callable[[str], None], *, lasting: bool = False, flushed: Callable[[Path], None] | None = None) -> None:
    """Call `strike(event)` before the file operation number `point` below a folder, or before all from there on."""
    count, armed, fsync = itertools.count(), [True], os.fsync

    def met(event: str) -> None:
        number = next(count)
        if number == point or (lasting and number > point):
            _MET.append(event)
            armed[0] = False
            try:
                strike(event)
            finally:
                armed[0] = True

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and armed[0] and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if not os.path.isabs(path) or path.startswith(str(root)):
                writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                met("open to write" if writes else event)

    def flush(file: int) -> None:
        met("os.fsync")
        fsync(file)
        if flushed is not None:
            armed[0] = False
            flushed(Path(os.readlink(f"/proc/self/fd/{file}")))
            armed[0] = True

    sys.addaudithook(seen)
    os.fsync = flush  # type: ignore[assignment]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(root: Path, point: int) -> None:
    _strike(root, point, lambda _: _die())


def _failing(number: int, events: frozenset[str] = _EVENTS, *, lasting: bool = False) -> Fault:
    def strike(event: str) -> None:
        if event in events:
            raise OSError(number, os.strerror(number))

    return lambda root, point: _strike(root, point, strike, lasting=lasting)


def _without_power(names_stay: bool) -> Fault:
    def fault(root: Path, point: int) -> None:
        disk = Disk(root)

        def fail(_event: str) -> None:
            disk.leave(root.with_name("after"), names_stay)
            _die()

        _LAST.append(lambda: disk.leave(root.with_name("after"), names_stay))
        _strike(root, point, fail, flushed=disk.flush)

    return fault


def _late(_root: Path, point: int) -> None:
    """A rename works and reports that it did not; the point says which one, and with which number."""
    count, real = itertools.count(), os.rename
    numbers = (errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.ENOENT)

    def rename(source: Any, target: Any, **options: Any) -> None:
        real(source, target, **options)
        if next(count) == point // len(numbers):
            _MET.append("os.rename")
            raise OSError(numbers[point % len(numbers)], "the answer came late")

    os.rename = os.replace = rename  # type: ignore[assignment]


def _short(_root: Path, point: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * point, 64 * point))


FAULTS: dict[str, Fault] = {
    "killed": _killed,
    "power fails, unflushed names are lost": _without_power(names_stay=False),
    "power fails, unflushed contents are lost": _without_power(names_stay=True),
    "disk full from there on": _failing(errno.ENOSPC, _MAKES, lasting=True),
    "disk read-only from there on": _failing(errno.EROFS, _CHANGES, lasting=True),
    "one input/output error": _failing(errno.EIO),
    "one stale handle": _failing(errno.ESTALE),
    "a rename works and reports a failure": _late,
    "files end at a multiple of 64 bytes": _short,
}


def attempt(run: Callable[[], object]) -> int:
    """Run something in this process and say how it came out."""
    try:
        run()
        return SURVIVED if _MET else ENDED
    except (OSError, ValueError, KeyError):
        return REFUSED
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return ODD


def apart(run: Callable[[], int], after: float | None = None) -> int:
    """Run something in a process of its own, which is killed after some seconds, or after far too many; its exit code."""
    pid = os.fork()
    if not pid:
        signal.alarm(_SECONDS)
        code = ODD
        try:
            code = run()
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def suffer(fault: Fault, point: int, root: Path, run: Callable[[], object]) -> int:
    """How an operation below a folder comes out under a fault; what a power failure leaves lies in `after` beside the folder."""

    def armed() -> int:
        fault(root, point)
        code = attempt(run)
        for last in _LAST if code == ENDED else ():
            last()
        return code

    return apart(armed)
