"""Context-aware composition: the weights that a gate gives multiply the rank channels of one stack of skills.

A weight of 1 is the skill as it was trained, 0 is the base: scales are folded into the skills, so a gate never sees them.

Shapes: B batch, T tokens, D context features, K skills, R rank (sum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skillbank.attach import attach, channel_layers, mark
from skillbank.gate import Routes
from skillbank.model import Batch, ModelModule, no_padding
from skillbank.skill import Skill, stack

__all__ = ["Cell", "Composed", "Mixed", "Mixture", "OnNet", "Weights", "every_pass", "see"]

Weights = Tensor | Routes | Mapping[str, Tensor]


class Cell:
    """The one mutable cell: weights (B, K) or (B, T, K), or such by module, or routes, that adapted layers multiply into their rank channels.

    Where every row of a batch becomes `repeats` rows of the net, next to each other, as when several actions are sampled for an observation, `mix`
    is told so; a layer may then run on either.

    Args:
        count: K.

    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.mix(None)

    def mix(self, weights: Weights | None, repeats: int = 1) -> None:
        """Set the weights for what the net runs on next."""
        self.weights, self.repeats = weights, repeats
        self.made: dict[Any, Any] = {}
        """What the fast paths make of these weights, so that they make it once."""

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy: the last weights as numbers, without the gate behind them."""
        return {**self.__dict__, "weights": _detached(self.weights), "made": {}}

    def of(self, name: str, rows: int) -> Tensor | Routes:
        """Weights of a module that runs on this many rows: one for each, or fewer by the number of repeats.

        Raises:
            RuntimeError: there are no weights yet.
            ValueError: it runs on other rows.

        """
        if self.weights is None:
            raise RuntimeError("the mixture has no weights yet: call the Composed model, not its net")
        weights = self.weights[name] if isinstance(self.weights, Mapping) else self.weights
        given = len(weights.index if isinstance(weights, Routes) else weights)
        if rows not in (given, given * self.repeats):
            raise ValueError(f"module {name!r} runs on {rows} rows, the gate gave weights for {given}: it must keep the batch")
        return weights

    def channels(self, name: str, owner: Tensor | None, shape: torch.Size, axis: int = -1) -> Tensor:
        """Weights of the rank channels of a module, as they multiply into channels of this shape (B, ..., R), or (B, R, ...) for convolutions.

        Args:
            name: of the module.
            owner: (R,), which skill a channel belongs to; None for one channel per skill.
            shape: of what the module runs on, or of the channels.
            axis: of the channels.

        Raises:
            RuntimeError: as `of`.
            ValueError: as `of`, or the module does not run on the tokens that the gate gave weights for.

        """
        weights = self.of(name, shape[0])
        weights = weights.dense(self.count) if isinstance(weights, Routes) else weights
        if shape[0] > len(weights):
            weights = weights.repeat_interleave(self.repeats, 0)
        if weights.dim() > 2 and (axis != -1 or weights.shape[1:-1] != shape[1:-1]):
            raise ValueError(_other_tokens(name, shape, weights))
        weights = weights if owner is None else weights[..., owner]
        if weights.dim() > 2:
            return weights
        aligned = [1] * len(shape)
        aligned[0], aligned[axis] = weights.shape
        return weights.view(aligned)

    def routes(self, name: str, shape: torch.Size) -> Routes | None:
        """Routes (G, k) of a module that runs on rows and tokens (B, ..., I), each for as many of them as the next; raises as `channels`.

        None where there are weights of all skills.
        """
        routes = self.of(name, shape[0])
        if not isinstance(routes, Routes):
            return None
        if routes.index.dim() == 2:
            return routes
        if routes.index.shape[1:-1] != shape[1:-1]:
            raise ValueError(_other_tokens(name, shape, routes.index))
        if shape[0] > len(routes.index):
            routes = routes.repeat(self.repeats)
        return Routes(routes.index.flatten(0, -2), routes.weights.flatten(0, -2))


def _detached(weights: Weights | None) -> Weights | None:
    if isinstance(weights, Mapping):
        return {name: each.detach() for name, each in weights.items()}
    return weights.detach() if isinstance(weights, Tensor | Routes) else None


def _other_tokens(name: str, shape: torch.Size, weights: Tensor) -> str:
    runs, given = tuple(shape[:-1]), tuple(weights.shape[:-1])
    return f"module {name!r} runs on rows and tokens {runs}, the gate gave weights for {given}: gate per sample"


class Mixture:
    """The stack of K skills on a net, every channel weighted by the cell: the reference path."""

    def __init__(self, net: nn.Module, skills: Sequence[Skill]) -> None:
        attach(net, stack(skills))
        self.cell, self.count, self.mark = Cell(len(skills)), len(skills), mark(net)
        self.even: set[str] = set()
        """Modules in which all skills have the same rank."""
        for name, (layer, axis) in channel_layers(net).items():
            ranks = torch.tensor([skill.ranks.get(name, 0) for skill in skills])
            owner = torch.repeat_interleave(torch.arange(len(skills)), ranks)
            if len(set(ranks.tolist())) == 1:
                self.even.add(name)
            layer.register_buffer("owner", owner.to(next(layer.parameters()).device), persistent=False)
            layer.register_forward_pre_hook(partial(_weight, self.cell, name, axis))  # not a closure, which a copy would share


def _weight(cell: Cell, name: str, axis: int, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    (hidden,) = inputs
    return hidden * cell.channels(name, cast("Tensor", layer.owner), hidden.shape, axis).to(hidden.dtype)


class OnNet(Protocol):
    """Skills on a net whose weights are in a cell: a `Mixture`, or the runtime's `Slots`."""

    cell: Cell
    count: int
    mark: object | None


