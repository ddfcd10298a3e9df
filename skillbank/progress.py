"""What a training run has come to: parameters, buffers, moments, EMA, step and rows, kept in a checkpoint and found again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from skillbank.tensors import load_tensors, save_tensors

__all__ = ["METRICS", "Progress"]

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
_SMALL = 2**20
"""Bytes."""


class Progress:
    """What a checkpoint holds: parameters, moments, EMA, step, the rows of the metrics file, and buffers of the model's state.

    Weights of quantised layers are buffers, too: those above a mebibyte that are not in full precision, as what is learned on the way is, are
    left out as long as nothing is seen to write to them.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: float | None,
        settings: dict[str, Any],
        folder: Path | None,
    ) -> None:
        self.model, self.trained, self.optimizer, self.ema, self.settings, self.folder = model, trained, optimizer, ema, settings, folder
        kept = set(model.state_dict())
        self.buffers = {name: (value, _version(value)) for name, value in model.named_buffers() if name in kept}
        self.step, self.started = 0, time.perf_counter()
        self.rows: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.shadow = [p.detach().clone() for p in trained.values()] if ema is not None else []
        for p in trained.values():
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @property
    def seconds(self) -> float:
        """Wall time, of the runs that this one resumes as well."""
        return time.perf_counter() - self.started

    def advance(self) -> None:
        """Count a step, and take it into the EMA."""
        if self.ema is not None:
            decay = min(self.ema, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(self.shadow, [p.detach() for p in self.trained.values()], self.step)
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint by name."""
        flat = {f"buffer/{name}": value for name, value in self.model.named_buffers() if name in self.buffers and self._is_kept(name, value)}
        flat |= {"losses": torch.stack(self.losses) if self.losses else torch.zeros(0)}
        for i, (name, p) in enumerate(self.trained.items()):
            flat |= {f"param/{name}": p.detach(), **{f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}}
            if self.shadow:
                flat[f"ema/{name}"] = self.shadow[i]
        return flat

    def _is_kept(self, name: str, value: Tensor) -> bool:
        """Whether a checkpoint holds a buffer; not all that writes to one, such as batch normalisation or `.data`, is seen."""
        plain = value.layout == torch.strided and all(stride or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True))
        if plain and (value.dtype in (torch.float32, torch.float64) or value.nbytes <= _SMALL):
            return True
        return value is not self.buffers[name][0] or _version(value) != self.buffers[name][1]

    def save(self, accelerator: Accelerator) -> None:
        """Write a checkpoint."""
        if self.folder is None or not accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = {"step": str(self.step), "seconds": str(self.seconds), "settings": json.dumps(self.settings), "rows": json.dumps(self.rows)}
        apart = {key: value.clone() if key.startswith("buffer/") else value for key, value in self.tensors().items()}  # memory may be shared
        save_tensors(self.folder / CHECKPOINT, apart, notes)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; a ValueError where it is another run's."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return
        stored, notes = load_tensors(self.folder / CHECKPOINT)
        if other := {key: value for key, value in json.loads(notes["settings"]).items() if value != self.settings[key]}:
            here = {key: self.settings[key] for key in other}
            raise ValueError(f"{self.folder} holds a run with {other}, this one has {here}: use the same settings to resume, or another folder")
        without = not any(key.startswith("buffer/") for key in stored)  # as checkpoints once were
        here = {key: value for key, value in self.tensors().items() if key != "losses" and not (without and key.startswith("buffer/"))}
        here |= {key: value for name, value in self.model.named_buffers() if (key := f"buffer/{name}") in stored}
        for key in sorted(here.keys() | stored.keys() - {"losses"}):
            found, live = (tuple(side[key].shape) if key in side else None for side in (stored, here))
            if found != live:
                what = f"no {key!r}" if found is None else f"{key!r}, which this has not" if live is None else f"{key!r} of shape {found}, not {live}"
                raise ValueError(f"{self.folder} holds a run of another model: its checkpoint has {what}; use another folder")
        with torch.no_grad():
            for key, tensor in here.items():
                tensor.copy_(stored[key])
        self.losses = list(stored["losses"])
        self.step, self.rows = int(notes["step"]), json.loads(notes["rows"])
        self.started -= float(notes["seconds"])
        (self.folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, row: dict[str, float], accelerator: Accelerator) -> None:
        """Keep a row of the metrics; a FloatingPointError where the loss is not finite."""
        if not math.isfinite(row["loss"]):
            where = f"; the last checkpoint is in {self.folder}" if self.folder and (self.folder / CHECKPOINT).exists() else ""
            raise FloatingPointError(f"the loss is {row['loss']} at step {self.step}: lower the learning rate or clip the gradient{where}")
        self.rows.append(row)
        self.losses.clear()
        accelerator.log({key: value for key, value in row.items() if key != "step"}, step=self.step)
        if self.folder is not None and accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / METRICS).open("w" if len(self.rows) == 1 else "a") as file:
                file.write(json.dumps(row) + "\n")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """EMA in the model for the time of the block."""
        raw = [p.detach().clone() for p in self.trained.values()]
        self.finish()
        yield
        _copy(raw, self.trained.values())

    def finish(self) -> None:
        """Put the EMA into the model."""
        if self.shadow:
            _copy(self.shadow, self.trained.values())


def _version(value: Tensor) -> int:
    """How often a tensor was written to; what inference has made cannot be."""
    return 0 if value.is_inference() else value._version


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Iterable[Tensor]) -> None:
    for value, live in zip(source, target, strict=True):
        live.copy_(value)
