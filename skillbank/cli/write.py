"""Commands that write: to a bank, or something of it elsewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from skillbank.bank import Bank, Checkpoint, UnknownRef
from skillbank.bank.aliases import ANY, Expected
from skillbank.cli.app import DEFAULT, BankOption, JsonOption, RefArgument, RefsArgument, UrlArgument, app, complete_ref
from skillbank.display import answer, new_table, print_certificate, print_json, print_one, progress
from skillbank.words import did_you_mean

__all__ = ["alias", "base", "clone", "discover", "export", "gc", "import_", "merge", "pull", "push", "rm"]


@app.command()
def alias(
    ref: Annotated[str, typer.Argument(help="The version to point at; with --delete, the name.", autocompletion=complete_ref)],
    alias: str,
    bank: BankOption = DEFAULT,
    expect: Annotated[int | None, typer.Option(help="Move it only if it points at this version now; 0: at nothing.")] = None,
    protect: Annotated[bool | None, typer.Option(help="From now on it moves only together with --no-protect.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
    json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    store = Bank(bank)
    exact = store.resolve(ref)
    expected: Expected = ANY if expect is None else expect or None
    if delete and alias not in (known := store.aliases(exact.name)):
        raise UnknownRef(f"{exact.name!r} has no alias {alias!r} in {store}: {did_you_mean(alias, known)}")
    now = store.alias(exact.name, alias, None if delete else exact.number, expect=expected, protect=protect)
    value = {"name": exact.name, "alias": alias, "ref": None if now is None else str(now)}
    answer(json, value, f"{exact.name}@{alias} is {'taken away' if now is None else now}")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with a LoRA of PEFT, AdapterHub's adapters or mttl as safetensors, or a repository on the Hub, such as user/repo."
        ),
    ],
    name: Annotated[str, typer.Argument(help="The name that it gets.")],
    bank: BankOption = DEFAULT,
    base: Annotated[str | None, typer.Option(help="Its base in the bank.", autocompletion=complete_ref)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Words to find it by.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    subfolder: Annotated[str, typer.Option(help="Where in the folder or the repository the adapter is.")] = "",
    scale: Annotated[float, typer.Option(help="Multiplies every delta, to make up for a scale that is wrong.")] = 1.0,
    json: JsonOption = False,
) -> None:
    """Put a LoRA adapter into the bank; what looks wrong about its scale is told on stderr."""
    from skillbank.exchange import import_adapter
    from skillbank.lints import Lint

    store = Bank(bank)
    card = {"tags": tag or []}
    ref = import_adapter(source, store, name, base=base, card=card, scale=scale, revision=revision, subfolder=subfolder)
    lints = store.card(ref).conf.get("import", {}).get("lints", [])
    for lint in lints:
        typer.echo(f"skillbank: {Lint(**lint)}", err=True)
    answer(json, {"ref": str(ref), "lints": lints}, str(ref))


@app.command()
def base(
    folder: Annotated[Path, typer.Argument(help="A checkpoint: a folder of safetensors files, such as a snapshot in the Hub's cache.")],
    name: Annotated[str, typer.Argument(help="The name that it gets.")],
    bank: BankOption = DEFAULT,
    repo: Annotated[str | None, typer.Option(help="Id of its Hub repository, where the path does not tell.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the repository, where the path does not tell.")] = None,
    json: JsonOption = False,
) -> None:
    """Put a base into the bank by its hashes; its weights stay where they are."""
    with progress("hash"):
        checkpoint = Checkpoint.scan(folder, repo=repo, revision=revision)
    ref = str(Bank(bank).put(checkpoint, name))
    answer(json, {"ref": ref}, ref)


@app.command()
def merge(
    refs: Annotated[list[str], typer.Argument(help="Skills; with --to, folders of PEFT adapters.", autocompletion=complete_ref)],
    bank: BankOption = DEFAULT,
    method: Annotated[str, typer.Option(help="A name in the list of `skillbank methods`.")] = "stack",
    weights: Annotated[str | None, typer.Option(help="One per skill, such as .6,-.4; or {'pattern': weight} for one.")] = None,
    rank: Annotated[int | None, typer.Option(help="At most this many directions per module.")] = None,
    error: Annotated[float | None, typer.Option(help="Instead: as few as keep the relative error within this.")] = None,
    budget: Annotated[int | None, typer.Option(help="Instead: this many over all modules.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="What else the method takes, such as density=0.3.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Its name in the bank; without one it is only looked at.")] = None,
    to: Annotated[Path | None, typer.Option(help="Instead: from folders of PEFT adapters to a folder, without a bank.")] = None,
    json: JsonOption = False,
) -> None:
    """Merge skills to a new one, and tell what that does to them."""
    if to is not None and output is not None:
        raise ValueError("--to writes to a folder and --output to the bank: give one of them")
    if wrong := [each for each in option or [] if not re.fullmatch(r"\w+=.+", each)]:
        raise ValueError(f"--set {wrong[0]!r} sets nothing: write it as density=0.3")
    pairs = dict(each.split("=", 1) for each in option or [])
    options = {key: _value(text) for key, text in pairs.items()}
    own = {"rank": rank, "error": error, "budget": budget}
    if doubled := sorted({key for key, value in own.items() if value is not None} & set(options) | {"method", "weights"} & set(options)):
        raise ValueError(f"--set {doubled[0]}=... is what --{doubled[0]} is for: give it there")
    given = options | {key: value for key, value in own.items() if value is not None}
    values = None if weights is None else _value(f"[{weights}]")
    if not all(isinstance(each, int | float | dict) for each in values or []) or isinstance(values, str):
        raise ValueError(f"--weights {weights!r} are no numbers: write them as .6,-.4")
    try:
        if to is None:
            made, certificate, names = _merged(Bank(bank), refs, output, values, method, given)
        else:
            from skillbank.merge import merge_adapters

            made, names = str(to), refs
            certificate = merge_adapters(refs, to, weights=values, method=method, **given).to_dict()
    except TypeError as error_:
        raise ValueError(f"{method!r} cannot do with {given}: {error_}") from error_
    if json:
        print_json({"ref" if to is None else "folder": made, "certificate": certificate})
    else:
        print_certificate(certificate, names)
        if made is not None:
            typer.echo(made)


def _merged(
    store: Bank, refs: list[str], output: str | None, weights: Any, method: str, options: dict[str, Any]
) -> tuple[str | None, dict[str, Any], list[str]]:
    """Reference of the merge in the bank if it has a name there, its certificate, and the exact skills."""
    from skillbank.recipe import merge_versions

    skill, card, adapter = merge_versions(refs, store, weights=weights, method=method, **options)
    ref = None if output is None else str(store.put(skill, output, card=card, adapter=adapter))
    return ref, card["conf"]["certificate"], [str(store.resolve(each)) for each in refs]


def _value(text: str) -> Any:
    """Number, list, mapping or constant of Python; everything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@app.command()
