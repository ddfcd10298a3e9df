"""Causal language models of transformers: the loss of the next token, and text that goes on from a prompt.

Shapes: B batch, L tokens, N new tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from skillbank.model import Batch

__all__ = ["CausalLM"]

IGNORED = -100
"""Label of a token whose loss does not count."""


class CausalLM(nn.Module):
    """A causal language model as a `Model`.

    Batches hold `input_ids` (B, L), `attention_mask` (B, L) where rows are padded, and for training `labels` (B, L): the token where it counts,
    -100 where it does not, as in a prompt. A gate sees the mean of the prompt's input embeddings, or every token's.

    Args:
        net: a causal language model of transformers, or the configuration of one to start anew, as a mapping with its `model_type`.
        tokens: a gate weights every token by itself, in training and in generation.
        generation: of `net.generate`, over what the net's own generation config says; `max_new_tokens` is 32 unless given.

    Raises:
        ValueError: a configuration that transformers does not know.

    """

    def __init__(self, net: nn.Module | Mapping[str, Any], *, tokens: bool = False, generation: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.net: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**net)) if isinstance(net, Mapping) else net
        self.tokens = tokens
        self.generation = {"max_new_tokens": 32, **(generation or {})}

    @property
    def repeats(self) -> int:
        """Rows of the net per row of the batch: beams."""
        return self.generation.get("num_beams") or self.net.generation_config.num_beams or 1

    @property
    def steps(self) -> int:
        """Passes of the net for one prediction."""
        return cast("int", self.generation["max_new_tokens"])

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the next token, (): the mean of `losses`."""
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every row, (B,): the mean over its tokens that count; all of them where the batch has no labels."""
        labels = batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(_mask(batch) == 0, IGNORED)
        logits = self.net(input_ids=batch["input_ids"], attention_mask=_mask(batch)).logits[:, :-1].mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED, reduction="none")
        return each.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Mean of the input embeddings of the prompt (B, D), of the whole row where it has none; with `tokens`, every embedding (B, L, D)."""
        words = self.net.get_input_embeddings()(batch["input_ids"])
        if self.tokens:
            return words
        mask = _prompt(batch)[..., None].to(words.dtype)
        return (words * mask).sum(1) / mask.sum(1).clamp(min=1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """New tokens after the prompts (B, N), N always `max_new_tokens`: after its end a row is filled with the padding token."""
        mask = _prompt(batch)
        order = mask.long().argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]  # padding first
        ids, mask = batch["input_ids"].gather(1, order), mask.gather(1, order).long()
        config = self.net.generation_config
        given = [self.generation.get("pad_token_id"), config.pad_token_id, config.eos_token_id, 0]
        pad = next(value for value in given if isinstance(value, int))
        found = self.net.generate(ids, attention_mask=mask, **{**self.generation, "pad_token_id": pad})[:, ids.shape[1] :]
        return nn.functional.pad(found, (0, self.steps - found.shape[1]), value=pad)

    @contextmanager
    def passes(self, before: Callable[[Tensor], None]) -> Iterator[None]:
        """In this block, `before` is told the input embeddings (B, L, D) of every pass of the net before it runs."""

        def look(net: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            before(self.net.get_input_embeddings()(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))

        handle = self.net.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _mask(batch: Batch) -> Tensor:
    """1 for tokens, 0 for padding, (B, L)."""
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])


def _prompt(batch: Batch) -> Tensor:
    """Whether a token is of the prompt, (B, L): it has no label that counts; in rows that have no such token, whether it is one at all."""
    every = _mask(batch).bool()
    if "labels" not in batch:
        return every
    prompt = every & (batch["labels"] == IGNORED)
    return torch.where(prompt.any(1, keepdim=True), prompt, every)
