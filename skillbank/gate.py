"""Context-aware composition: a gate turns the context into one weight per skill, and the weights multiply the rank channels of one stack.

A weight of 1 is the skill as it was trained, 0 is the base: scales are folded into the skills, so a gate never sees them.

Shapes: B batch, T tokens, D context features, K skills, R rank (sum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from skillbank.attach import attach, channel_layers, mark
from skillbank.model import Batch, ModelModule
from skillbank.skill import Skill, stack

__all__ = ["Composed", "ConstantGate", "MLPGate", "Mixed", "Mixture", "grow"]

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

    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, context_dim: int, skills: int, *, hidden: Sequence[int] = (256, 256), init: Init = "newest", scale: float = 16.0) -> None:
        super().__init__()
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
        if init != "official":
            nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            if init == "newest":
                self.head.bias[-1] = 1.0
            elif init == "uniform":
                self.head.bias.fill_(1 / skills)

    def forward(self, context: Tensor) -> Tensor:
        """Weights (B, K) of a context (B, D), or (B, T, K) of (B, T, D)."""
        return self.head(self.body((context - self.mean) / self.deviation)) / self.divisor

    @property
    def constant(self) -> Tensor | None:
        """Weights (K,) if they are the same for every context, None if not."""
        return None if self.head.weight.any() else self.head.bias.detach() / self.divisor

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
    grown.divisor = gate.divisor
    grown.body.load_state_dict(gate.body.state_dict())
    with torch.no_grad():
        grown.mean.copy_(gate.mean)
        grown.deviation.copy_(gate.deviation)
        grown.head.weight[: old.out_features] = old.weight
        grown.head.bias[: old.out_features] = old.bias
    return grown.to(old.weight)


class Mixture:
    """The one mutable cell: weights (B, K) or (B, T, K), or such by module, that the adapted layers multiply into their rank channels.

    Where every row of a batch becomes `repeats` rows of the net, next to each other, as when several actions are sampled for an observation, `mix`
    is told so; a layer may then run on either.
    """

    def __init__(self, net: nn.Module, skills: Sequence[Skill]) -> None:
        attach(net, stack(skills))
        self.count, self.mark = len(skills), mark(net)
        self.mix(None)
        for name, (layer, axis) in channel_layers(net).items():
            ranks = torch.tensor([skill.ranks.get(name, 0) for skill in skills])
            owner = torch.repeat_interleave(torch.arange(len(skills)), ranks)
            layer.register_buffer("owner", owner.to(next(layer.parameters()).device), persistent=False)
            layer.register_forward_pre_hook(self._hook(name, axis))

    def mix(self, weights: Tensor | Mapping[str, Tensor] | None, repeats: int = 1) -> None:
        """Set the weights for what the net runs on next."""
        self.weights, self.repeats = weights, repeats
        self.made: dict[str, Tensor] = {}
        """What the fast path makes of these weights once per module."""

    def of(self, name: str, rows: int) -> Tensor:
        """Weights (B, K) or (B, T, K) of a module that runs on this many rows: B, or B times the repeats.

        Raises:
            RuntimeError: there are no weights yet.
            ValueError: it runs on other rows.

        """
        if self.weights is None:
            raise RuntimeError("the mixture has no weights yet: call the Composed model, not its net")
        weights = self.weights if isinstance(self.weights, Tensor) else self.weights[name]
        if rows not in (len(weights), len(weights) * self.repeats):
            raise ValueError(f"module {name!r} runs on {rows} rows, the gate gave weights for {len(weights)}: it must keep the batch")
        return weights

    def channels(self, name: str, owner: Tensor, shape: torch.Size, axis: int = -1) -> Tensor:
        """Weights of the rank channels of a module, as they multiply into channels of this shape (B, ..., R), or (B, R, ...) for convolutions.

        Raises:
            RuntimeError: as `of`.
            ValueError: as `of`, or the module does not run on the tokens that the gate gave weights for.

        """
        weights = self.of(name, shape[0])
        if shape[0] > len(weights):
            weights = weights.repeat_interleave(self.repeats, 0)
        if weights.dim() == 2:
            aligned = [1] * len(shape)
            aligned[0], aligned[axis] = len(weights), len(owner)
            return weights[:, owner].view(aligned)
        if axis != -1 or weights.shape[1:-1] != shape[1:-1]:
            runs, given = tuple(shape[:-1]), tuple(weights.shape[:-1])
            raise ValueError(f"module {name!r} runs on rows and tokens {runs}, the gate gave weights for {given}: gate per sample")
        return weights[..., owner]

    def _hook(self, name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
        def weight(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            (hidden,) = inputs
            return hidden * self.channels(name, cast("Tensor", layer.owner), hidden.shape, axis).to(hidden.dtype)

        return weight


class Mixed(nn.Module):
    """What models under a mixture share: the base answers, once the weights for the batch are set. A `Model` with a `forward`."""

    model: ModelModule
    mixture: Mixture

    @property
    def net(self) -> nn.Module:
        """Net of the base, with the stack on it."""
        return self.model.net

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Context of the base model."""
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, samples: int | None = None) -> Tensor:
        """Prediction of the base model, or `samples` of them for every row from models that sample; the weights are set once."""
        self._mix(batch, samples or 1)
        options = {} if samples is None else {"samples": samples}
        return self.model.predict(batch, **options)

    def _mix(self, batch: Batch, repeats: int = 1) -> Tensor:
        """Set the mixture's weights for a batch."""
        raise NotImplementedError