def discover(
    demonstrations: Annotated[str, typer.Argument(help="Whole episodes: .npz, .hdf5 or .h5, or minari:<id>.")],
    base: Annotated[str, typer.Option(help="A base that acts in the same environment.", autocompletion=complete_ref)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the demonstrations of every skill that is found: 0.npz, 1.npz, ...")],
    bank: BankOption = DEFAULT,
    known: Annotated[list[str] | None, typer.Option(help="A skill that is known besides the base.", autocompletion=complete_ref)] = None,
    skills: Annotated[int | None, typer.Option(help="How many there are; chosen without it.")] = None,
    minimum: Annotated[int, typer.Option(help="Steps of the shortest segment.")] = 60,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Cut demonstrations that hold several skills where the errors of known policies change, and sort the pieces into a file for each skill."""
    from skillbank.discovery import discover
    from skillbank.load import load
    from skillbank.tasks.demonstrations import load_demonstrations

    store = Bank(bank)
    models = [load(ref, store, device) for ref in (base, *(known or []))]
    found = discover(load_demonstrations(demonstrations), models, skills=skills, minimum=minimum)
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{number}.npz" for number in range(len(found))]
    for each, path in zip(found, paths, strict=True):
        each.save(path)
    if json:
        print_json([{"path": str(path), **each.lineage} for path, each in zip(paths, found, strict=True)])
        return
    table = new_table("file", "segments", "steps", "reward per step", "first ones (episode: steps)")
    for path, each in zip(paths, found, strict=True):
        steps, reward = f"{len(each.demonstrations.rewards):,}", f"{each.demonstrations.rewards.mean():.3f}"
        table.add_row(str(path), str(len(each.segments)), steps, reward, ", ".join(f"{s.episode}: {s.first}-{s.last}" for s in each.segments[:4]))
    print_one(table)


@app.command()
def export(
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(help="Where to; made here.")],
    bank: BankOption = DEFAULT,
    merged: Annotated[bool, typer.Option("--merged", help="The base's weights with the skill added, instead of an adapter.")] = False,
    weights: Annotated[Path | None, typer.Option(help="With --merged: where the files of a base are that the bank knows by its hashes.")] = None,
    json: JsonOption = False,
) -> None:
    """Write a skill or a merge as a PEFT adapter, or folded into its base."""
    from skillbank.exchange import export

    store = Bank(bank)
    written = str(export(ref, folder, store, merged=merged, weights=weights))
    answer(json, {"ref": str(store.resolve(ref)), "folder": written}, written)


@app.command()
def push(
    url: Annotated[
        str, typer.Argument(help="A folder, a URL that fsspec knows, such as s3://bucket/bank or hf://user/repo, or wandb://[entity/]project.")
    ],
    refs: RefsArgument = None,
    bank: BankOption = DEFAULT,
    json: JsonOption = False,
) -> None:
    """Copy versions and what they stand on to a bank elsewhere, where what is there already stays; or log them as W&B artifacts."""
    store = Bank(bank)
    with progress("push") as done:
        if url.startswith("wandb://"):
            from skillbank.artifacts import log_artifacts, wandb_mode

            entity, _, project = url.removeprefix("wandb://").rpartition("/")
            sent = log_artifacts(store, refs or (), project=project, entity=entity or None, done=done)
            if wandb_mode() == "offline":
                typer.echo("skillbank: not logged in, so that it stays in the folder wandb/ here; `wandb sync` uploads it", err=True)
        else:
            sent = store.push(url, *(refs or ()), done=done)
    named = [str(ref) for ref in sent]
    answer(json, {"url": url, "refs": named}, *named, f"{len(named)} pushed to {url}")


@app.command()
def pull(
    url: UrlArgument,
    refs: Annotated[list[str] | None, typer.Argument(help="Which versions; all without.")] = None,
    bank: BankOption = DEFAULT,
    json: JsonOption = False,
) -> None:
    """Copy versions and what they stand on from a bank elsewhere, checked as they arrive."""
    with progress("pull") as done:
        named = [str(ref) for ref in Bank(bank).pull(url, *(refs or ()), done=done)]
    answer(json, {"url": url, "refs": named}, *named, f"{len(named)} pulled from {url}")


@app.command()
def clone(
    url: UrlArgument, folder: Annotated[Path, typer.Argument(help="The new bank; it must not be there yet, or be empty.")], json: JsonOption = False
) -> None:
    """Copy a whole bank from elsewhere to a new folder; repeat a clone that was interrupted as `pull --bank`."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} holds something already: clone to another folder, or use `skillbank pull {url} --bank {folder}`")
    with progress("clone") as done:
        named = [str(ref) for ref in Bank(folder).pull(url, done=done)]
    answer(json, {"url": url, "folder": str(folder), "refs": named}, f"{len(named)} cloned from {url} to {folder}")


@app.command()
def rm(
    ref: RefArgument,
    bank: BankOption = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Even if versions or aliases need it.")] = False,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")] = "",
    json: JsonOption = False,
) -> None:
    """Take a version away for good; its number is never used again."""
    exact = str(Bank(bank).remove(ref, force=force, reason=reason))
    answer(json, {"ref": exact, "reason": reason}, f"{exact} is removed")


@app.command()
def gc(bank: BankOption = DEFAULT, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False, json: JsonOption = False) -> None:
    """Remove what interrupted processes left behind."""
    swept = [str(path) for path in Bank(bank).gc(dry_run=dry_run)]
    answer(json, {"paths": swept, "removed": not dry_run}, *swept, f"{len(swept)} {'to remove' if dry_run else 'removed'}")
