"""What the levels share: a base under what is on its net, numbers of weights, one vocabulary, rows in order.

Shapes: B batch, K skills, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.attach import mark
from skillbank.mixture import Mixture
from skillbank.model import Batch
from skillbank.models.transformer import CausalLM
from skillbank.runtime.fused import fuse
from skillbank.skill import Skill

__all__ = ["IGNORED", "Level", "Stacked", "Weights", "numbers", "positions", "shared", "tidy"]

IGNORED = -100
"""Label of a token whose loss does not count."""
Weights = Sequence[float] | Tensor | None


class Level(nn.Module):
    """What all levels share: the base under what is on its net now."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self._mark = model, mark(model.net)

    @property
    def net(self) -> Any:
        """Net that the skills are on."""
        return self.model.net

    def forward(self, batch: Batch) -> Tensor:
        """Loss, ()."""
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every row, (B,)."""
        self._own()
        return self.model.losses(batch)

    def context(self, batch: Batch) -> Tensor:
        """Context of the base; of the level `merge` what blocks of the merged net make of it, where it is looked at behind one."""
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """Prediction of the base under the composition, options as the base's."""
        self._own()
        return self.model.predict(batch, **options)

    def _own(self) -> None:
        if mark(self.net) is not self._mark:
            raise RuntimeError("another skill was attached to this net since it was composed: give every level a copy of the base")


class Stacked(Level):
    """All K skills on the net, every row by the skills that the cell says."""

    each: Tensor

    def __init__(self, model: CausalLM, skills: Sequence[Skill], weights: list[float]) -> None:
        mixture = Mixture(model.net, skills)
        fuse(model.net, mixture)
        super().__init__(model)
        self.mixture, self.weights = mixture, weights
        self.register_buffer("each", torch.eye(len(skills), device=model.net.device), persistent=False)

    def context(self, batch: Batch) -> Tensor:
        """Context of the base."""
        self._mix(torch.zeros_like(self.each[0]), batch)
        return super().context(batch)

    def _under(self, weights: Tensor, batch: Batch) -> Tensor:
        """Losses (B,) under weights (K,)."""
        self._mix(weights, batch)
        return self.model.losses(batch)

    def _mix(self, weights: Tensor, batch: Batch) -> None:
        self.mixture.cell.mix(weights.expand(len(batch["input_ids"]), -1))


def numbers(level: str, weights: Weights, count: int, *, default: float | None = None) -> list[float]:
    """Weights (K,) that are given, or the default, 1 / K; a ValueError if they are not K finite numbers."""
    values = [default or 1 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"level {level!r} got {len(values)} weights for {count} skills: give one weight per skill")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"level {level!r}: weights must be finite, got {values}")
    return values


def shared(one: CausalLM, other: CausalLM) -> int:
    """Tokens of the vocabulary that two models share; a ValueError if they have two vocabularies."""
    sizes = [each.net.get_input_embeddings().num_embeddings for each in (one, other)]
    known = [each.tokenizer for each in (one, other)]
    same = sizes[0] == sizes[1] if None in known else known[0].get_vocab() == known[1].get_vocab()
    if not same:
        raise ValueError(f"two vocabularies, the nets have {sizes[0]} and {sizes[1]} tokens: logits are comparable between models of one tokenizer")
    return min(sizes)


def positions(net: Any) -> float:
    """Tokens that a net can take."""
    return cast("float", getattr(net.config.get_text_config(), "max_position_embeddings", None) or math.inf)


def tidy(batch: Batch) -> dict[str, Tensor]:
    """Rows with their padding last."""
    mask = batch["attention_mask"].long()
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return {key: value.gather(1, order) for key, value in {**batch, "attention_mask": mask}.items()}
