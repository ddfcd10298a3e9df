"""Commands that look at a bank and change nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from skillbank.bank import Bank, Card, Ref
from skillbank.bank.card import KINDS, weighted
from skillbank.bank.index import Entry
from skillbank.bank.query import field
from skillbank.bank.refs import UnknownRef
from skillbank.cli.app import DEFAULT, BankOption, JsonOption, RefArgument, app, complete_ref
from skillbank.display import answer, card_fields, lineage_tree, new_table, print_fitting, print_json, print_one, print_parts, progress, telling

__all__ = ["dedup", "diff", "list_", "log", "methods", "rebuild_", "search_", "show", "similar_", "verify"]


@app.command("list")
def list_(
    bank: BankOption = DEFAULT,
    kind: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(KINDS)}.")] = None,
    pattern: Annotated[str | None, typer.Argument(help="Only names that match, such as 'walker/*'.")] = None,
    base: Annotated[str | None, typer.Option(help="Only what belongs to this base.", autocompletion=complete_ref)] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only cards that fulfil this, such as 'metrics.return > 600' or 'tags ~ dmc'.")] = None,
    text: Annotated[str, typer.Option(help="Only cards that contain this, whatever the case.")] = "",
    sort: Annotated[str | None, typer.Option(help="By this field of the card, largest first, such as metrics.return.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version, not the newest of every name alone.")] = False,
    json: JsonOption = False,
) -> None:
    """List the newest version of every name that is asked for; of one whose card is damaged a line on stderr tells."""
    entries = Bank(bank).list(kind, pattern, base=base, where=where or (), text=text, damaged=_tell)
    shown: dict[object, Entry] = {}
    for entry in reversed(entries):
        if (key := entry.ref if every else entry.name) not in shown and _is_readable(entry):
            shown[key] = entry
    entries = list(shown.values())[::-1]
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


def _tell(said: object) -> None:
    typer.echo(f"skillbank: {said}", err=True)


def _is_readable(entry: Entry) -> bool:
    """Whether a version is still there and its card can be read now; where it was damaged since it was listed first, a line on stderr tells."""
    try:
        return bool(entry.card)
    except UnknownRef:
        return False
    except ValueError as error:
        _tell(error)
        return False


@app.command()
def show(ref: RefArgument, bank: BankOption = DEFAULT, json: JsonOption = False) -> None:
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
    name: Annotated[str, typer.Argument(help="A name; with --graph any reference.", autocompletion=complete_ref)],
    bank: BankOption = DEFAULT,
    graph: Annotated[bool, typer.Option("--graph", help="Show what the version was made from, and that from what, with weights.")] = False,
    json: JsonOption = False,
) -> None:
    """Show every version of a name, newest first, with aliases and parents, and how the aliases moved."""
    store = Bank(bank)
    if graph:
        lineage = store.lineage(name)
        print_json(lineage) if json else print_one(lineage_tree(lineage))
        return
    store.resolve(Ref(name))
    marks: dict[int, list[str]] = {}
    for alias, number in store.aliases(name).items():
        marks.setdefault(number, []).append(alias)
    cards = {number: store.card(Ref(name, number)) for number in reversed(store.versions(name))}
    moves = list(reversed(store.moves(name)))
    if json:
        versions = [{"ref": str(Ref(name, number)), "aliases": marks.get(number, []), **asdict(card)} for number, card in cards.items()]
        print_json({"name": name, "versions": versions, "moves": [asdict(move) for move in moves]})
        return
    table = new_table("ref", "aliases", "content", "base", "parents", "metrics", "created")
    for number, card in cards.items():
        parents = ", ".join(map(weighted, card.parents))
        shown = (str(Ref(name, number)), ", ".join(marks.get(number, [])), card.hash[:12], card.base_name, parents, telling(card), card.created)
        table.add_row(*shown)
    print_one(table)
    if moves:
        table = new_table("when", "alias", "version", "protected")
        for move in moves:
            table.add_row(move.when, move.alias, "taken away" if move.version is None else str(move.version), "yes" if move.protected else "")
        print_one(table)


@app.command("similar")
def similar_(
    ref: RefArgument, bank: BankOption = DEFAULT, top: Annotated[int, typer.Option(help="At most this many.")] = 10, json: JsonOption = False
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


@app.command("search")
def search_(
    examples: Annotated[str, typer.Option(help="Records of the task: a .jsonl, .json or .parquet file, or hub:<data set>.")],
    base: Annotated[str, typer.Option(help="Whose skills to look at.", autocompletion=complete_ref)],
    bank: BankOption = DEFAULT,
    top: Annotated[int, typer.Option(help="At most this many.")] = 5,
    diversity: Annotated[float, typer.Option(help="No two with a cosine of deltas above 1 less this.")] = 0.1,
    by: Annotated[str, typer.Option(help="loss: the mean; better: the share of examples on which a skill beats the base.")] = "loss",
    pattern: Annotated[str | None, typer.Option(help="Only names that match, such as 'walker/*'.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Find the skills that do best on a few examples of a new task, no two of them nearly the same."""
    from skillbank.kshot import best_skills

    found = best_skills(Bank(bank), base, examples, top=top, diversity=diversity, by=cast("Any", by), pattern=pattern, device=device)
    if json:
        print_json([{**asdict(each), "ref": str(each.ref)} for each in found])
        return
    table = new_table("ref", "loss", "margin", "better", "cosine")
    for each in found:
        table.add_row(str(each.ref), f"{each.loss:.4g}", f"{each.margin:+.4g}", f"{each.better:.0%}", f"{each.cosine:.3f}")
    print_one(table)


