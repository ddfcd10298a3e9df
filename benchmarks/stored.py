"""What the benchmarks have in common: their options, where results lie, and what is said of the machine beside them."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["by_threads", "commit", "load", "parser", "store", "where"]

Row = dict[str, Any]


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Options that all have: `--quick`, whose help is given, and `--from-results`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"{quick}; stores nothing")
    made.add_argument("--from-results", action="store_true", help="print what is stored and run nothing")
    return made


def load(path: Path) -> list[Row]:
    """Rows of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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
