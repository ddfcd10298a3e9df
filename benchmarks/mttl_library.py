"""mttl's local expert library (PyPI's mttl 1.0.2), a peer of the bank; where it cannot be imported its figures are left out.

pip install --no-deps mttl pandas pytz python-dateutil prettytable azure-storage-blob azure-core azure-identity isodate pytorch-lightning \
    lightning-utilities torchmetrics bitsandbytes triton

Installed with its dependencies it takes the place of this project's torch and transformers. What it imports of `triton.ops`, for sparse masks,
went away with triton 3; its library does without.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from skillbank.skill import Factor


def _library() -> tuple[Any, Any, Any] | None:
    """Classes of the library, an expert and its description."""
    gone = ModuleType("triton.ops.blocksparse.matmul")
    for name in ("dsd_lut", "sdd_lut", "_matmul"):
        setattr(gone, name, None)
    package = ModuleType("triton.ops.blocksparse")
    package.__dict__["matmul"] = gone
    sys.modules.update({"triton.ops": ModuleType("triton.ops"), package.__name__: package, gone.__name__: gone})
    try:
        from mttl.models.library.expert import Expert, ExpertInfo
        from mttl.models.library.expert_library import LocalExpertLibrary
    except ImportError as error:
        print(f"mttl's library is left out: {error}")
        return None
    logging.disable(logging.WARNING)
    return LocalExpertLibrary, Expert, ExpertInfo


def growth(size: int, folder: Path, factors: Mapping[str, Factor]) -> dict[str, float]:
    """Opening a library of this size and reading one expert, and adding one, in milliseconds; nothing where there is no mttl."""
    found = _library()
    if found is None:
        return {}
    library, expert, info = found
    root, weights = (
        folder / f"mttl-{size}",
        {f"{name}.lora_{letter}": half for name, pair in factors.items() for letter, half in zip("ab", pair, strict=True)},
    )
    made = library(f"local://{root}", create=True)
    made.add_expert(expert(info("seed", expert_model="base"), weights))
    file = (root / "seed.ckpt").read_bytes()
    described = torch.load(root / "seed.meta", weights_only=False)
    for i in range(size - 1):
        (root / f"skill-{i}.ckpt").write_bytes(file)
        torch.save({**described, "expert_name": f"skill-{i}"}, root / f"skill-{i}.meta")
    started = time.perf_counter()
    opened = library(f"local://{root}")
    opened["seed"]
    opened_at = time.perf_counter()
    opened.add_expert(expert(info("new", expert_model="base"), weights))
    added_at = time.perf_counter()
    assert len(opened) == size + 1
    return {"mttl open + get, ms": 1e3 * (opened_at - started), "mttl add, ms": 1e3 * (added_at - opened_at)}
