"""What the commands share: the app, options and arguments, what shells complete, and errors of one line."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from skillbank.bank import Bank, UnknownRef
from skillbank.words import did_you_mean

__all__ = [
    "DEFAULT",
    "BankOption",
    "JsonOption",
    "RefArgument",
    "RefsArgument",
    "UrlArgument",
    "app",
    "check_choices",
    "complete_ref",
    "user_errors",
]

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT = "adapters"
"""The bank, where neither --bank nor SKILLBANK names one."""


def complete_ref(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the bank that begin so; once a name is whole, also its versions and aliases. Nothing where the bank is elsewhere."""
    root = str(ctx.params.get("bank") or os.environ.get("SKILLBANK") or DEFAULT)
    if "://" in root:
        return []
    bank, (name, at, _) = Bank(root), incomplete.partition("@")
    try:
        found = [] if at else [each for each, _ in bank.names() if each.startswith(name)]
        if at or name in found:
            found += [f"{name}@{each}" for each in (*bank.aliases(name), *bank.versions(name))]
    except (ValueError, OSError):
        return []
    return [each for each in found if each.startswith(incomplete)]


app = typer.Typer(
    help="A versioned bank of LoRA skills.",
    epilog="Exit codes: 0, all is well; 1, something is wrong or cannot be done, as one line on stderr says; 2, wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
BankOption = Annotated[str, typer.Option("--bank", envvar="SKILLBANK", help="Folder of the bank; to read, also a URL that fsspec knows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
UrlArgument = Annotated[str, typer.Argument(help="A folder, or a URL that fsspec knows, such as s3://bucket/bank or hf://user/repo.")]
RefArgument = Annotated[str, typer.Argument(help="A version: a name, or name@number, name@alias, @sha256:digits.", autocompletion=complete_ref)]
RefsArgument = Annotated[list[str] | None, typer.Argument(help="Which versions; all without.", autocompletion=complete_ref)]
_USER_ERRORS = (ValueError, UnknownRef, OSError, FloatingPointError)


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
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {str(error.filename)!r}" if error.filename else "")
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
