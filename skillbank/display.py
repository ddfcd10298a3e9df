"""How the command line shows things: tables that fit, trees, progress, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from skillbank.bank import Card
from skillbank.bank.card import flat, weighted

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

__all__ = [
    "answer",
    "card_fields",
    "lineage_tree",
    "new_table",
    "print_certificate",
    "print_fitting",
    "print_json",
    "print_one",
    "print_parts",
    "progress",
    "telling",
]

_TELLING = ("return", "loss", "validation", "merge_error")


def new_table(*columns: str, title: str | None = None) -> Table:
    """Table with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_parts(what: str, parts: Mapping[str, float]) -> None:
    """Print how far parts are apart."""
    table = new_table(what, "relative difference")
    for name, value in parts.items():
        table.add_row(name, f"{value:.3g}")
    print_one(table)


def print_certificate(certificate: Mapping[str, Any], refs: Sequence[str]) -> None:
    """Print what a merge did: in total, between the skills, and where it is farthest from their weighted sum."""
    error = certificate["error"]
    away = "no measure, for that is zero" if error is None else f"{error:.3g} of it"
    kept = "" if certificate["cut"] is not None or error is None else f"; {certificate['energy']:.1%} of its energy is kept"
    print(f"{certificate['method']}: " + ("exactly the weighted sum" if certificate["exact"] else f"away from the weighted sum by {away}{kept}"))
    if certificate["cut"]:
        print(f"cut to its rank, which takes away {certificate['cut']:.3g} of it")
    print(f"{certificate['cancelled']:.1%} of the skills' energy cancels in their sum")
    table = new_table("cosine", *refs)
    for ref, row in zip(refs, certificate["conflict"], strict=True):
        table.add_row(ref, *(f"{value:.3f}" for value in row))
    print_one(table)
    table = new_table("module", "rank", "effective rank", "relative error")
    for name, error in sorted(
        ((name, math.inf if each is None else each) for name, each in certificate["errors"].items()), key=lambda item: -item[1]
    )[:10]:
        table.add_row(name, str(certificate["ranks"].get(name, 0)), f"{certificate['effective_ranks'][name]:.1f}", f"{error:.3g}")
    print_one(table)


def print_one(shown: Table | Tree) -> None:
    """Print a table or a tree."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(shown)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr that `done(so far, of)` moves; none where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda so_far, of: progress.update(bar, completed=so_far, total=of)


def print_json(value: object) -> None:
    """Print JSON."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """The same without what JSON has no word for: null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answer(json: bool, value: object, *lines: str) -> None:
    """Print a value as JSON, or lines that say the same to people."""
    if json:
        print_json(value)
    else:
        print("\n".join(lines))


def lineage_tree(node: Mapping[str, Any]) -> Tree:
    """Tree of what `Bank.lineage` gives."""
    from rich.tree import Tree

    weight = "" if node["weight"] is None else f"{node['weight']:g} "
    tree = Tree(f"{weight}{node['ref']} ({node['kind']}, {node['hash'][:12]})")
    for child in (node["base"], *node["parents"]):
        if child is not None:
            tree.children.append(lineage_tree(child))
    return tree


def print_fitting(columns: dict[str, list[str]]) -> None:
    """Print as many columns as fit into the terminal, the first ones first; a cell is never broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    shown = list(columns)
    while True:
        table = Table(box=box.SIMPLE_HEAD)
        for column in shown:
            table.add_column(column, no_wrap=True, overflow="ignore")
        for row in zip(*(columns[column] for column in shown), strict=True):
            table.add_row(*row)
        needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        if needed <= console.width or len(shown) == 1:
            break
        shown.pop()
    Console(highlight=False, markup=False, width=max(needed, console.width)).print(table)


def telling(card: Card) -> str:
    """The two most telling metrics: returns before losses, losses before the rest."""
    numbers = [key for key, value in card.metrics.items() if isinstance(value, int | float)]
    known, others = [key for key in _TELLING if key in numbers], [key for key in numbers if key not in _TELLING]
    return ", ".join(f"{key} {card.metrics[key]:.5g}" for key in [*known, *others][:2])


def card_fields(card: Card) -> list[tuple[str, str]]:
    """What a card says, as pairs of a label and a text, leaving out what is empty."""
    rows = [("kind", card.kind), ("content", f"sha256:{card.hash}"), ("created", card.created)]
    if card.base is not None:
        rows += [("base", card.base_name), ("base fingerprint", card.base["fingerprint"] or "unknown")]
    rows += [("parent", weighted(each)) for each in card.parents]
    rows += [("notes", card.notes), ("tags", ", ".join(card.tags)), ("license", card.license or "")]
    for title, values in (("metric", card.metrics), ("data", card.data), ("conf", card.conf), ("tool", card.tools)):
        rows += [(f"{title} {key}", value) for key, value in flat(values)]
    return [(key, value) for key, value in rows if value]