class Mixed(nn.Module):
    """What models under a mixture share: the base answers, once the weights for the batch are set. A `Model` with a `forward`."""

    model: ModelModule
    mixture: OnNet

    @property
    def net(self) -> nn.Module:
        """Net of the base, with the stack on it."""
        return self.model.net

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Context of the base model, whose net runs as the base where it has to."""
        if getattr(self.model, "within", False):
            self._blank(len(next(iter(batch.values()))))
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """Prediction of the base model, which takes the options: of models that sample, `samples` for every row; the weights are set once."""
        with self._predicting(batch, (options.get("samples") or 1) * getattr(self.model, "repeats", 1)):
            return self.model.predict(batch, **options)

    def _predicting(self, batch: Batch, repeats: int) -> AbstractContextManager[None]:
        """In this block the mixture has its weights for a batch."""
        return self._once(batch, repeats)

    def _once(self, batch: Batch, repeats: int) -> AbstractContextManager[None]:
        """The same, with weights that are set here and stay."""
        self._mix(batch, repeats)
        return nullcontext()

    def _mix(self, batch: Batch, repeats: int = 1) -> Weights:
        """Set the mixture's weights for a batch."""
        raise NotImplementedError

    def _blank(self, rows: int) -> None:
        """Set all weights to 0: the base by itself, on so many rows."""
        parameter = next(self.model.parameters())
        self.mixture.cell.mix(parameter.new_zeros(rows, self.mixture.count))


