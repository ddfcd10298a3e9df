"""Names for versions that may move: every move is kept, so that the table is what the moves come to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from skillbank.bank.refs import check_alias, is_alias, is_exact
from skillbank.bank.sealed import fsync, locked, read_plain, rename, seal, unseal, write_new

__all__ = ["ALIASES_FILE", "ANY", "Expected", "Move", "join", "move", "parse_moves", "read_moves", "table", "take", "to_bytes"]

ALIASES_FILE = "aliases.json"
ALIASES_LOCK = ".aliases.lock"
ALIASES_TEMPORARY = ".aliases-"
FORMAT = 2
ANY: Literal["any"] = "any"
"""Expect nothing of where an alias points."""

Expected = int | None | Literal["any"]


@dataclass(frozen=True)
class Move:
    """An alias was pointed at a version, or taken away.

    Args:
        alias: which.
        version: where it points from then on, None where it was taken away.
        protected: it moves again only when it is unprotected in the same call.
        when: UTC time in ISO 8601; empty where an old file did not say.

    """

    alias: str
    version: int | None
    protected: bool = False
    when: str = ""


def read_moves(folder: Path) -> list[Move]:
    """Every move of the aliases of a name, oldest first.

    Raises:
        ValueError: the file is damaged or of another format.

    """
    try:
        return parse_moves(read_plain(folder / ALIASES_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return []


def parse_moves(data: bytes) -> list[Move]:
    """Moves in the bytes of an alias file; a ValueError says what is wrong with them."""
    body = unseal(data)
    moves = body.get("moves")
    if body.get("format") == 1 and isinstance(body.get("aliases"), dict):
        moves = [asdict(Move(alias, version)) for alias, version in sorted(body["aliases"].items())]
    elif body.get("format") != FORMAT or not isinstance(moves, list):
        raise ValueError(f"has format {body.get('format')!r}, this skillbank reads up to {FORMAT}: update skillbank")
    for each in moves:
        if not _is_move(each):
            raise ValueError(f"has the move {each!r:.200}, which is none of an alias to a version")
    return [Move(**each) for each in moves]


def table(moves: Sequence[Move]) -> dict[str, Move]:
    """Last move of every alias that points somewhere, by alias."""
    last = {each.alias: each for each in moves}
    return {alias: last[alias] for alias in sorted(last) if last[alias].version is not None}


def move(folder: Path, name: str, alias: str, version: int | None, *, expect: Expected, protect: bool | None) -> None:
    """Write one more move into the file of a name, or nothing where all is so already; one writer at a time.

    Raises:
        ValueError: the alias points elsewhere than expected, or is protected.

    """
    check_alias(alias)
    with locked(folder / ALIASES_LOCK):
        moves = read_moves(folder)
        now = table(moves).get(alias, Move(alias, None))
        if expect not in (ANY, now.version):
            raise ValueError(
                f"alias {alias!r} of {name!r} points at {_place(now.version)}, not at {_place(expect)} as expected: somebody moved it; "
                "look at its log and try again"
            )
        made = Move(alias, version, now.protected if protect is None else protect, datetime.now(UTC).isoformat(timespec="seconds"))
        if (made.version, made.protected) == (now.version, now.protected):
            return
        if now.protected and protect is not False:
            raise ValueError(f"alias {alias!r} of {name!r} is protected at version {now.version}: unprotect it in the same call")
        _write(folder, [*moves, made])


def join(name: str, ours: Sequence[Move], theirs: Sequence[Move]) -> list[Move]:
    """Moves of two banks as one history: theirs, and then ours that they do not have. Every alias is looked at for itself.

    Raises:
        ValueError: both moved an alias since, to different places, or protected on one side alone; the message names the first such alias.

    """
    new: list[int] = []
    for alias in sorted({each.alias for each in ours}):
        places = [i for i, each in enumerate(ours) if each.alias == alias]
        here, there = [ours[i] for i in places], [each for each in theirs if each.alias == alias]
        if here[: len(there)] == there:
            new += places[len(there) :]
        elif there[: len(here)] != here:
            if _state(here[-1]) != _state(there[-1]):
                raise ValueError(
                    f"alias {alias!r} of {name!r} points at {_state(here[-1])} here and at {_state(there[-1])} there, and both were moved: "
                    "move it to one place on both sides"
                )
            new += [i for i in places if ours[i] not in there]
    return [*theirs, *(ours[i] for i in sorted(new))]


def take(folder: Path, joined: Callable[[list[Move]], list[Move]]) -> None:
    """Join the moves of another bank into the file of a name, as the function says that gets those in it."""
    with locked(folder / ALIASES_LOCK):
        before = read_moves(folder)
        if (after := joined(before)) != before:
            _write(folder, after)


def to_bytes(moves: Sequence[Move]) -> bytes:
    """Bytes of an alias file; `parse_moves` is its inverse."""
    return seal({"format": FORMAT, "moves": [asdict(each) for each in moves]})


def _write(folder: Path, moves: Sequence[Move]) -> None:
    temporary = folder / f"{ALIASES_TEMPORARY}{uuid.uuid4().hex}"
    try:
        write_new(temporary, to_bytes(moves))
        fsync(temporary)
        rename(temporary, folder / ALIASES_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(folder)


def _place(version: Expected) -> str:
    return "nothing" if version is None else f"version {version}"


def _state(last: Move) -> str:
    """Where an alias points after its last move."""
    return _place(last.version) + ", protected," * (last.protected and last.version is not None)


def _is_move(entry: Any) -> bool:
    kinds = {"alias": str, "version": int | None, "protected": bool, "when": str}
    if not isinstance(entry, dict) or set(entry) != set(kinds) or not all(isinstance(entry[key], kind) for key, kind in kinds.items()):
        return False
    return is_alias(entry["alias"]) and (entry["version"] is None or is_exact(f"{entry['alias']}@{entry['version']}"))
