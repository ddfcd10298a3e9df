"""References to versions of a bank.

Grammar, with `parse` and `str` as inverses of each other::

    name                  the newest version
    name@3                version 3
    name@best             the version that the alias `best` points to
    name@sha256:ab12..    the version of this name with that content, 4 to 64 hex digits
    @sha256:ab12..        the version with that content, in the whole bank

A name is one or more lower-case segments joined by `/`, such as `walker/run-from-stand-walk`. Upper case is left out because two names
that differ by case alone are one folder on some file systems; a segment of digits alone is left out because it is a version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Ref", "UnknownRef", "check_alias", "check_name", "is_alias", "is_exact", "is_name", "parse_version"]

_SEGMENT = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_DIGITS = 9
_VERSION = re.compile(rf"[1-9][0-9]{{0,{_DIGITS - 1}}}")
_CONTENT = re.compile(r"sha256:[0-9a-f]{4,64}")
_LONGEST_NAME = 200
_RESERVED = frozenset({"aliases.json"})


class UnknownRef(KeyError):  # noqa: N818
    """A reference names nothing in the bank."""

    def __str__(self) -> str:
        """Return the message itself, where `KeyError` would quote it."""
        return str(self.args[0]) if self.args else ""


def _is_word(text: str) -> bool:
    return _SEGMENT.fullmatch(text) is not None and not text.isdigit() and text not in _RESERVED


@lru_cache(maxsize=100_000)
def is_name(name: str) -> bool:
    """Whether versions can have this name."""
    return len(name) <= _LONGEST_NAME and all(_is_word(segment) for segment in name.split("/"))


def check_name(name: str) -> str:
    """Return `name`, or raise a ValueError that says what a name may look like."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"name {name[:40]!r}... has {len(name)} characters: use at most {_LONGEST_NAME}")
    if not is_name(name):
        raise ValueError(
            f"{name!r} is not a name: use lower-case segments of letters, digits, '-', '_' and '.' joined by '/', none of digits alone, "
            "such as 'walker/walk'"
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias`, or raise a ValueError that says what an alias may look like."""
    if not is_alias(alias):
        shown = repr(alias) if len(alias) <= _LONGEST_NAME else f"{alias[:40]!r}... of {len(alias)} characters"
        raise ValueError(f"{shown} is not an alias: use lower-case letters, digits, '-', '_' and '.', not digits alone, such as 'best'")
    return alias


def is_alias(alias: str) -> bool:
    """Whether an alias can be called so."""
    return _is_word(alias) and len(alias) <= _LONGEST_NAME


def is_exact(text: str) -> bool:
    """Whether a text is a reference with a number."""
    name, _, number = text.partition("@")
    return is_name(name) and parse_version(number) is not None


def parse_version(text: str) -> int | None:
    """Return the version number that `text` spells, or None if it spells none (folders and references share this rule)."""
    return int(text) if _VERSION.fullmatch(text) else None


@dataclass(frozen=True)
class Ref:
    """A reference: a name and which version of it.

    Args:
        name: the name; empty only together with a content prefix, which then is looked up in the whole bank.
        version: a number (an exact reference), an alias, `sha256:` and a prefix of the content hash, or None for the newest.

    Raises:
        ValueError: a name or a version that the grammar does not allow.

    """

    name: str
    version: int | str | None = None

    def __post_init__(self) -> None:
        if self.name or self.content is None:
            check_name(self.name)
        if isinstance(self.version, int) and not 1 <= self.version < 10**_DIGITS:
            raise ValueError(f"version {self.version} of {self.name!r} is out of range: versions are numbered from 1")
        if isinstance(self.version, str) and self.content is None:
            if self.version.startswith("sha256:"):
                raise ValueError(f"{self.version[:80]!r} is not a content prefix: give 'sha256:' and 4 to 64 lower-case hex digits")
            check_alias(self.version)

    @classmethod
    def parse(cls, text: str | Ref) -> Ref:
        """Read a reference; inverse of `str`."""
        if isinstance(text, Ref):
            return text
        name, at, selector = text.partition("@")
        if at and not selector:
            raise ValueError(f"{text[:240]!r} ends in '@': add a version, an alias or 'sha256:' and a prefix, or leave the '@' out")
        number = parse_version(selector)
        return cls(name, number if number is not None else selector or None)

    @property
    def content(self) -> str | None:
        """The prefix of the content hash that this reference looks for, or None."""
        if isinstance(self.version, str) and _CONTENT.fullmatch(self.version):
            return self.version.removeprefix("sha256:")
        return None

    @property
    def number(self) -> int:
        """The version number of an exact reference.

        Raises:
            ValueError: the reference is not exact.

        """
        if not isinstance(self.version, int):
            raise ValueError(f"{str(self)!r} is not exact: resolve it first, bank.resolve({str(self)!r})")
        return self.version

    def __str__(self) -> str:
        """Write a reference; inverse of `parse`."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    def __repr__(self) -> str:
        """Return `Ref('walker/walk@3')`."""
        return f"Ref({str(self)!r})"
