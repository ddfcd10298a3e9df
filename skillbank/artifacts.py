"""Versions as Weights & Biases artifacts, with their lineage: what a version stands on is an input of the run that logs it.

A bank's numbers and aliases become aliases of the artifacts; W&B's own `v0, v1, ...` and `latest` count the order in which they were logged. W&B
knows content by its digest, so that logging a version again makes no new one. Without a login everything stays in a local folder, which
`wandb sync` uploads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from skillbank.bank import Bank, Ref
from skillbank.bank.links import closure
from skillbank.bank.verify import check_whole

__all__ = ["artifact_name", "log_artifacts", "tracked", "wandb_mode"]

_PROJECT = "skillbank"


def log_artifacts(
    bank: Bank,
    refs: Sequence[str | Ref] = (),
    *,
    project: str = _PROJECT,
    entity: str | None = None,
    run: Any = None,
    done: Callable[[int, int], None] = lambda _so_far, _of: None,
) -> list[Ref]:
    """Log versions, and what they stand on, to W&B: one artifact per name, one version of it per version, a run each for the lineage.

    An artifact's type is the version's kind, its files are the version's and its metadata is the card; PEFT reads what is
    downloaded of a skill. Offline unless one is logged in.

    Args:
        bank: where they are.
        refs: which; all versions where none is named.
        project: of W&B.
        entity: user or team of W&B; None is the default one.
        run: a run that is open: only `refs` are logged, in it, and what they stand on are its inputs.
        done: called with the numbers of versions that are logged, and of all.

    Returns:
        What was logged, what the others stand on first.

    Raises:
        UnknownRef: no such version.
        ValueError: no project, wandb is not installed, a name that W&B does not take, or a version is damaged.

    """
    if not project:
        raise ValueError("no project: name one, such as wandb://skillbank or wandb://team/skillbank")
    if run is not None:
        wanted = [bank.resolve(ref) for ref in refs]
        for each in dict.fromkeys(each for ref in wanted for each in (*bank.card(ref).stands_on, str(ref))):
            check_whole(bank, Ref.parse(each))
        for ref in wanted:
            _log(run, bank, ref)
        return wanted
    wanted = closure(bank, refs)
    for count, ref in enumerate(wanted):
        done(count, len(wanted))
        check_whole(bank, ref)
        options = {"project": project, "entity": entity, "name": f"put {ref}", "job_type": "put", "config": dict(bank.card(ref).conf)}
        with _wandb().init(**options, mode=wandb_mode(), reinit="create_new", settings=_wandb().Settings(silent=True)) as opened:
            _log(opened, bank, ref)
    done(len(wanted), len(wanted))
    return wanted


@contextmanager
def tracked(conf: Mapping[str, Any], bank: Bank) -> Iterator[Callable[[str], None]]:
    """Open the W&B run of a configuration, if it asks for one, so that training and what is put are one run.

    Args:
        conf: as in conf/train.yaml or conf/compose.yaml.
        bank: where what was made is put.

    Yields:
        A function that logs the version of a reference.

    """
    if conf["logger"].get("tracker") != "wandb" or os.environ.get("RANK", "0") != "0":
        yield lambda _ref: None
        return
    with _wandb().init(project=_PROJECT, name=conf["name"], config=dict(conf), mode=wandb_mode()) as run:

        def log(ref: str) -> None:
            run.name = run.name if conf["name"] else ref
            run.summary.update(dict(bank.card(ref).metrics))
            log_artifacts(bank, [ref], run=run)

        yield log


def wandb_mode() -> str:
    """`online` if one is logged in, else `offline`."""
    return "online" if _wandb().api.api_key else "offline"


def artifact_name(name: str) -> str:
    """Name of an artifact: W&B takes no slash, so `walker/walk` is `walker.walk`; a dot is doubled, so that no two names become one."""
    return name.replace(".", "..").replace("/", ".")


def _log(run: Any, bank: Bank, ref: Ref) -> None:
    for link in bank.card(ref).stands_on:
        _use(run, *_artifact(bank, Ref.parse(link)))
    artifact, aliases = _artifact(bank, ref)
    run.log_artifact(artifact, aliases=aliases)


def _use(run: Any, artifact: Any, aliases: list[str]) -> None:
    """Make an artifact an input of a run; its content is uploaded only where W&B does not have it."""
    if not run.offline:
        run.use_artifact(artifact, aliases=aliases)
        return
    # `use_artifact` refuses offline runs, but the record that it would write is the same one, and `wandb sync` acts on it
    run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)


def _artifact(bank: Bank, ref: Ref) -> tuple[Any, list[str]]:
    card, folder = bank.card(ref), bank.path(ref)
    metadata = {"ref": str(ref), **asdict(card)}
    artifact = _wandb().Artifact(artifact_name(ref.name), card.kind, description=card.notes or None, metadata=metadata)
    for path in sorted(folder.iterdir()):
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    return artifact, [str(ref.number), *(alias for alias, number in bank.aliases(ref.name).items() if number == ref.number)]


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError("wandb is not installed: pip install 'skillbank[run]'") from None
    return wandb
