"""Functions of strings as skills of a small language model: which of them alone, chained, and unnamed, can be had by composing adapters.

`RLabcd=` asks for the function R of L; the right answer writes a step for each, `Rdcba=cbaz`. The base learns twelve functions (A to L), chains
of them, and that a function which it does not know stays where it is; every skill learns one of twelve others (N to Y), by itself and in chains with
those of the base, and still does not know the other eleven: no two skills are ever carried out together.
`abc>cba,defg>gfed,xyz>` asks for a function by examples, without its name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

KNOWN: dict[str, Callable[[str], str]] = {
    "A": lambda s: s[1:] + s[0],
    "B": lambda s: s[len(s) // 2 :] + s[: len(s) // 2],
    "C": lambda s: s[1:],
    "D": lambda s: s[0] + s,
    "E": lambda s: shifted(s, 1),
    "F": lambda s: s[1] + s[0] + s[2:],
    "G": lambda s: s[::2],
    "H": lambda s: s + s[-1],
    "I": lambda s: vowels(s, "a"),
    "J": lambda s: s[:-1],
    "K": lambda s: shifted(s, 2),
    "L": lambda s: s[::-1],
}
"""What the base knows."""

SKILLS: dict[str, Callable[[str], str]] = {
    "N": lambda s: s[-1] + s[:-1],
    "O": lambda s: s[-1] + s[1:-1] + s[0],
    "P": lambda s: s[2:],
    "Q": lambda s: s + s[0],
    "R": lambda s: shifted(s, -1),
    "S": lambda s: s[:-2] + s[-1] + s[-2],
    "T": lambda s: s[1::2],
    "U": lambda s: s[-1] + s,
    "V": lambda s: vowels(s, "o"),
    "W": lambda s: s[: len(s) // 2] + s[len(s) // 2 + 1 :],
    "X": lambda s: shifted(s, 3),
    "Y": lambda s: s[2:] + s[:2],
}
"""What a skill is trained on each."""

FUNCTIONS = KNOWN | SKILLS
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def shifted(s: str, by: int) -> str:
    """Every letter that far on in the alphabet."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in s)


def vowels(s: str, to: str) -> str:
    """Every vowel another."""
    return "".join(to if letter in "aeiou" else letter for letter in s)


def word(rng: random.Random, low: int = 4, high: int = 8) -> str:
    """A string of random letters."""
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def chain(names: str, start: str, known: Sequence[str]) -> dict[str, str] | None:
    """Record of a chain of functions, the last name first; None where a string becomes too short or long, or nothing can be done."""
    prompt, steps, s = f"{names}{start}=", [], start
    while names and names[-1] in known:
        s, names = FUNCTIONS[names[-1]](s), names[:-1]
        if not 3 <= len(s) <= 10:
            return None
        steps.append(names + s)
    return {"prompt": prompt, "completion": "=".join(steps)} if steps else None


def by_examples(name: str, rng: random.Random, shots: int = 2) -> dict[str, str]:
    """Record that asks for a function without its name."""
    words = [word(rng, 4, 6) for _ in range(shots + 1)]
    shown = ",".join(f"{s}>{FUNCTIONS[name](s)}" for s in words[:-1])
    return {"prompt": f"{shown},{words[-1]}>", "completion": FUNCTIONS[name](words[-1])}


def pretraining(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Records that the base is trained on."""
    rng, found = random.Random(seed), list[dict[str, str]]()
    while len(found) < count:
        if rng.random() < 0.2:
            found.append(by_examples(rng.choice(list(KNOWN)), rng))
            continue
        names = "".join(rng.choices(list(KNOWN), k=rng.randint(1, 4)))
        if rng.random() < 0.4:
            names = "".join(rng.choices(list(SKILLS), k=rng.randint(1, 3))) + names
        record = chain(names[-4:], word(rng), list(KNOWN))
        if record is not None:
            found.append(record)
    return found


def of_skill(name: str, count: int, seed: int) -> list[dict[str, str]]:
    """Records that a skill is trained on: its function by itself, by examples, in chains with what the base knows, and behind what nobody knows."""
    rng, found = random.Random(f"{name} {seed}"), list[dict[str, str]]()
    while len(found) < count:
        kind = len(found) % 10
        names = list(name) + (rng.choices(list(KNOWN), k=rng.randint(1, 2)) if kind >= 5 else [])
        rng.shuffle(names)
        others = rng.choices([each for each in SKILLS if each != name], k=rng.randint(0, 2) if kind >= 3 else 0)
        record = by_examples(name, rng) if kind in (0, 1) else chain("".join([*others, *names]), word(rng), [*KNOWN, name])
        if record is not None:
            found.append(record)
    return found


def alone(name: str, count: int, seed: int) -> list[dict[str, str]]:
    """Records of a function by itself, named."""
    rng, found = random.Random(f"alone {name} {seed}"), list[dict[str, str]]()
    while len(found) < count:
        record = chain(name, word(rng), name)
        if record is not None:
            found.append(record)
    return found


def chains(depth: int, names: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Records of chains of different functions, with the names that they ask for."""
    rng, found = random.Random(f"{depth} {seed}"), list[dict[str, str]]()
    while len(found) < count:
        asked = "".join(rng.sample(list(names), depth))
        record = chain(asked, word(rng), list(FUNCTIONS))
        if record is not None:
            found.append({**record, "names": asked})
    return found


def save(records: Sequence[dict[str, str]], path: Path) -> Path:
    """A record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