def _by_row(weights: Tensor, batch: Batch) -> Tensor:
    """Weights (B, K), of those per token (B, T, K) the mean over what is no padding."""
    mask = no_padding(batch)
    if weights.dim() == 2:
        return weights
    if mask is None or mask.shape != weights.shape[:2]:
        return weights.flatten(1, -2).mean(1)
    return (weights * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def see(model: nn.Module, view: Mapping[str, Any]) -> None:
    """Let a model give the context that a gate wants to see.

    Args:
        model: whose attributes these become.
        view: such as `{"tokens": True}` or `{"layer": 2}` of a language model.

    Raises:
        ValueError: the model has no such attribute.

    """
    for key, value in view.items():
        if not hasattr(model, key):
            raise ValueError(f"the gate is to see {key}={value!r}, {type(model).__name__} has no {key!r}: leave it out of the gate's view")
        setattr(model, key, value)


def every_pass(model: nn.Module, gate: nn.Module) -> bool:
    """Whether the weights change from pass to pass of the net: a gate sees every token, or sees within the pass, or the layers do the weighting."""
    return getattr(model, "tokens", False) or getattr(model, "within", False) or getattr(gate, "layerwise", False)


class Composed(Mixed):
    """Base, skills and gate as one `Model`: `W x + B (expand(weights) * (A x))` in every adapted layer.

    Skills and base are frozen and stay in eval mode (no dropout); the gate's parameters are the ones to train.

    Args:
        model: the base, changed in place: the stack of the skills is attached to its net.
        gate: context (B, D) or (B, T, D) -> weights (B, K) or (B, T, K), or `Routes`.
        skills: K skills in the gate's order, or what has them on the net already.
        regulariser: added to the loss. `none`; `mean` pulls the batch mean of all weights to 1 / K; `code` is the official code's: mean of all
            weights to 1/2 and of the last to 1. Both in the official units, that is times `scale` squared (arXiv 2502.05932, code). Of weights
            per token, the mean of every row's without its padding.
        scale: the multiplier that the skills were trained with; used by the regularisers only.

    Raises:
        ValueError: an unknown regulariser, one for a gate whose weights come about in the layers, a view that the model does not have, or skills that
            the gate cannot weight.

    """

    def __init__(
        self,
        model: nn.Module,
        gate: nn.Module,
        skills: Sequence[Skill] | OnNet,
        *,
        regulariser: Literal["none", "mean", "code"] = "none",
        scale: float = 16.0,
    ) -> None:
        super().__init__()
        if regulariser not in ("none", "mean", "code"):
            raise ValueError(f"unknown regulariser {regulariser!r}: choose none, mean or code")
        if regulariser != "none" and getattr(gate, "layerwise", False):
            raise ValueError(f"{type(gate).__name__} weights in the layers, which regulariser={regulariser!r} does not see: leave it out")
        self.model, self.gate = cast("ModelModule", model), gate
        self.regulariser, self.scale = regulariser, scale
        self.mixture: OnNet = Mixture(self.model.net, skills) if isinstance(skills, Sequence) else skills
        self.model.requires_grad_(False).eval()
        see(self.model, getattr(gate, "view", {}))
        if hasattr(gate, "bind"):
            cast("Any", gate).bind(self.net, self.mixture)

    def train(self, mode: bool = True) -> Composed:
        """Switch the gate only."""
        self.gate.train(mode)
        self.training = mode
        return self

    def weights(self, batch: Batch) -> Weights:
        """Weights (B, K) or (B, T, K), or routes, that the gate gives for a batch; by module where layers weight by themselves, once they ran."""
        return self.gate(self.context(batch))

    @torch.no_grad()
    def shown(self, batch: Batch) -> NDArray[np.float32]:
        """Weights (B, K) that the gate gives for a batch, of all skills; the mean over the tokens where every token has its own."""
        weights: Any = self.weights(batch)
        if isinstance(weights, Mapping):
            self(batch)
            each = cast("Mapping[str, Tensor]", self.mixture.cell.weights).values()
            weights = torch.stack([_by_row(module, batch) for module in each]).mean(0)
        weights = weights.dense(self.mixture.count) if isinstance(weights, Routes) else weights
        return _by_row(weights, batch).float().cpu().numpy()

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the base model under the gate's weights, plus the regulariser, ()."""
        with self._training(batch):
            loss = self.model(batch)
        if self.regulariser == "none":
            return loss
        weights = self.mixture.cell.weights
        assert isinstance(weights, Tensor | Routes)
        weights = _by_row(weights.dense(self.mixture.count) if isinstance(weights, Routes) else weights, batch)
        target = 0.5 if self.regulariser == "code" else 1 / self.mixture.count
        penalty = (weights.mean() - target).square()
        if self.regulariser == "code":
            penalty = penalty + (weights[:, -1].mean() - 1).square()
        return loss + self.scale**2 * penalty

    @property
    def losses(self) -> Callable[[Batch], Tensor]:
        """Where the base has `losses(batch)`: those of the rows, (B,), under the gate's weights, without the regulariser."""
        return partial(self._losses, cast("Any", self.model).losses)

    def _losses(self, of_rows: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        with self._training(batch):
            return of_rows(batch)

    def _training(self, batch: Batch) -> AbstractContextManager[None]:
        """In this block the mixture has its weights for one pass over a batch."""
        return self._every_pass() if getattr(self.model, "within", False) else self._once(batch, 1)

    def _predicting(self, batch: Batch, repeats: int) -> AbstractContextManager[None]:
        every = getattr(self.model, "tokens", False) or getattr(self.model, "within", False)
        return self._every_pass() if every else self._once(batch, repeats)

    def live(self) -> AbstractContextManager[None]:
        """In this block the net of a language model runs under the gate, whoever calls it: `generate` of transformers, or a harness."""
        return cast("Any", self.model).passes(lambda context: self._set(self.gate(context)), self._blank, live=True)

    def _every_pass(self) -> AbstractContextManager[None]:
        return cast("Any", self.model).passes(lambda context: self._set(self.gate(context)), self._blank)

    def _mix(self, batch: Batch, repeats: int = 1) -> Weights:
        return self._set(self.weights(batch), repeats)

    def _set(self, weights: Weights, repeats: int = 1) -> Weights:
        if mark(self.net) is not self.mixture.mark:
            raise RuntimeError("another skill was attached to this net since it was composed: give every Composed a base of its own")
        if isinstance(weights, Tensor) and weights.shape[-1] != self.mixture.count:
            raise ValueError(f"the gate gives {weights.shape[-1]} weights for {self.mixture.count} skills")
        self.mixture.cell.mix(weights, repeats)
        return weights
