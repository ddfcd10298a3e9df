"""The command line: `skillbank list | show | log | alias | import | export | push | pull | similar | dedup | rm | gc | verify`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from skillbank.bank import Bank, Checkpoint, Ref, UnknownRef
from skillbank.bank.aliases import ANY, Expected
from skillbank.bank.card import KINDS, weighted
from skillbank.bank.query import field
from skillbank.display import card_fields, lineage_tree, new_table, print_fitting, print_json, print_one, print_parts, progress, telling
from skillbank.words import did_you_mean

__all__ = ["app", "check_choices", "main", "user_errors"]

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    help="A versioned bank of LoRA skills.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_BankOption = Annotated[str, typer.Option("--bank", envvar="SKILLBANK", help="Folder of the bank; to read, also a URL that fsspec knows.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
_UrlArgument = Annotated[str, typer.Argument(help="A folder, or a URL that fsspec knows, such as s3://bucket/bank or hf://user/repo.")]
_RefsArgument = Annotated[list[str] | None, typer.Argument(help="Which versions; all without.")]
_DEFAULT = "adapters"
_USER_ERRORS = (ValueError, UnknownRef, FileNotFoundError, FileExistsError, PermissionError, ConnectionError)


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
    base: Annotated[str | None, typer.Option(help="Only what belongs to this base.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only cards that fulfil this, such as 'metrics.return > 600' or 'tags ~ dmc'.")] = None,
    text: Annotated[str, typer.Option(help="Only cards that contain this, whatever the case.")] = "",
    sort: Annotated[str | None, typer.Option(help="By this field of the card, largest first, such as metrics.return.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version, not the newest of every name alone.")] = False,
    json: _JsonOption = False,
) -> None:
    """List the newest version of every name that is asked for."""
    entries = Bank(bank).list(kind, pattern, base=base, where=where or (), text=text)
    if not every:
        entries = list({entry.ref.name: entry for entry in entries}.values())
    if sort is not None:
        known = [(entry, value) for entry in entries if isinstance(value := field(entry.card, sort), int | float)]
        entries = [entry for entry, _ in sorted(known, key=lambda each: -each[1])]
    if json:
        print_json([{"ref": str(entry.ref), **asdict(entry.card)} for entry in entries])
        return
    columns = {
        "ref": [str(entry.ref) for entry in entries],
        "metrics": [telling(entry.card) for entry in entries],
        "kind": [entry.card.kind for entry in entries],
        "base": [entry.card.base_name for entry in entries],
        "parents": [str(len(entry.card.parents) or "") for entry in entries],
        "created": [entry.card.created[:10] for entry in entries],
    }
    print_fitting(columns)


@app.command()
def show(ref: str, bank: _BankOption = _DEFAULT, json: _JsonOption = False) -> None:
    """Show the card of one version."""
    store = Bank(bank)
    exact = store.resolve(ref)
    card = store.card(exact)
    if json:
        print_json({"ref": str(exact), **asdict(card)})
        return
    table = new_table("field", "value", title=str(exact))
    for key, value in card_fields(card):
        table.add_row(key, value)
    for alias, number in store.aliases(exact.name).items():
        if number == exact.number:
            table.add_row("alias", alias)
    for name, entry in sorted(card.files.items()):
        table.add_row(f"file {name}", f"{entry['size']:,} bytes")
    print_one(table)


@app.command()
def log(
    name: Annotated[str, typer.Argument(help="A name; with --graph any reference.")],
    bank: _BankOption = _DEFAULT,
    graph: Annotated[bool, typer.Option("--graph", help="Show what the version was made from, and that from what, with weights.")] = False,
) -> None:
    """Show every version of a name, newest first, with aliases and parents, and how the aliases moved."""
    store = Bank(bank)
    if graph:
        print_one(lineage_tree(store.lineage(name)))
        return
    store.resolve(Ref(name))
    aliases = store.aliases(name)
    table = new_table("ref", "aliases", "content", "base", "parents", "metrics", "created")
    for number in reversed(store.versions(name)):
        card = store.card(Ref(name, number))
        parents = ", ".join(map(weighted, card.parents))
        marks = ", ".join(alias for alias, each in aliases.items() if each == number)
        table.add_row(str(Ref(name, number)), marks, card.hash[:12], card.base_name, parents, telling(card), card.created)
    print_one(table)
    if moves := store.moves(name):
        table = new_table("when", "alias", "version", "protected")
        for move in reversed(moves):
            table.add_row(move.when, move.alias, "taken away" if move.version is None else str(move.version), "yes" if move.protected else "")
        print_one(table)


@app.command()
def alias(
    ref: Annotated[str, typer.Argument(help="The version to point at; with --delete, the name.")],
    alias: str,
    bank: _BankOption = _DEFAULT,
    expect: Annotated[int | None, typer.Option(help="Move it only if it points at this version now; 0: at nothing.")] = None,
    protect: Annotated[bool | None, typer.Option(help="From now on it moves only together with --no-protect.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
) -> None:
    """Point an alias at a version."""
    store = Bank(bank)
    exact = store.resolve(ref)
    expected: Expected = ANY if expect is None else expect or None
    store.alias(exact.name, alias, None if delete else exact.number, expect=expected, protect=protect)
    typer.echo(f"{exact.name}@{alias} is taken away" if delete else f"{exact.name}@{alias} is {exact}")


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="A PEFT adapter: a folder that save_pretrained wrote, or a repository on the Hub, such as user/repo.")
    ],
    name: Annotated[str, typer.Argument(help="The name that it gets.")],
    bank: _BankOption = _DEFAULT,
    base: Annotated[str | None, typer.Option(help="Its base in the bank.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Words to find it by.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    subfolder: Annotated[str, typer.Option(help="Where in the folder or the repository the adapter is.")] = "",
) -> None:
    """Put a PEFT LoRA adapter into the bank."""
    from skillbank.exchange import import_adapter

    ref = import_adapter(source, Bank(bank), name, base=base, card={"tags": tag or []}, revision=revision, subfolder=subfolder)
    typer.echo(str(ref))


@app.command()
def base(
    folder: Annotated[Path, typer.Argument(help="A checkpoint: a folder of safetensors files, such as a snapshot in the Hub's cache.")],
    name: Annotated[str, typer.Argument(help="The name that it gets.")],
    bank: _BankOption = _DEFAULT,
    repo: Annotated[str | None, typer.Option(help="Id of its Hub repository, where the path does not tell.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the repository, where the path does not tell.")] = None,
) -> None:
    """Put a base into the bank by its hashes; its weights stay where they are."""
    with progress("hash"):
        checkpoint = Checkpoint.scan(folder, repo=repo, revision=revision)
    typer.echo(str(Bank(bank).put(checkpoint, name)))


@app.command()
def export(
    ref: str,
    folder: Annotated[Path, typer.Argument(help="Where to; made here.")],
    bank: _BankOption = _DEFAULT,
    merged: Annotated[bool, typer.Option("--merged", help="The base's weights with the skill added, instead of an adapter.")] = False,
) -> None:
    """Write a skill or a merge as a PEFT adapter, or folded into its base."""
    from skillbank.exchange import export

    typer.echo(str(export(ref, folder, Bank(bank), merged=merged)))


@app.command()
def push(url: _UrlArgument, refs: _RefsArgument = None, bank: _BankOption = _DEFAULT) -> None:
    """Copy versions and what they stand on to a bank elsewhere; what is there already stays."""
    with progress("push") as done:
        sent = Bank(bank).push(url, *(refs or ()), done=done)
    typer.echo("\n".join([*map(str, sent), f"{len(sent)} pushed to {url}"]))


@app.command()
def pull(url: _UrlArgument, refs: _RefsArgument = None, bank: _BankOption = _DEFAULT) -> None:
    """Copy versions and what they stand on from a bank elsewhere, checked as they arrive."""
    with progress("pull") as done:
        got = Bank(bank).pull(url, *(refs or ()), done=done)
    typer.echo("\n".join([*map(str, got), f"{len(got)} pulled from {url}"]))


@app.command()
def clone(url: _UrlArgument, folder: Annotated[Path, typer.Argument(help="The new bank; it must not be there yet, or be empty.")]) -> None:
    """Copy a whole bank from elsewhere to a new folder; repeat a clone that was interrupted as `pull --bank`."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} holds something already: clone to another folder, or use `skillbank pull {url} --bank {folder}`")
    with progress("clone") as done:
        got = Bank(folder).pull(url, done=done)
    typer.echo(f"{len(got)} cloned from {url} to {folder}")


