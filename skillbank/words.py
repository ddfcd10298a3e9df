"""What to say when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of an error message: the closest known word, or all of them where they are few."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(map(repr, words[:10])) + (", ..." if len(words) > 10 else "")
    return f"there is {listed}" if words else "there is none yet"