@app.command()
def dedup(bank: BankOption = DEFAULT, json: JsonOption = False) -> None:
    """Show groups of skills that compute the same; nothing is removed."""
    from skillbank.search import duplicates

    groups = [[str(ref) for ref in group] for group in duplicates(Bank(bank))]
    answer(json, groups, *(" ".join(group) for group in groups), f"{len(groups)} groups")


@app.command()
def diff(one: RefArgument, two: RefArgument, bank: BankOption = DEFAULT, json: JsonOption = False) -> None:
    """Show what differs between two versions: skills module by module, and their cards."""
    from skillbank.skill import Skill, distance

    store = Bank(bank)
    things = [store.get(ref) for ref in (one, two)]
    first, second = (_fields(store.card(ref)) for ref in (one, two))
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


def _fields(card: Card) -> dict[str, str]:
    """What a card says by label, without tools; all its parents in one."""
    found: dict[str, str] = {}
    for key, value in card_fields(card):
        found[key] = f"{found[key]}, {value}" if key in found else value
    return {key: value for key, value in found.items() if not key.startswith("tool ")}


@app.command("rebuild")
def rebuild_(ref: RefArgument, bank: BankOption = DEFAULT, json: JsonOption = False) -> None:
    """Make a version again from its card and compare, bit for bit; exit code 1 where it differs."""
    from skillbank.reproduce import rebuild

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


@app.command("eval")
def eval_(
    refs: Annotated[list[str], typer.Argument(help="Versions.", autocompletion=complete_ref)],
    bank: BankOption = DEFAULT,
    task: Annotated[str | None, typer.Option(help="A version whose task they are evaluated on; without it each on its own.")] = None,
    examples: Annotated[str | None, typer.Option(help="Records to evaluate on instead: .jsonl, .json or .parquet.")] = None,
    by: Annotated[str | None, typer.Option(help="A key of the records: a row for each of its values, too.")] = None,
    level: Annotated[str | None, typer.Option(help="Skills together at these levels: merge,gate,logits,emulated,vote,rerank,in_context.")] = None,
    large: Annotated[str | None, typer.Option(help="Base that level emulated moves.", autocompletion=complete_ref)] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes, or records, of an evaluation.")] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of the lm-evaluation-harness instead, such as arc_easy,piqa.")] = None,
    include: Annotated[str | None, typer.Option(help="Folder of further tasks of the harness.")] = None,
    device: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Evaluate versions, or skills together, on a task, on examples, or with the lm-evaluation-harness."""
    from skillbank.evaluation import evaluate, run_harness
    from skillbank.report import markdown

    if harness is not None:
        rows = run_harness(refs, Bank(bank), harness.split(","), limit=episodes, include=include, device=device)
        answer(json, rows, markdown(rows))
        return
    levels = () if level is None else level.split(",")
    rows = evaluate(refs, Bank(bank), task=task, examples=examples, by=by, levels=levels, large=large, episodes=episodes, device=device)
    answer(json, rows, markdown(rows))


@app.command("forget")
def forget_(
    ref: RefArgument,
    examples: Annotated[str, typer.Option(help="Records of what is to be forgotten: .jsonl, .json or .parquet.")],
    retain: Annotated[str, typer.Option(help="Records of what is to be kept.")],
    way: Annotated[str, typer.Option(help="Of adjust, abstain and negate.")] = "adjust,abstain",
    skill: Annotated[str | None, typer.Option(help="What negate subtracts; the version itself without it.", autocompletion=complete_ref)] = None,
    share: Annotated[float, typer.Option(help="Of the neurons, for adjust.")] = 0.05,
    alpha: Annotated[float | None, typer.Option(help="Half width of the boxes of abstain, in deviations.")] = None,
    weight: Annotated[float, typer.Option(help="Of what negate subtracts.")] = 1.0,
    bank: BankOption = DEFAULT,
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Evaluate a language model before and after a skill is taken from it; nothing is stored."""
    from skillbank.evaluation import forget
    from skillbank.report import markdown

    ways = way.split(",")
    rows = forget(ref, Bank(bank), examples, retain, ways=ways, skill=skill, share=share, alpha=alpha, weight=weight, device=device)
    answer(json, rows, markdown(rows))


@app.command()
def methods(markdown: Annotated[bool, typer.Option("--markdown", help="As the table of docs/merge.md.")] = False, json: JsonOption = False) -> None:
    """List the merge methods."""
    from skillbank.merge import described

    rows = described()
    if json:
        print_json(rows)
        return
    if markdown:
        from skillbank.report import markdown as as_markdown

        typer.echo(as_markdown([{key: value.replace("|", "\\|") for key, value in row.items()} for row in rows]))
        return
    table = new_table("method", "what it does", "options", "source")
    for row in rows:
        table.add_row(*(row[key] for key in ("method", "what it does", "options", "source")))
    print_one(table)


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="One version; the whole bank without it.", autocompletion=complete_ref)] = None,
    bank: BankOption = DEFAULT,
    json: JsonOption = False,
) -> None:
    """Check every byte of a version, or of the bank; exit code 1 when something is wrong."""
    store = Bank(bank)
    with progress("verify") as done:
        problems = store.verify(ref, done=done)
    count = 1 if ref else sum(len(numbers) for _, numbers in store.names())
    for problem in problems:
        typer.echo(str(problem), err=True)
    if json or not problems:
        found: list[dict[str, Any]] = [asdict(problem) for problem in problems]
        whole = f"{store.resolve(ref)} is intact" if ref else f"{count} versions are intact"
        answer(json, {"versions": count, "problems": found}, whole)
    if problems:
        raise typer.Exit(1)