@app.command("similar")
def similar_(
    ref: str, bank: _BankOption = _DEFAULT, top: Annotated[int, typer.Option(help="At most this many.")] = 10, json: _JsonOption = False
) -> None:
    """Show the skills of the same base that are nearest by cosine of deltas."""
    from skillbank.search import similar

    found = similar(Bank(bank), ref, top=top)
    if json:
        print_json([{**asdict(each), "ref": str(each.ref)} for each in found])
        return
    table = new_table("ref", "cosine", "size", "columns", "rows")
    for each in found:
        table.add_row(str(each.ref), f"{each.cosine:.3f}", f"{each.size:.3g}", f"{each.columns:.3f}", f"{each.rows:.3f}")
    print_one(table)


@app.command()
def dedup(bank: _BankOption = _DEFAULT) -> None:
    """Show groups of skills that compute the same; nothing is removed."""
    from skillbank.search import duplicates

    groups = duplicates(Bank(bank))
    for group in groups:
        typer.echo(" ".join(map(str, group)))
    typer.echo(f"{len(groups)} groups")


@app.command()
def rm(
    ref: str,
    bank: _BankOption = _DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Even if versions or aliases need it.")] = False,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")] = "",
) -> None:
    """Take a version away for good; its number is never used again."""
    typer.echo(f"{Bank(bank).remove(ref, force=force, reason=reason)} is removed")


