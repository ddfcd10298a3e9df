"""The two protocols that models and tasks meet in, and the contract as a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "SEED_STRIDE",
    "Batch",
    "Batches",
    "Model",
    "ModelModule",
    "Recorded",
    "Task",
    "check_model",
    "contexts",
    "evaluating",
    "no_padding",
    "on",
    "shown",
]

SEED_STRIDE = 1_000_003 * 4096
"""How far apart the seeds are that two runs with seeds next to each other set at the same step."""

Batch = Mapping[str, Tensor]
"""Named tensors; dimension 0 of every one is the batch size B."""

Batches = Callable[[int], Iterator[Batch]]
"""`batches(start)` yields the batches of step start, start + 1, ...: a pure function of the step, so that training resumes exactly."""


@runtime_checkable
class Model(Protocol):
    """An `nn.Module` that skills attach to, gates look into and tasks evaluate."""

    @property
    def net(self) -> nn.Module:
        """What skills attach to; a plain attribute will do."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar () (DDP and accelerate wrap `forward`, so the loss lives here)."""
        ...

    def context(self, batch: Batch) -> Tensor:
        """What the gate may see: (B, D), or (B, T, D) for one weight per token. No gradient."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """Actions (B, H, A), or token ids (B, T). No gradient.

        A model that draws at random may take `samples=N` for N predictions per row, (B, N, H, A), and say as `steps` how often it runs its net for
        one; what a gate costs depends on both. One that runs its net on several rows for each row of the batch, such as beams, next to each
        other, says as `repeats` how many. One whose net sees other tokens in every pass says `tokens`, if contexts are (B, T, D), and has
        `passes(before, blank)`, in whose block `before` gets the context of every pass ahead of it; if that comes about in the pass, it says
        `within`, and `blank` gets the number of rows at its start.
        """
        ...


if TYPE_CHECKING:

    class ModelModule(nn.Module, Model):
        """An `nn.Module` that keeps the `Model` contract: what `load` gives to a type checker. Models need not inherit from it."""

        plan: Mapping[str, Any]

else:
    ModelModule = nn.Module


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a task shows of a model in a report.

    Args:
        weights: that a gate gave, (T, K); None where none did.
        rewards: (T,), or None where there are none.
        frames: (F, height, width, 3) uint8, or None where there are none.
        every: steps per frame.
        unit: what T counts.

    """

    weights: NDArray[np.float32] | None = None
    rewards: NDArray[np.float64] | None = None
    frames: NDArray[np.uint8] | None = None
    every: int = 10
    unit: str = "step"


class Task(Protocol):
    """Where data come from and what a model is judged by."""

    name: str

    @property
    def dimensions(self) -> dict[str, Any]:
        """What a model of this task is built with, such as sizes, under the names that models take it by."""
        ...

    @property
    def data(self) -> dict[str, str]:
        """Hash of everything that is trained on, by source."""
        ...

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        """Endless training batches, sampled with replacement."""
        ...

    def validation(self, *, batch_size: int) -> Iterator[Batch]:
        """One pass over the held-out examples, in a fixed order."""
        ...

    def evaluate(self, model: Model, *, seed: int = 0, episodes: int | None = None) -> dict[str, float]:
        """Metrics of `model` on this task."""
        ...

    def record(self, model: Model) -> Recorded:
        """What a report shows of `model` on this task."""
        ...


def no_padding(batch: Batch) -> Tensor | None:
    """Which tokens of a batch of text are no padding, (B, L); None where it does not say, as for anything else."""
    mask = batch.get("attention_mask", batch.get("segments"))
    return None if mask is None else mask > 0


def contexts(model: Model, batch: Batch) -> Tensor:
    """Contexts (N, D) of the rows of a batch, or of their tokens that are no padding."""
    found, mask = model.context(batch), no_padding(batch)
    return found.flatten(0, -2) if mask is None or found.dim() == 2 else found[mask]


def on(device: torch.device, batch: Batch) -> dict[str, Tensor]:
    """A batch on a device."""
    return {key: value.to(device) for key, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In this block a model is in eval mode; every part of it is then in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def shown(model: Model, batch: Batch) -> NDArray[np.float32] | None:
    """Weights (B, K) that a model's gate gives for a batch, None if it has none: what `Composed.shown` says."""
    look: Callable[[Batch], NDArray[np.float32]] | None = getattr(model, "shown", None)
    return None if look is None else look(batch)


def check_model(model: nn.Module, batch: Batch) -> None:
    """Check that `model` keeps the `Model` contract on `batch`; run it on your own model before training.

    Raises:
        TypeError: a member of the protocol is missing or is no `nn.Module`.
        ValueError: a result has the wrong shape, is not finite, or carries a gradient it should not.

    """
    if not isinstance(model, nn.Module) or not isinstance(model, Model):
        missing = [name for name in ("net", "forward", "context", "predict") if not hasattr(model, name)]
        raise TypeError(f"{type(model).__name__} is not a Model: it must be an nn.Module and is missing {missing}")
    if not isinstance(model.net, nn.Module):
        raise TypeError(f"{type(model).__name__}.net must be an nn.Module, got {type(model.net).__name__}")
    sizes = {key: value.shape[0] for key, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"every tensor of a batch has the batch size as dimension 0, got {sizes}")
    rows = next(iter(sizes.values()))
    loss = model(batch)
    if loss.shape != ():
        raise ValueError(f"forward must return a scalar loss, got shape {tuple(loss.shape)}")
    if not torch.isfinite(loss):
        raise ValueError(f"forward returned a loss of {loss.item()}")
    context = model.context(batch)
    if context.dim() not in (2, 3) or context.shape[0] != rows:
        raise ValueError(f"context must be (B, D) or (B, T, D) with B={rows}, got {tuple(context.shape)}")
    prediction = model.predict(batch)
    if prediction.shape[0] != rows:
        raise ValueError(f"predict must return B={rows} rows, got {tuple(prediction.shape)}")
    for name, value in {"context": context, "predict": prediction}.items():
        if value.requires_grad:
            raise ValueError(f"{name} must carry no gradient: decorate it with torch.no_grad()")
