"""Text to learn from: records of a prompt and its completion, of a conversation, or of plain text, from files or other data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Record", "digest_of", "kind_of", "read_records"]

Record = Mapping[str, Any]
"""`prompt` and `completion`, or `messages` [{role, content}, ...], or `text`, or `text` and `label`; what else is in it stays."""

Kinds = Sequence[tuple[str, ...]]

KINDS: Kinds = (("prompt", "completion"), ("messages",), ("text",))
"""What records of text have; the first that fits counts."""


def read_records(source: str | Path | Iterable[Record], columns: Mapping[str, str] | None = None, kinds: Kinds = KINDS) -> list[dict[str, Any]]:
    """Records of a file, of a data set on the Hub, or of any iterable of mappings, such as a data set of `datasets`.

    Args:
        source: path of `.jsonl` (a record per line), `.json` (a list) or `.parquet`; `hub:name` or `hub:name/split`; or the records themselves.
        columns: what is called otherwise, as `{"prompt": "question"}`.
        kinds: what a record may have.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: `datasets` is needed and not installed.
        ValueError: a line that is no JSON, no record at all, a record of none of the kinds, or one with nothing to learn.

    """
    name = str(source) if isinstance(source, str | Path) else "the records"
    rows = _rows(str(source)) if isinstance(source, str | Path) else [dict(row) for row in source]
    if not rows:
        raise ValueError(f"{name}: there are no records")
    renamed = {theirs: ours for ours, theirs in (columns or {}).items()}
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, record {i}: a record is a mapping, got {type(row).__name__}")
        taken = {ours for ours, theirs in (columns or {}).items() if theirs in row} - set(renamed)
        record = {renamed.get(str(key), str(key)): value for key, value in row.items() if key not in taken}
        if wrong := _fault(record, kinds):
            raise ValueError(f"{name}, record {i}: {wrong}")
        found.append(record)
    return found


def kind_of(record: Record, kinds: Kinds = KINDS) -> tuple[str, ...] | None:
    """The first of the kinds that a record has all keys of; None if there is none."""
    return next((kind for kind in kinds if all(key in record for key in kind)), None)


def digest_of(records: Iterable[Record], kinds: Kinds = KINDS) -> str:
    """SHA-256 of what is learned from records, in their order."""
    whole = hashlib.sha256()
    for record in records:
        whole.update(json.dumps([record[key] for key in kind_of(record, kinds) or ()], sort_keys=True).encode() + b"\n")
    return whole.hexdigest()


def _rows(source: str) -> list[Any]:
    if source.startswith("hub:"):
        name, _, split = source.removeprefix("hub:").rpartition("/") if source.count("/") > 1 else (source.removeprefix("hub:"), "", "train")
        return list(_datasets().load_dataset(name, split=split))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there are no examples at {source!r}: give a .jsonl, .json or .parquet file, or hub:<data set>")
    if path.suffix == ".parquet":
        return list(_datasets().load_dataset("parquet", data_files=str(path), split="train"))
    if path.suffix == ".json":
        return list(_parsed(path.read_text(encoding="utf-8"), source))
    if path.suffix != ".jsonl":
        raise ValueError(f"{source!r} is none of .jsonl, .json and .parquet: save the records in one of them")
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 within a text, too
    return [_parsed(line, f"{source}, line {i + 1}") for i, line in enumerate(lines) if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("parquet files and data sets of the Hub are read by `datasets`: pip install 'skillbank[text]'") from None
    return datasets


def _fault(record: Record, kinds: Kinds) -> str | None:
    """What is wrong with a record, if anything is."""
    kind = kind_of(record, kinds)
    if kind is None:
        *others, last = (" and ".join(kind) for kind in kinds)
        wanted = f"{', '.join(others)} or {last}" if others else last
        return f"it has {sorted(record)}: give {wanted}, or say with columns={{{kinds[0][0]!r}: ...}} what they are called"
    if kind == ("messages",):
        turns = record["messages"]
        plain = isinstance(turns, list) and all(
            isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn for turn in turns
        )
        if not plain:
            return "messages is a list of {role, content}"
        if not any(turn["role"] == "assistant" and turn["content"] for turn in turns):
            return "no message of the assistant says anything, so there is nothing to learn"
        return None
    if wrong := next((key for key in kind if not isinstance(record[key], str | int if key == "label" else str)), None):
        return f"{wrong} is a {'text or a whole number' if wrong == 'label' else 'text'}, got {type(record[wrong]).__name__}"
    return f"its {kind[-1]} is empty, so there is nothing to learn: leave the record out" if record[kind[-1]] == "" else None
