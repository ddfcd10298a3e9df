"""Tensors in files: safetensors, written beside and renamed, so that a file is either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["TensorWriter", "load_tensors", "save_tensors", "whole_folder"]

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_ENTRY = 200
"""Bytes in the header that a tensor takes beside its name, at most."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write tensors and string notes to `path`, atomically; the same input gives the same bytes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the umask gives; safetensors makes files that only their owner can read
        save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, beside, dict(notes) if notes else None)
        beside.chmod(mode)
        os.replace(beside, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"cannot be written: {error}", str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


class TensorWriter:
    """A safetensors file that is written tensor by tensor, so that one of them is in memory.

    Args:
        file: open for binary writing, at its start.
        names: of the tensors that may come.
        notes: string notes.

    """

    def __init__(self, file: BinaryIO, names: Iterable[str], notes: Mapping[str, str] | None = None) -> None:
        self._file = file
        self._header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
        self._room = -(-(len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _ENTRY for name in names)) // 8) * 8
        self._end = 0
        file.write(b"\0" * (8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of 16, 32 or 64 bits of floating point."""
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        start, self._end = self._end, self._end + len(flat)
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self._end]}

    def close(self) -> None:
        """Write where everything is; before that the file is none of safetensors."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, that becomes it when the block ends and is gone when it fails: nobody sees half of one.

    Raises:
        FileExistsError: the folder holds something.

    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} holds something already: export to another folder")
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_tensors(path: Path, *, trusted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (on the CPU) and notes of a safetensors file; one that is `trusted` was read before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no safetensors file.

    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not trusted:
                _check_header(path)
            return tensors, file.metadata() or {}
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


def _check_header(path: Path) -> None:
    """Check that every name is there once, which safetensors does not ask."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=lambda pairs: _once(path, pairs))


def _once(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{path} has a name in its header twice: {[name for name, _ in pairs][:20]}")
    return found
