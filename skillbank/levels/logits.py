"""Skills that are composed in the logits of the next token: their weighted sum, and fine-tuning of a large base that a small one emulates.

Shapes: B batch, K skills, J variants of a net in one pass, L tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skillbank.levels.level import Stacked, Weights, numbers, positions, shared
from skillbank.model import Batch
from skillbank.models.transformer import CausalLM
from skillbank.skill import Skill

__all__ = ["Emulated", "Logits"]


class Logits(Stacked):
    """The next token's logits are a weighted sum of J variants' of a net, which run as rows (variant, example) of one pass, with one cache.

    Whoever uses the net meanwhile sees a net of B rows: `generate` with all that it can do, and the loss.
    """

    level = "logits"

    def __init__(self, model: CausalLM, skills: Sequence[Skill], weights: Weights) -> None:
        super().__init__(model, skills, numbers(self.level, weights, len(skills)))

    @property
    def speaker(self) -> CausalLM:
        """The model whose net is made to give the sum."""
        return self.model

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every row under the sum, (B,)."""
        with self._joined():
            return self.speaker.losses(batch)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Sum of the logits, (B, L, V), of rows that are padded on the right."""
        ids = batch["input_ids"]
        with self._joined():
            return self.speaker.net(input_ids=ids, attention_mask=batch.get("attention_mask", torch.ones_like(ids))).logits

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """New tokens (B, N) of the sum."""
        with self._joined():
            return self.speaker.predict(batch, **options)

    @contextmanager
    def _joined(self) -> Iterator[None]:
        self._own()
        net = self.speaker.net
        handles = net.register_forward_pre_hook(self._before, with_kwargs=True), net.register_forward_hook(self._after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _spread(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of a pass, once for every variant, whose weights are set."""
        rows = len(inputs["input_ids"])
        self.mixture.cell.mix(self.each.repeat_interleave(rows, 0))
        return {key: _again(value, rows, len(self.each)) for key, value in inputs.items()}

    def _sum(self, logits: Tensor) -> Tensor:
        """Sum (B, L, V) of logits (J B, L, V), in float32 or better."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for weight, part in zip(self.weights, logits.chunk(len(self.weights)), strict=True):
            total = total + weight * part.to(wide)
        return total

    def _before(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.reorder_cache = partial(_reorder, weakref.ref(cache), len(self.each), 0)
        return args, self._spread(kwargs)

    def _after(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.logits = self._sum(output.logits)
        return output


class Emulated(Logits):
    """A large base's logits plus `scale * sum_k w_k (skill_k - base)` of a small one, whose skills and base are rows of one pass."""

    level = "emulated"
    difference: Tensor

    def __init__(self, model: CausalLM, skills: Sequence[Skill], weights: Weights, *, large: CausalLM, scale: float = 1.0) -> None:
        if large.net is model.net:
            raise ValueError("level 'emulated' needs two nets, large is the small model itself: give a copy of it, or another base")
        common, (scale,) = shared(large, model), numbers(self.level, [scale], 1)
        super().__init__(model, skills, weights)
        self.large, self.common = large, common
        self.weights = [scale * weight for weight in self.weights]
        self.weights.append(-sum(self.weights))
        self.each = torch.cat([self.each, torch.zeros_like(self.each[:1])])

    @property
    def speaker(self) -> CausalLM:
        """The large base."""
        return self.large

    def _before(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        small = self.model.net
        known = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
        given = {key: value.to(small.device) if isinstance(value, Tensor) else value for key, value in kwargs.items() if key in known}
        cache = kwargs.get("past_key_values")
        beside = getattr(cache, "beside", None)
        seen = 0 if beside is None else beside.get_seq_length()
        if cache is not None and (getattr(cache, "is_compileable", False) or cache.get_seq_length() != seen):
            raise ValueError(
                "level 'emulated' keeps a cache for each net, which can only grow: leave cache_implementation and assistants out of generation"
            )
        length, limit = seen + given["input_ids"].shape[1], positions(small)
        if length > limit:
            raise ValueError(f"{length} tokens are more than the {limit} that the small model can take: shorten the text, or max_new_tokens")
        output = small(**self._spread(given), past_key_values=beside, use_cache=cache is not None)
        if cache is not None:
            cache.beside, cache.reorder_cache = output.past_key_values, partial(_reorder, weakref.ref(cache), 1, len(self.each))
        self.difference = self._sum(output.logits)
        return args, kwargs

    def _after(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits = output.logits.to(self.difference.dtype, copy=True)
        logits[..., : self.common] += self.difference[:, -logits.shape[1] :, : self.common].to(logits.device)
        output.logits = logits
        del self.difference
        return output


def _again(value: Any, rows: int, times: int) -> Any:
    """Whatever has a row for each of the batch, several times over."""
    if isinstance(value, dict):
        return {key: _again(each, rows, times) for key, each in value.items()}
    batched = isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
    return value.repeat(times, *[1] * (value.dim() - 1)) if batched else value


def _reorder(cache: Callable[[], Any], times: int, beside: int, rows: Tensor) -> None:
    """Let beams go on from other beams (B,), in a cache that has their rows several times, and in the one beside it."""
    held = cache()
    for each, count in ((held, times), (getattr(held, "beside", None), beside)):
        if each is not None:
            type(each).reorder_cache(each, torch.cat([rows + k * len(rows) for k in range(count)]))
