"""Names for versions that may move: every move is kept, so that the table is what the moves come to."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from skillbank.bank.refs import check_alias
from skillbank.bank.sealed import fsync, locked, seal, unseal, write_new

__all__ = ["ALIASES_FILE", "ANY", "Expected", "Move", "move", "read_moves", "table"]

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
        data = (folder / ALIASES_FILE).read_bytes()
    except FileNotFoundError:
        return []
    body = unseal(data)
    if body.get("format") == 1 and isinstance(body.get("aliases"), dict):
        moves = [Move(alias, version) for alias, version in sorted(body["aliases"].items())]
    elif body.get("format") == FORMAT and isinstance(body.get("moves"), list) and all(_is_move(each) for each in body["moves"]):
        moves = [Move(**each) for each in body["moves"]]
    else:
        raise ValueError(f"has format {body.get('format')!r}, this skillbank reads up to {FORMAT}: update skillbank")
    return moves


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
        temporary = folder / f"{ALIASES_TEMPORARY}{uuid.uuid4().hex}"
        try:
            write_new(temporary, seal({"format": FORMAT, "moves": [asdict(each) for each in [*moves, made]]}))
            temporary.replace(folder / ALIASES_FILE)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(folder)


def _place(version: Expected) -> str:
    return "nothing" if version is None else f"version {version}"


def _is_move(entry: Any) -> bool:
    kinds = {"alias": str, "version": int | None, "protected": bool, "when": str}
    return isinstance(entry, dict) and set(entry) == set(kinds) and all(isinstance(entry[key], kind) for key, kind in kinds.items())
