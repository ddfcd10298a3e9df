"""Gates that need no training: the nearest prototype of a skill's data, and the layer's own look at what its skills would amplify.

Shapes: B batch, T tokens, D context features, K skills, I inputs of a module, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.attach import channel_layers, factors
from skillbank.mixture import Cell, Mixture, OnNet

__all__ = ["Arrow", "Prototypes"]


class Prototypes(nn.Module):
    """Weights by how near the context is to what each skill was trained on, as probabilities of normal distributions with one common deviation.

    Args:
        context_dim: D.
        skills: K.
        k: keep the nearest this many; None keeps all.
        temperature: of the probabilities; towards 0 the nearest gets weight 1.
        view: what of the model's context it sees, see `see`.

    """

    places: Tensor
    deviation: Tensor

    def __init__(
        self, context_dim: int, skills: int, *, k: int | None = None, temperature: float = 1.0, view: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        _check("prototypes", k, skills, temperature)
        self.k, self.temperature, self.view = k, temperature, dict(view or {})
        self.register_buffer("places", torch.zeros(skills, context_dim))
        self.register_buffer("deviation", torch.ones(context_dim))

    @torch.no_grad()
    def place(self, contexts: Sequence[Tensor]) -> None:
        """Learn where the skills are.

        Args:
            contexts: K samples (N, D), or (B, T, D), of what each skill was trained on.

        Raises:
            ValueError: not one sample for each skill.

        """
        if len(contexts) != len(self.places):
            raise ValueError(f"prototypes of {len(self.places)} skills need as many samples of contexts, got {len(contexts)}")
        rows = [context.flatten(0, -2).to(self.places) for context in contexts]
        self.places.copy_(torch.stack([each.mean(0) for each in rows]))
        within = torch.cat([each - place for each, place in zip(rows, self.places, strict=True)])
        self.deviation.copy_(within.square().mean(0).sqrt().clamp_min(1e-6))

    def forward(self, context: Tensor) -> Tensor:
        """Weights (B, K) of a context (B, D), or (B, T, K) of (B, T, D); they sum to 1."""
        rows, places = (context / self.deviation).flatten(0, -2), self.places / self.deviation
        distance = torch.cdist(rows, places, compute_mode="donot_use_mm_for_euclid_dist")  # a product of many rows would cancel
        return _shares(-distance.square().unflatten(0, context.shape[:-1]) / 2, self.k, self.temperature)


class Arrow(nn.Module):
    """Every adapted layer weights the skills for every token by itself: by how much its input lies in the direction that a skill amplifies most.

    That direction is the first right singular vector of B A, found from the factors (arXiv 2405.11157, section 3.2, which takes the k largest
    |v x| through a softmax). Skills without a module have no weight in it.

    Args:
        context_dim: ignored; every gate is built from the same two numbers.
        skills: K.
        k: skills per token and layer.
        temperature: of the softmax.

    """

    layerwise = True
    """Weights come about in the layers, anew in every pass."""

    def __init__(self, context_dim: int, skills: int, *, k: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        k = min(k, skills)
        _check("arrow", k, skills, temperature)
        self.skills, self.k, self.temperature = skills, k, temperature

    def bind(self, net: nn.Module, mixture: OnNet) -> None:
        """Let the layers of a net, with the stack of the skills on it, set the weights in the mixture's cell.

        Raises:
            ValueError: the skills are in slots, or adapt a convolution.

        """
        if not isinstance(mixture, Mixture):
            raise ValueError(f"arrow looks at the skills once, those in {type(mixture).__name__} come and go: give Composed the skills themselves")
        live = factors(net)
        for name, (channels, axis) in channel_layers(net).items():
            a, b = (factor.detach().flatten(1).double() for factor in live[name])
            if axis != -1:
                raise ValueError(f"arrow weights the skills of linear layers, {name!r} is a convolution: leave it out of the skills, or take a gate")
            owner, layer = cast("Tensor", channels.owner), net.get_submodule(name)
            found = torch.stack([_first(a[owner == skill], b[:, owner == skill]) for skill in range(self.skills)])
            layer.register_buffer("directions", found.to(live[name][0]), persistent=False)
            layer.register_forward_pre_hook(partial(_point, mixture.cell, name, self.k, self.temperature))

    def forward(self, context: Tensor) -> dict[str, Tensor]:
        """No weights yet: the layers set theirs."""
        return {}


def _first(a: Tensor, b: Tensor) -> Tensor:
    """First right singular vector of B A, (I,); 0 where there is nothing."""
    if not len(a) or not a.any() or not b.any():
        return a.new_zeros(a.shape[1])
    q, left = torch.linalg.qr(a.mT)
    right = torch.linalg.qr(b).R
    return q @ torch.linalg.svd(right @ left.mT).Vh[0]


def _point(cell: Cell, name: str, k: int, temperature: float, layer: nn.Module, inputs: tuple[Tensor]) -> None:
    """Weights (B, ..., K) of a module by its input (B, ..., I); none while the net runs as its base."""
    if isinstance(cell.weights, dict):
        cell.weights[name] = _shares(_along(inputs[0].detach(), cast("Tensor", layer.directions)), k, temperature)


def _along(x: Tensor, directions: Tensor) -> Tensor:
    """|v x| for every skill, minus infinity for those that are not in the module."""
    there = directions.any(-1)
    return (x.to(directions) @ directions.mT).abs().masked_fill(~there, -torch.inf)


def _shares(scores: Tensor, k: int | None, temperature: float) -> Tensor:
    """Softmax over the k largest of the scores (..., K), 0 elsewhere, and everywhere if all are minus infinity."""
    if k is not None and k < scores.shape[-1]:
        least = scores.topk(k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, least.indices, least.values)
    return (scores / temperature).softmax(-1).nan_to_num(0.0)


def _check(what: str, k: int | None, skills: int, temperature: float) -> None:
    if (k is not None and not 1 <= k <= skills) or temperature <= 0:
        raise ValueError(f"{what}: k must be 1 to {skills}, the number of skills, and the temperature above 0, got k={k}, temperature={temperature}")