class Composed(Mixed):
    """Base, skills and gate as one `Model`: `W x + B (expand(weights) * (A x))` in every adapted layer.

    Skills and base are frozen and stay in eval mode (no dropout); the gate's parameters are the ones to train.

    Args:
        model: the base, changed in place: the stack of the skills is attached to its net.
        gate: context (B, D) or (B, T, D) -> weights (B, K) or (B, T, K).
        skills: K skills in the gate's order.
        regulariser: added to the loss. `none`; `mean` pulls the batch mean of all weights to 1 / K; `code` is the official code's: mean of all
            weights to 1/2 and of the last to 1. Both in the official units, that is times `scale` squared (arXiv 2502.05932, code).
        scale: the multiplier that the skills were trained with; used by the regularisers only.

    """

    def __init__(
        self,
        model: nn.Module,
        gate: nn.Module,
        skills: Sequence[Skill],
        *,
        regulariser: Literal["none", "mean", "code"] = "none",
        scale: float = 16.0,
    ) -> None:
        super().__init__()
        if regulariser not in ("none", "mean", "code"):
            raise ValueError(f"unknown regulariser {regulariser!r}: choose none, mean or code")
        self.model, self.gate = cast("ModelModule", model), gate
        self.regulariser, self.scale = regulariser, scale
        self.mixture = Mixture(self.model.net, skills)
        self.model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Composed:
        """Switch the gate only."""
        self.gate.train(mode)
        self.training = mode
        return self

    def weights(self, batch: Batch) -> Tensor:
        """Weights (B, K) or (B, T, K) that the gate gives for a batch."""
        return self.gate(self.model.context(batch))

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the base model under the gate's weights, plus the regulariser, ()."""
        weights = self._mix(batch)
        loss = self.model(batch)
        if self.regulariser == "none":
            return loss
        target = 0.5 if self.regulariser == "code" else 1 / self.mixture.count
        penalty = (weights.mean() - target).square()
        if self.regulariser == "code":
            penalty = penalty + (weights[..., -1].mean() - 1).square()
        return loss + self.scale**2 * penalty

    def _mix(self, batch: Batch, repeats: int = 1) -> Tensor:
        if mark(self.net) is not self.mixture.mark:
            raise RuntimeError("another skill was attached to this net since it was composed: give every Composed a base of its own")
        weights = self.weights(batch)
        if weights.shape[-1] != self.mixture.count:
            raise ValueError(f"the gate gives {weights.shape[-1]} weights for {self.mixture.count} skills")
        self.mixture.mix(weights, repeats)
        return weights
