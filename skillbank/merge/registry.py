"""Merge methods by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from skillbank.words import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from skillbank.core import Factor
    from skillbank.merge.lift import Merged

__all__ = ["CUTS", "LAWS", "METHODS", "Entry", "Method", "check_options", "described", "find", "method"]

Method = Callable[..., "Merged | Factor | Tensor"]
"""`method(part, **options)`: what becomes of one module, as `Merged`, which is then cut to a rank, or as factors (A, B), which stay as they are; a
dense delta (O, I') where that is asked for, see `Part`.

Pure, exact on B @ A, independent of how the factors are stored.
"""

CUTS = ("rank", "error", "budget")
"""Options of every method whose result is cut to a rank; see `skill.truncate`."""

LAWS = {
    "single": "one skill at weight 1 is itself",
    "order": "the order of the skills does not matter",
    "zero": "a skill at weight 0 is absent",
    "gauge": "(B Q, Q^-1 A) merges as (B, A) does",
    "sign": "all weights times -1 give -1 times the merge",
}


_SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|[A-Z][a-z]+(?: and [A-Z][a-z]+)? \(\d{4}\)")


class Entry(NamedTuple):
    """A merge method.

    Args:
        function: what it computes.
        exact: it gives factors that nothing is cut from.
        weight: of a skill where the user gives none; None for 1 / K.
        breaks: laws that it breaks by its nature, each with the reason.
        first: the first skill has a part of its own.

    """

    function: Method
    exact: bool = False
    weight: float | None = None
    breaks: Mapping[str, str] = {}
    first: bool = False


METHODS: dict[str, Entry] = {}
"""Merge methods by name; every file of this package that has some is imported with it."""


def method(
    name: str, *, exact: bool = False, weight: float | None = None, breaks: Mapping[str, str] | None = None, first: bool = False
) -> Callable[[Method], Method]:
    """Register a merge method under a name.

    Args:
        name: what users call it.
        exact: it gives factors that nothing is cut from.
        weight: of every skill where the user gives none; None for 1 / K, as a mean has it, 1.0 where skills add up.
        breaks: laws of `LAWS` that do not hold, each with the reason.
        first: the first skill has a part of its own, so that it cannot be absent.

    Raises:
        ValueError: there is a method of that name.

    """

    def register(function: Method) -> Method:
        if name in METHODS:
            there = METHODS[name].function
            raise ValueError(f"there is a merge method {name!r} already, {there.__module__}.{there.__name__}: choose another name")
        METHODS[name] = Entry(function, exact, weight, dict(breaks or {}), first)
        return function

    return register


def find(name: str) -> Entry:
    """Return the method of that name; a ValueError says what is close."""
    if name not in METHODS:
        raise ValueError(f"unknown merge method {name!r}: {did_you_mean(name, METHODS)} Or pass a function.")
    return METHODS[name]


def _options(function: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, function: Callable[..., object], options: Mapping[str, object], more: Sequence[str] = ()) -> None:
    """Check that a method takes the options, its own and `more`; a ValueError says which it takes."""
    known = [*_options(function), *more]
    for key in options:
        if key not in known:
            raise ValueError(f"merge method {name!r} takes no {key!r}: {did_you_mean(key, known) if known else 'it has no options'}")


def described() -> list[dict[str, str]]:
    """Every method by name: its first sentence, its options, and where it comes from, as its function tells them."""
    return [{"method": name, **_told(entry)} for name, entry in sorted(METHODS.items())]


def _told(entry: Entry) -> dict[str, str]:
    text = " ".join((inspect.getdoc(entry.function) or "").partition("Args:")[0].split())
    found = _SOURCE.findall(text)
    first = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    taken = _options(entry.function) | ({} if entry.exact else dict.fromkeys(CUTS))
    options = ", ".join(key if default is None else f"{key}={default}" for key, default in taken.items())
    return {
        "what it does": first,
        "options": options,
        "weight": "1 / K" if entry.weight is None else "1",
        "breaks": "; ".join(f"{law}: {reason}" for law, reason in entry.breaks.items()),
        "source": ", ".join(found),
    }
