"""The command line: `skillbank list | show | log | verify`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from skillbank.bank import Bank, Card, Ref, UnknownRef
from skillbank.bank.card import KINDS, flat, weighted
from skillbank.words import did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["app", "check_choices", "main", "user_errors"]

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    help="A versioned bank of LoRA skills.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_BankOption = Annotated[Path, typer.Option("--bank", envvar="SKILLBANK", help="Folder of the bank.")]
_DEFAULT = Path("adapters")
_TELLING = ("return", "loss", "validation", "merge_error")
_USER_ERRORS = (ValueError, UnknownRef, FileNotFoundError, PermissionError)


def user_errors(run: Callable[P, T]) -> Callable[P, T]:
    """Decorate a command: a user's error becomes one line on stderr and exit code 1, any other error keeps its traceback."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except Exception as error:
            if (message := _message(error)) is None:
                raise
            sys.stderr.write(f"skillbank: {message}\n")
            raise SystemExit(1) from None

    return wrapped


def _message(error: Exception) -> str | None:
    """What to tell a user of an error; None where the fault is not the user's. Errors inside Hydra's `instantiate` are its causes."""
    origin = type(error).__module__.partition(".")[0]
    if origin == "hydra" and isinstance(error.__cause__, _USER_ERRORS):
        return str(error.__cause__)
    if origin == "omegaconf":
        return str(error).partition("\n")[0]
    return str(error) if isinstance(error, _USER_ERRORS) else None


@user_errors
def check_choices(conf: Path, overrides: Sequence[str]) -> None:
    """Refuse a choice that a nested configuration group does not have; Hydra lists the choices of flat groups only.

    Raises:
        SystemExit: with exit code 1, after one line that names the choices.

    """
    for override in overrides:
        group, _, values = override.partition("=")
        if not (conf / group).is_dir() or "/" not in values:
            continue
        known = sorted(path.relative_to(conf / group).with_suffix("").as_posix() for path in (conf / group).rglob("*.yaml"))
        for value in values.split(","):
            if value not in known:
                raise ValueError(f"no {group} {value!r}: {did_you_mean(value, known)} There is {', '.join(known)}")


@user_errors
def main() -> None:
    """Run the command line."""
    app()


@app.command("list")
def list_(
    bank: _BankOption = _DEFAULT,
    kind: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(KINDS)}.")] = None,
    pattern: Annotated[str | None, typer.Argument(help="Only names that match, such as 'walker/*'.")] = None,
) -> None:
    """List the newest version of every name."""
    newest = {entry.ref.name: entry for entry in Bank(bank).list(kind, pattern)}
    columns = {
        "ref": [str(entry.ref) for entry in newest.values()],
        "metrics": [_metrics(entry.card) for entry in newest.values()],
        "kind": [entry.card.kind for entry in newest.values()],
        "base": [_base(entry.card) for entry in newest.values()],
        "parents": [str(len(entry.card.parents) or "") for entry in newest.values()],
        "created": [entry.card.created[:10] for entry in newest.values()],
    }
    _print_fitting(columns)


@app.command()
def show(ref: str, bank: _BankOption = _DEFAULT) -> None:
    """Show the card of one version."""
    store = Bank(bank)
    exact = store.resolve(ref)
    card = store.card(exact)
    table = _table("field", "value", title=str(exact))
    for key, value in _fields(card):
        table.add_row(key, value)
    for alias, number in store.aliases(exact.name).items():
        if number == exact.number:
            table.add_row("alias", alias)
    for name, entry in sorted(card.files.items()):
        table.add_row(f"file {name}", f"{entry['size']:,} bytes")
    _print(table)


@app.command()
def log(name: str, bank: _BankOption = _DEFAULT) -> None:
    """Show every version of a name, newest first, with aliases and parents."""
    store = Bank(bank)
    store.resolve(Ref(name))
    aliases = store.aliases(name)
    table = _table("ref", "aliases", "content", "base", "parents", "metrics", "created")
    for number in reversed(store.versions(name)):
        card = store.card(Ref(name, number))
        parents = ", ".join(map(weighted, card.parents))
        marks = ", ".join(alias for alias, each in aliases.items() if each == number)
        table.add_row(str(Ref(name, number)), marks, card.hash[:12], _base(card), parents, _metrics(card), card.created)
    _print(table)


@app.command()
def verify(ref: Annotated[str | None, typer.Argument(help="One version; the whole bank without it.")] = None, bank: _BankOption = _DEFAULT) -> None:
    """Check every byte of a version, or of the bank; exit code 1 when something is wrong."""
    store = Bank(bank)
    problems = store.verify(ref)
    for problem in problems:
        typer.echo(str(problem), err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{store.resolve(ref)} is intact" if ref else f"{sum(len(numbers) for _, numbers in store.names())} versions are intact")


def _table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(highlight=False, markup=False).print(table)


def _print_fitting(columns: dict[str, list[str]]) -> None:
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


def _base(card: Card) -> str:
    return "" if card.base is None else card.base["ref"] or card.base["name"] or ""


def _metrics(card: Card) -> str:
    """The two most telling metrics: returns before losses, losses before the rest."""
    known = [key for key in _TELLING if key in card.metrics]
    others = [key for key, value in card.metrics.items() if key not in _TELLING and isinstance(value, int | float)]
    return ", ".join(f"{key} {card.metrics[key]:.5g}" for key in [*known, *others][:2])


def _fields(card: Card) -> list[tuple[str, str]]:
    rows = [("kind", card.kind), ("content", f"sha256:{card.hash}"), ("created", card.created)]
    if card.base is not None:
        rows += [("base", _base(card)), ("base fingerprint", card.base["fingerprint"] or "unknown")]
    rows += [("parent", weighted(each)) for each in card.parents]
    rows += [("notes", card.notes), ("tags", ", ".join(card.tags)), ("license", card.license or "")]
    for title, values in (("metric", card.metrics), ("data", card.data), ("conf", card.conf), ("tool", card.tools)):
        rows += [(f"{title} {key}", value) for key, value in flat(values)]
    return [(key, value) for key, value in rows if value]


if __name__ == "__main__":
    main()