@app.command()
def gc(bank: _BankOption = _DEFAULT, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False) -> None:
    """Remove what interrupted processes left behind."""
    for path in (swept := Bank(bank).gc(dry_run=dry_run)):
        typer.echo(str(path))
    typer.echo(f"{len(swept)} {'to remove' if dry_run else 'removed'}")


@app.command()
def diff(one: str, two: str, bank: _BankOption = _DEFAULT, json: _JsonOption = False) -> None:
    """Show what differs between two versions: skills module by module, and their cards."""
    from skillbank.skill import Skill, distance

    store = Bank(bank)
    things = [store.get(ref) for ref in (one, two)]
    first, second = ({key: value for key, value in card_fields(store.card(ref)) if not key.startswith("tool ")} for ref in (one, two))
    both = [thing for thing in things if isinstance(thing, Skill)]
    apart = {name: value for name, value in distance(*both).items() if value} if len(both) == 2 else {}
    fields = {key: [first.get(key), second.get(key)] for key in (*first, *second) if first.get(key) != second.get(key)}
    if json:
        print_json({"distance": apart, "card": fields})
        return
    table = new_table("", str(store.resolve(one)), str(store.resolve(two)))
    for key, (left, right) in fields.items():
        table.add_row(key, left or "", right or "")
    print_one(table)
    if apart:
        print_parts("module", apart)


@app.command("rebuild")
def rebuild_(ref: str, bank: _BankOption = _DEFAULT, json: _JsonOption = False) -> None:
    """Make a version again from its card and compare, bit for bit; exit code 1 where it differs."""
    from skillbank.recipe import rebuild

    found = rebuild(ref, Bank(bank))
    if json:
        print_json({"ref": str(found.ref), "equal": found.equal, "differences": found.differences, "changed": found.changed})
    elif found.equal:
        typer.echo(f"{found.ref} is bit-equal")
    else:
        print_parts(f"differs in {found.ref}", found.differences)
        for what, how in found.changed.items():
            typer.echo(f"since it was made, {what} has changed: {how}")
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def verify(ref: Annotated[str | None, typer.Argument(help="One version; the whole bank without it.")] = None, bank: _BankOption = _DEFAULT) -> None:
    """Check every byte of a version, or of the bank; exit code 1 when something is wrong."""
    store = Bank(bank)
    with progress("verify") as done:
        problems = store.verify(ref, done=done)
    for problem in problems:
        typer.echo(str(problem), err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{store.resolve(ref)} is intact" if ref else f"{sum(len(numbers) for _, numbers in store.names())} versions are intact")


if __name__ == "__main__":
    main()
