"""Skills that are composed in their answers: the one that most give, or that a judge finds the likeliest.

Shapes: B batch, K skills, N new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.levels.level import IGNORED, Stacked, Weights, numbers, shared, tidy
from skillbank.model import Batch
from skillbank.models.transformer import CausalLM, prompt_mask
from skillbank.skill import Skill

__all__ = ["Rerank", "Vote"]


class Vote(Stacked):
    """Every skill answers; the answer with the most votes wins, of several such the likeliest under the skill that gave it.

    Its loss is the mean of the skills' losses: the vote itself has no likelihood.
    """

    level = "vote"

    def __init__(self, model: CausalLM, skills: Sequence[Skill], weights: Weights) -> None:
        values = numbers(self.level, weights, len(skills), default=1.0)
        if min(values) < 0 or not sum(values):
            raise ValueError(f"level {self.level!r}: weights are at least 0 and not all 0, got {values}: leave out a skill that should not count")
        super().__init__(model, skills, values)

    def losses(self, batch: Batch) -> Tensor:
        """Mean of the skills' losses of every row, (B,), by their weights."""
        self._own()
        total = sum(weight * self._under(one, batch) for weight, one in zip(self.weights, self.each, strict=True))
        return cast("Tensor", total) / sum(self.weights)

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """Answers (B, N) that win."""
        self._own()
        if (self.model.generation.get("num_return_sequences") or self.net.generation_config.num_return_sequences or 1) > 1:
            raise ValueError(f"level {self.level!r}: every skill gives one answer to choose from, leave num_return_sequences out of generation")
        count, rows = len(self.each), len(batch["input_ids"])
        self.mixture.cell.mix(self.each.repeat_interleave(rows, 0), self.model.repeats)
        inputs = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        said = self.model.predict(inputs, **options).unflatten(0, (count, -1))
        return said[self._winners(batch, said), torch.arange(rows, device=said.device)]

    def _winners(self, batch: Batch, said: Tensor) -> Tensor:
        """Skills (B,) whose answers among (K, B, N) win."""
        same = (said[:, None] == said[None]).all(-1)
        votes = (same * self.each.new_tensor(self.weights)[:, None]).sum(1)
        ahead = votes >= votes.amax(0) * (1 - 1e-6)
        first = ahead.long().argmax(0)
        if not (ahead & ~same.gather(0, first.expand(1, *same.shape[1:]))[0]).any():
            return first
        own = torch.stack([self._under(one, self._answered(batch, answers)) for one, answers in zip(self.each, said, strict=True)])
        return own.masked_fill(~ahead, math.inf).argmin(0)

    def _answered(self, batch: Batch, said: Tensor) -> dict[str, Tensor]:
        """Prompts and answers (B, N), of which the tokens up to the end of the text count."""
        ends = self.model.generation.get("eos_token_id", self.net.generation_config.eos_token_id)
        over = torch.isin(said, said.new_tensor([] if ends is None else ends)).long()
        counts = over.cumsum(1) - over == 0
        prompt = batch["input_ids"]
        labels = torch.cat([torch.full_like(prompt, IGNORED), said.masked_fill(~counts, IGNORED)], 1)
        mask = torch.cat([prompt_mask(batch), counts], 1)
        return tidy({"input_ids": torch.cat([prompt, said], 1), "attention_mask": mask.long(), "labels": labels})


class Rerank(Vote):
    """Every skill answers; the answer that a judge finds the likeliest per token wins. Its loss is the judge's."""

    level = "rerank"

    def __init__(self, model: CausalLM, skills: Sequence[Skill], weights: Weights, *, judge: str | nn.Module = "skills") -> None:
        if not (judge in ("skills", "base") or callable(getattr(judge, "losses", None))):
            raise ValueError(f"unknown judge {judge!r}: choose skills, base, or a model that has losses")
        if isinstance(judge, CausalLM):
            shared(judge, model)
        super().__init__(model, skills, weights)
        self.judge = judge

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every row as the judge finds it, (B,)."""
        self._own()
        if self.judge == "skills":
            return super().losses(batch)
        return self._under(torch.zeros_like(self.each[0]), batch) if self.judge == "base" else cast("Any", self.judge).losses(batch)

    def _winners(self, batch: Batch, said: Tensor) -> Tensor:
        return torch.stack([self.losses(self._answered(batch, answers)) for answers in said]).argmin(0)
