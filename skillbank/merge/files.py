"""Merges from folders of adapters to a folder, without a bank, without the base and without PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillbank.adapter import CONFIG_FILE, read_adapter, read_config, stream_adapter
from skillbank.certificate import Certificate
from skillbank.merge.engine import Merging
from skillbank.merge.measure import Measured
from skillbank.merge.registry import Method

__all__ = ["merge_adapters"]

_TOLD = ("fan_in_fan_out", "base_model_name_or_path", "task_type")
"""Of a PEFT configuration, what says which base an adapter is for."""


def merge_adapters(
    sources: Sequence[str | Path], folder: str | Path, *, weights: Sequence[Any] | None = None, method: str | Method = "stack", **options: Any
) -> Certificate:
    """Merge PEFT adapters from folders to a folder, without a bank and without the base: one module at a time is in memory.

    Args:
        sources: folders that PEFT's `save_pretrained` wrote.
        folder: made here; it must be empty or not there yet, and appears when it is complete.
        weights: as in `merge`.
        method: as in `merge`.
        options: what the method takes; with `error` or `budget` all modules are in memory.

    Returns:
        What the merge did.

    Raises:
        FileExistsError: the folder holds something.
        FileNotFoundError: a file of an adapter is missing.
        ValueError: an adapter that B @ A cannot represent, adapters of different bases, or what `merge` complains of.

    """
    skills = [read_adapter(source, lazy=True) for source in sources]
    configs = [read_config(Path(source) / CONFIG_FILE, f"adapter {str(source)!r}") for source in sources]
    told = {key: {str(source): config[key] for source, config in zip(sources, configs, strict=True) if config.get(key)} for key in _TOLD}
    for key, values in told.items():
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters of different bases do not go together, their {key} differ: {values}")
    merging, measured = Merging.of(skills, weights, method, options), Measured(len(skills))
    conv1d, base_name, task_type = (next(iter(told[key].values()), None) for key in _TOLD)
    stream_adapter(
        merging.run(measured),
        merging.at,
        folder,
        embeddings=merging.embeddings,
        base_name=base_name,
        fan_in_fan_out=bool(conv1d),
        task_type=task_type,
    )
    return measured.certificate(merging.name)
