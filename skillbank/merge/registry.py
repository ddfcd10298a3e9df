"""Merge methods by name."""

from __future__ import annotations

from collections.abc import Callable

from skillbank.skill import Skill
from skillbank.words import did_you_mean

__all__ = ["METHODS", "Method", "find", "method"]

Method = Callable[..., Skill]
"""`method(skills, weights (K,) float64, **options) -> Skill`: pure, exact on B @ A, independent of how the factors are stored."""

METHODS: dict[str, Method] = {}
"""Merge methods by name; every file of this package that has some is imported with it."""


def method(name: str) -> Callable[[Method], Method]:
    """Register a merge method under a name; a second method of that name is an error."""

    def register(function: Method) -> Method:
        if name in METHODS:
            raise ValueError(f"there is a merge method {name!r} already, {METHODS[name].__module__}.{METHODS[name].__name__}: choose another name")
        METHODS[name] = function
        return function

    return register


def find(name: str) -> Method:
    """Return the method of that name; a ValueError says what is close."""
    if name not in METHODS:
        raise ValueError(f"unknown merge method {name!r}: {did_you_mean(name, METHODS)} Or pass a function.")
    return METHODS[name]
