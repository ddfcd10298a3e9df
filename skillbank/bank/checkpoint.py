"""Bases whose weights stay where they are: the safetensors files of a Hub repository at a revision, or of a folder, known by their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Checkpoint", "weight_hasher"]

_LONGEST_HEADER = 100_000_000
_CHUNK = 2**22
_DTYPES = {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES |= {f"{letter}{bits}": f"{word}{bits}" for letter, word in {"F": "float", "I": "int", "U": "uint"}.items() for bits in (8, 16, 32, 64)}
"""Safetensors' words and torch's."""


def weight_hasher(dtype: str, shape: tuple[int, ...]) -> Any:
    """SHA-256 that knows dtype (in torch's words) and shape of a weight already; its bytes are to follow."""
    return hashlib.sha256(f"\0{dtype}\0{shape}\0".encode())


@dataclass(frozen=True)
class Checkpoint:
    """A base by reference. It can be put into a bank like a base; skills on it link to it, and nothing of its size is copied.

    Args:
        repo: id of a Hub repository, or path of a folder.
        revision: commit of the repository; None for a folder.
        files: `{name: {"sha256", "size"}}` of its safetensors files.
        weights: `{tensor name: SHA-256 over dtype, shape and bytes}`, from which the fingerprint of any skill's base follows.

    Raises:
        ValueError: fields of other types.

    """

    repo: str
    revision: str | None
    files: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, str]

    def __post_init__(self) -> None:
        entries = self.files.values() if isinstance(self.files, Mapping) else [None]
        plain = all(isinstance(each, Mapping) and set(each) == {"sha256", "size"} for each in entries)
        named = isinstance(self.weights, Mapping) and all(isinstance(each, str) for each in self.weights.values())
        if not (plain and named and isinstance(self.repo, str) and isinstance(self.revision, str | None)):
            raise ValueError("a checkpoint is a repo, a revision, files with sha256 and size, and a digest per weight: make one with Checkpoint.scan")

    @classmethod
    def scan(cls, folder: str | Path, *, repo: str | None = None, revision: str | None = None, workers: int | None = None) -> Checkpoint:
        """Hash the safetensors files of a folder and the tensors in them; every byte is read once.

        Args:
            folder: where the files are. In the Hub's own cache, repository and revision are told by the path.
            repo: id of the Hub repository; None is what the path tells, else the path.
            revision: its commit; None is what the path tells.
            workers: threads, one file each.

        Raises:
            FileNotFoundError: there are no safetensors files.
            ValueError: a file is damaged, or a tensor is in two files.

        """
        folder = Path(folder)
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no safetensors files in {str(folder)!r}: give the folder of a checkpoint; pickle (.bin, .pt) is not read")
        with ThreadPoolExecutor(workers) as pool:
            scanned = list(pool.map(_scan, paths))
        weights: dict[str, str] = {}
        for path, (_, found) in zip(paths, scanned, strict=True):
            if twice := sorted(set(weights) & set(found)):
                raise ValueError(f"{str(path)!r} holds the tensor {twice[0]!r}, which another file holds too: keep one of them")
            weights |= found
        files = {path.name: entry for path, (entry, _) in zip(paths, scanned, strict=True)}
        told = _told(folder)
        return cls(repo or told[0] or str(folder.resolve()), revision or (told[1] if repo is None else None), files, weights)

    def differences(self, folder: str | Path) -> list[str]:
        """What is not the same in a folder: names of files, each with what is wrong; nothing if the checkpoint is there, whole."""
        found = Checkpoint.scan(folder).files
        wrong = [f"{name} is missing" for name in sorted(set(self.files) - set(found))]
        return wrong + [f"{name} is another" for name in sorted(set(self.files) & set(found)) if dict(found[name]) != dict(self.files[name])]


def _told(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit by a path in the Hub's cache, `models--org--name/snapshots/<commit>`."""
    parts = folder.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return None, None


def _scan(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Hash and size of a file, and the digests of its tensors."""
    whole, size = hashlib.sha256(), path.stat().st_size
    weights: dict[str, str] = {}
    with path.open("rb") as file:
        for name, entry in _header(path, file, size, whole.update):
            digest = weight_hasher(_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                if not (chunk := file.read(min(left, _CHUNK))):
                    raise ValueError(f"{str(path)!r} ends in the middle of {name!r}")
                left -= len(chunk)
                whole.update(chunk)
                digest.update(chunk)
            weights[name] = digest.hexdigest()
    return {"sha256": whole.hexdigest(), "size": size}, weights


def _header(path: Path, file: BinaryIO, size: int, seen: Callable[[bytes], object]) -> Iterator[tuple[str, Any]]:
    """Tensors of a safetensors file in the order of their bytes, which lie side by side up to the end of the file."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"{str(path)!r} is no safetensors file: its header has {length} bytes, the file {size}")
    text = file.read(length)
    seen(start + text)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        ordered = sorted(entries.items(), key=lambda each: each[1]["data_offsets"])
        ends = [0, *(entry["data_offsets"][1] for _, entry in ordered)]
        begins = [entry["data_offsets"][0] for _, entry in ordered if entry["dtype"] and entry["shape"] is not None]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{str(path)!r} is no safetensors file: its header cannot be read") from None
    if begins != ends[:-1] or ends[-1] != size - 8 - length:
        raise ValueError(f"{str(path)!r} is no safetensors file: its tensors overlap, or leave bytes between or behind them")
    yield from ordered
