"""Gates: networks that turn the context into one weight per skill.

A weight of 1 is the skill as it was trained, 0 is the base: scales are folded into the skills, so a gate never sees them.

Shapes: B batch, T tokens, D context features, K skills, R rank (sum).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["ConstantGate", "Growing", "MLPGate", "Routes", "TopK", "grow"]

Init = Literal["newest", "uniform", "zero", "official"]


class MLPGate(nn.Module):
    """Weights from the context by an MLP with a linear head: no softmax, no bound, any sign (arXiv 2502.05932, section 4.2).

    Args:
        context_dim: D.
        skills: K, in the order in which `Composed` gets them, oldest first.
        hidden: widths of the ReLU layers.
        init: what the untrained gate says, for every context: `newest` 1 for the last skill and 0 for the others, `uniform` 1 / K, `zero` 0.
            The head's weights start at 0, only its bias differs. `official`: the paper's code, whose raw output is the multiplier itself and
            starts near 0; it is divided by `scale` here, so that it learns `scale` times more slowly.
        scale: the multiplier that the skills were trained with; used by `official` only.
        view: what of the model's context it sees, such as `{"tokens": True}` of a language model: attributes that the model gets.
        k: give `Routes` of the k weights that are largest in magnitude, as `TopK` does; None gives all K. What is not chosen gets no gradient, so
            that `newest` and a small k may never try the others: train with all, or from `uniform` and a context per token.

    Raises:
        ValueError: an unknown init, or k out of range.

    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        context_dim: int,
        skills: int,
        *,
        hidden: Sequence[int] = (256, 256),
        init: Init = "newest",
        scale: float = 16.0,
        view: Mapping[str, Any] | None = None,
        k: int | None = None,
    ) -> None:
        super().__init__()
        if k is not None and not 1 <= k <= skills:
            raise ValueError(f"a gate over {skills} skills chooses 1 to {skills} of them, got k={k}")
        if init not in ("newest", "uniform", "zero", "official"):
            raise ValueError(f"unknown init {init!r}: choose newest, uniform, zero or official")
        self.register_buffer("mean", torch.zeros(context_dim))
        self.register_buffer("deviation", torch.ones(context_dim))
        widths = [context_dim, *hidden]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], skills)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.divisor = scale if init == "official" else 1.0
        self.view, self.k = dict(view or {}), k
        if init != "official":
            nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            if init == "newest":
                self.head.bias[-1] = 1.0
            elif init == "uniform":
                self.head.bias.fill_(1 / skills)

    def forward(self, context: Tensor) -> Tensor | Routes:
        """Weights (B, K) of a context (B, D), or (B, T, K) of (B, T, D); with k, routes."""
        weights: Tensor = self.head(self.features(context)) / self.divisor
        return weights if self.k is None else _largest(weights, self.k)

    def features(self, context: Tensor) -> Tensor:
        """What the head sees, (B, H) or (B, T, H)."""
        return self.body(self.standardised(context))

    def standardised(self, context: Tensor) -> Tensor:
        """What the body sees: a context (B, D) or (B, T, D) in standard deviations."""
        return (context - self.mean) / self.deviation

    @property
    def constant(self) -> Tensor | None:
        """Weights (K,) if they are the same for every context, None if not."""
        if self.head.weight.any():
            return None
        weights = self.head.bias.detach() / self.divisor
        return weights if self.k is None else _largest(weights, self.k).dense(len(weights))

    @torch.no_grad()
    def standardise(self, context: Tensor) -> None:
        """From now on see features in units of their deviation in this sample (N, D) or (B, T, D), so that small ones count; before training.

        Raises:
            ValueError: fewer than two rows.

        """
        rows = context.flatten(0, -2)
        if len(rows) < 2:
            raise ValueError(f"a gate needs at least 2 contexts to standardise its input, got {len(rows)}")
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0).clamp_min(1e-6))


