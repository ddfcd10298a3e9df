"""What the benchmarks have in common: their options, where results lie, and what is said of the machine beside them."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["QUICK", "by_threads", "commit", "complete", "conf", "load", "once", "parser", "so_far", "store", "study_options", "where"]

Row = dict[str, Any]
QUICK = ("fit.steps=3", "batch_size=8")
"""Overrides of a training that is only to show that it runs."""


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Options that all have: `--quick`, whose help is given, and `--from-results`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"{quick}; stores nothing")
    made.add_argument("--from-results", action="store_true", help="print what is stored and run nothing")
    return made


def load(path: Path) -> list[Row]:
    """Rows of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def so_far(path: Path) -> list[Row]:
    """Rows of a file of results, none where there is none yet."""
    return load(path) if path.exists() else []


def study_options(parser: argparse.ArgumentParser, rows: Iterable[str], seeds: int) -> None:
    """Options of a study that is computed row by row: which rows, which of its training seeds, and how many threads."""
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(seeds)))
    parser.add_argument("--threads", type=int, default=1)


def complete(path: Path, cells: Iterable[tuple[str, int, Callable[[], Row]]], said: Callable[[Row], str]) -> None:
    """Compute what a file of results lacks of some (name, seed, how to), each written as soon as it is there; others may write to it as well."""

    def there(name: str, seed: int) -> bool:
        return any((each["name"], each["seed"]) == (name, seed) for each in so_far(path))

    for name, seed, compute in cells:
        if there(name, seed):
            continue
        row = compute()
        print(f"== {name} seed {seed}: {said(row)}", flush=True)
        path.parent.mkdir(exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not there(name, seed):  # others may have computed the same meanwhile
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def conf(entry: str, *overrides: str) -> Any:
    """Configuration of train.py or compose.py with some overrides."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base=None):
        return compose(entry, list(overrides))


def once(bank: Any, name: str, make: Callable[[], str], used: dict[str, str]) -> str:
    """Reference of what a study's bank has under a name, made if it has not; its hash goes into `used`, by the name."""
    try:
        ref = str(bank.resolve(name))
    except (FileNotFoundError, KeyError):
        print(f"-- {name}", flush=True)
        ref = make()
    used[name] = bank.card(ref).hash[:12]
    return ref


def store(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of results, a row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def commit() -> str:
    """Of this repository, in short."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def where() -> Row:
    """Machine, torch and commit, as they stand beside every result."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return {"device": (names or [platform.processor() or platform.machine()])[0], "torch": torch.__version__, "commit": commit()}


def by_threads(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of rows with `threads`, `values` and perhaps `method`."""
    from skillbank.report import markdown

    named = [{key: row[key] for key in ("threads", "method") if key in row} for row in rows]
    return markdown([{**name, **{key: f"{value:.3g}" for key, value in row["values"].items()}} for name, row in zip(named, rows, strict=True)])