class ConstantGate(nn.Module):
    """The same weights for every context: a merge whose weights can be trained.

    Args:
        context_dim: ignored; every gate is built from the same two numbers.
        skills: K.
        weights: (K,) to start from, default 1 / K each.

    """

    def __init__(self, context_dim: int, skills: int, *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        values = torch.full((skills,), 1 / skills) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        if values.shape != (skills,):
            raise ValueError(f"got {values.numel()} weights for {skills} skills: give one weight per skill")
        self.weights = nn.Parameter(values.clone())

    @property
    def constant(self) -> Tensor:
        """Weights (K,)."""
        return self.weights.detach()

    def forward(self, context: Tensor) -> Tensor:
        """Weights (B, K) or (B, T, K)."""
        return self.weights.to(context.device).expand(*context.shape[:-1], -1)


def grow(gate: MLPGate, skills: int = 1) -> MLPGate:
    """Copy of a gate with room for more skills at the end; until it is trained the old weights are what they were and the new ones are 0."""
    old = gate.head
    widths = [layer.in_features for layer in [*gate.body, old] if isinstance(layer, nn.Linear)]
    grown = MLPGate(widths[0], old.out_features + skills, hidden=widths[1:], init="zero")
    grown.divisor, grown.view, grown.k = gate.divisor, gate.view, gate.k
    grown.body.load_state_dict(gate.body.state_dict())
    with torch.no_grad():
        grown.mean.copy_(gate.mean)
        grown.deviation.copy_(gate.deviation)
        grown.head.weight[: old.out_features] = old.weight
        grown.head.bias[: old.out_features] = old.bias
    return grown.to(old.weight)


class Growing(nn.Module):
    """A trained gate with outputs for more skills at the end, of which only these are trained: the weights of the old skills stay what they are.

    `fit(Composed(model, growing, skills), batches, growing.head.parameters())` trains them; `grown()` is the gate that came of it. To train all of a
    gate after it has grown, use `grow`.

    Args:
        gate: trained, not changed.
        skills: how many more.

    """

    def __init__(self, gate: MLPGate, skills: int = 1) -> None:
        super().__init__()
        self.gate = copy.deepcopy(gate).requires_grad_(False)
        self.view = gate.view
        self.head = nn.Linear(gate.head.in_features, skills).to(gate.head.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, context: Tensor) -> Tensor | Routes:
        """Weights (B, K) or (B, T, K), the new ones last; routes where the gate chooses."""
        features = self.gate.features(context)
        weights = torch.cat([self.gate.head(features), self.head(features)], -1) / self.gate.divisor
        return weights if self.gate.k is None else _largest(weights, self.gate.k)

    @torch.no_grad()
    def grown(self) -> MLPGate:
        """One gate of both parts."""
        gate = grow(self.gate, self.head.out_features)
        gate.head.weight[-self.head.out_features :] = self.head.weight
        gate.head.bias[-self.head.out_features :] = self.head.bias
        return gate


@dataclass(frozen=True, eq=False)
class Routes:
    """A few weighted skills per row, of many: what a gate gives that chooses.

    Args:
        index: (B, k) or (B, T, k), skills from 0 to K - 1; one that is named twice counts twice.
        weights: of the same shape.

    """

    index: Tensor
    weights: Tensor

    def dense(self, count: int) -> Tensor:
        """Weights (B, K) or (B, T, K) of all K skills, 0 where a row does not name one."""
        return self.weights.new_zeros(*self.index.shape[:-1], count).scatter_add(-1, self.index, self.weights)

    def detach(self) -> Routes:
        """The same without a gradient."""
        return Routes(self.index, self.weights.detach())

    def repeat(self, repeats: int) -> Routes:
        """Every row `repeats` times, next to each other."""
        return Routes(self.index.repeat_interleave(repeats, 0), self.weights.repeat_interleave(repeats, 0))


class TopK(nn.Module):
    """The k weights of a gate that are largest in magnitude, with their signs; all other skills have none, and cost nothing in `Slots`.

    Args:
        gate: context (B, D) or (B, T, D) -> weights (B, K) or (B, T, K).
        k: 1 to K.

    Raises:
        ValueError: k below 1, or a gate whose weights come about in the layers.

    """

    def __init__(self, gate: nn.Module, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"a gate has to choose at least one skill, got k={k}")
        if getattr(gate, "layerwise", False):
            raise ValueError(f"{type(gate).__name__} weights in the layers, where TopK cannot choose: give it its own k={k}")
        self.gate, self.k = gate, k
        self.view = getattr(gate, "view", {})

    def forward(self, context: Tensor) -> Routes:
        """Routes of a context; gradients reach the weights that were chosen."""
        weights = self.gate(context)
        if self.k > weights.shape[-1]:
            raise ValueError(f"the gate has {weights.shape[-1]} skills to choose from, k is {self.k}")
        return _largest(weights, self.k)


def _largest(weights: Tensor, k: int) -> Routes:
    """The k weights that are largest in magnitude."""
    index = weights.abs().topk(k, dim=-1).indices
    return Routes(index, weights.gather(-1, index))
