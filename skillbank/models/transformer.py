"""Causal language models of transformers: the loss of the next token, and text that goes on from a prompt.

Shapes: B batch, L tokens, N new tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from skillbank.model import Batch
from skillbank.models.pretrained import Pretrained, mean_over, token_mask

__all__ = ["CausalLM", "prompt_mask"]

IGNORED = -100
"""Label of a token whose loss does not count."""


class CausalLM(Pretrained):
    """A causal language model as a `Model`.

    Batches hold `input_ids` (B, L), `attention_mask` (B, L) where rows are padded, and for training `labels` (B, L): the token where it counts,
    -100 where it does not, as in a prompt. Rows that hold several examples have `segments` (B, L) instead of a mask: the example that a token is
    of, 0 where there is none; they do not see each other. A gate sees the mean of the prompt's input embeddings, or every token's; or of what a few
    blocks make of them, which the base computes by itself, in the same pass: skills then work behind these blocks only.

    Args:
        net: a causal language model of transformers; id of a Hub repository, or a folder, to load one from; or the configuration of one to start
            anew, as a mapping with its `model_type`.
        tokenizer: of a model that starts anew, as `skillbank.tokenizer.kept` gives it.
        tokens: a gate weights every token by itself, in training and in generation.
        layer: how many blocks come before what a gate sees; None for the input embeddings.
        generation: of `net.generate`, over what the net's own generation config says; `max_new_tokens` is 32 unless given.
        revision: of the repository.
        checkpointing: compute activations again in the backward pass instead of keeping them, in train mode: under a gate, whose base stays in eval
            mode, it changes nothing.
        options: of `from_pretrained`: `dtype`, `device_map`, `quantization_config`, `gguf_file`, `attn_implementation`.

    Raises:
        ValueError: a configuration that transformers does not know, a model that cannot be loaded, or one of RoBERTa's kind.

    """

    auto, kind = AutoModelForCausalLM, "causal language model"

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any] | str,
        *,
        tokenizer: Mapping[str, Any] | None = None,
        tokens: bool = False,
        layer: int | None = None,
        generation: Mapping[str, Any] | None = None,
        revision: str | None = None,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(net, tokenizer=tokenizer, revision=revision, checkpointing=checkpointing, options=options)
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.net.modules()):
            raise ValueError(
                f"{type(self.net).__name__} does not generate what it computes: its own passes count positions from behind the padding token, "
                "`generate` from 0; take a net that is made to go on with text"
            )
        self._placed = "position_ids" in inspect.signature(self.net.forward).parameters
        self.tokens, self.layer = tokens, layer
        self._looks_at: Batch = {}
        self._saw: Tensor | None = None
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
        """Loss of every row, (B,), or of every example of packed rows: the mean over its tokens that count; all where the batch has no labels."""
        self._check(batch["input_ids"])
        self._looks_at, self._saw = batch, None
        labels = batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(_mask(batch) == 0, IGNORED)
        logits = self.net(input_ids=batch["input_ids"], **self._alone(batch)).logits[:, :-1].mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:]
        if "segments" in batch:  # nothing comes before the first token of an example
            targets = targets.masked_fill(batch["segments"][:, 1:] != batch["segments"][:, :-1], IGNORED)
        elif "attention_mask" in batch:  # nor before that of a row
            targets = targets.masked_fill(batch["attention_mask"][:, :-1] == 0, IGNORED)
        each = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        if "segments" not in batch:
            return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)
        segments = batch["segments"][:, 1:]
        size = int(segments.max()) + 1
        which = (segments + size * torch.arange(len(segments), device=segments.device)[:, None]).flatten()
        sums = torch.zeros(2, size * len(segments), dtype=each.dtype, device=each.device)
        sums = sums.index_add(1, which, torch.stack([each.flatten(), (targets != IGNORED).flatten().to(each.dtype)]))
        total, number = sums.view(2, len(segments), size)[:, :, 1:].flatten(1)
        return total[number > 0] / number[number > 0]

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Mean of the input embeddings of the prompt (B, D), of the whole row where it has none; with `layer`, of what its blocks make of them.

        With `tokens` every one of them (B, L, D); in packed rows every token sees its example's mean (B, L, D).
        """
        self._check(batch["input_ids"])
        if self.layer is None:
            return self._pooled(self.net.get_input_embeddings()(batch["input_ids"]), batch)
        with _output_of(self._block) as made, suppress(_EnoughError):
            self.net(input_ids=batch["input_ids"], **self._alone(batch))
        return self._pooled(made[0], batch)

    def _pooled(self, hidden: Tensor, batch: Batch) -> Tensor:
        if self.tokens:
            return hidden
        if "segments" in batch:
            same = _same(batch["segments"])
            asked = same & (batch["labels"] == IGNORED)[:, None] if "labels" in batch else same
            seen = torch.where(asked.any(-1, keepdim=True), asked, same).to(hidden.dtype)
            return seen @ hidden / seen.sum(-1, keepdim=True)
        return mean_over(prompt_mask(batch), hidden)

    @property
    def _block(self) -> nn.Module:
        """The block after which a gate looks."""
        blocks = next(module for module in self.net.modules() if isinstance(module, nn.ModuleList))
        assert self.layer is not None
        if not 1 <= self.layer < len(blocks):
            raise ValueError(f"a gate can look after 1 to {len(blocks) - 1} of the {len(blocks)} blocks, got layer={self.layer}")
        return blocks[self.layer - 1]

    def _alone(self, batch: Batch) -> dict[str, Tensor]:
        """What makes the net see rows without their padding, on whichever side it is, and examples apart; positions are counted as by `generate`."""
        if "segments" in batch:
            return _apart(batch["segments"], self.net.dtype)
        mask = token_mask(batch)
        if "attention_mask" not in batch or not self._placed:
            return {"attention_mask": mask}
        return {"attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}

    @torch.no_grad()
    def predict(self, batch: Batch, *, max_new_tokens: int | None = None) -> Tensor:
        """New tokens after the prompts (B, N), N always `max_new_tokens`: after its end a row is filled with the padding token.

        Args:
            batch: of prompts.
            max_new_tokens: N; None is what `generation` says.

        Raises:
            ValueError: packed rows; prompts that with the new tokens are longer than the net's positions, or have tokens that it does not know.

        """
        if "segments" in batch:
            raise ValueError("packed rows are for training: give every prompt a row of its own")
        mask, new = prompt_mask(batch), max_new_tokens or self.steps
        longest = int(mask.sum(1).max())
        self._check(batch["input_ids"], longest + new)
        order = mask.long().argsort(dim=1, stable=True)[:, -longest:]  # padding first
        ids, mask = batch["input_ids"].gather(1, order), mask.gather(1, order).long()
        config = self.net.generation_config
        ends = self.generation.get("eos_token_id", config.eos_token_id)
        given = [self.generation.get("pad_token_id"), config.pad_token_id, *(ends if isinstance(ends, list) else [ends]), 0]
        pad = next(value for value in given if isinstance(value, int))
        self._looks_at, self._saw = {"input_ids": ids, "attention_mask": mask}, None
        options = {**self.generation, "pad_token_id": pad, "max_new_tokens": new}
        found = self.net.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        return nn.functional.pad(found, (0, new - found.shape[1]), value=pad)

    @property
    def within(self) -> bool:
        """Whether what a gate sees comes about in the pass itself."""
        return self.layer is not None

    @contextmanager
    def passes(self, before: Callable[[Tensor], None], blank: Callable[[int], None], *, live: bool = False) -> Iterator[None]:
        """In this block, `before` is told the context of every pass of the net once it is there; with `layer`, `blank` its rows at its start.

        Where it is `live`, who calls the net is not this model: a pass with nothing in its cache is then one of prompts, as they stand there.
        """

        def start(net: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            cache = kwargs.get("past_key_values")
            anew = live and (cache is None or cache.get_seq_length() == 0)
            if anew:
                mask = kwargs.get("attention_mask")
                self._looks_at = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None or mask.dim() != 2 else mask}
                self._saw = None
            if self.layer is not None:
                blank(len(ids))
            elif self.tokens:
                before(self.net.get_input_embeddings()(ids))
            elif anew:
                before(self._pooled(self.net.get_input_embeddings()(ids), self._looks_at))

        def look(block: nn.Module, args: object, output: Any) -> None:
            hidden = _hidden(output).detach()
            if self._saw is None or self.tokens:
                repeats = len(hidden) // len(self._looks_at["input_ids"])
                self._saw = self._pooled(hidden, {key: value.repeat_interleave(repeats, 0) for key, value in self._looks_at.items()})
            before(self._saw)

        handles = [self.net.register_forward_pre_hook(start, with_kwargs=True)]
        if self.layer is not None:
            handles.append(self._block.register_forward_hook(look))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _EnoughError(Exception):
    """What is behind a block need not run."""


@contextmanager
def _output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """In this block of code a pass ends behind a block of the net; the list holds what that gave."""
    made: list[Tensor] = []

    def end(block: nn.Module, args: object, output: Any) -> None:
        made.append(_hidden(output))
        raise _EnoughError

    handle = block.register_forward_hook(end)
    try:
        yield made
    finally:
        handle.remove()


def _hidden(output: Any) -> Tensor:
    """Hidden states among the outputs of a block."""
    return cast("Tensor", output[0] if isinstance(output, tuple) else output)


def _same(segments: Tensor) -> Tensor:
    """Whether two tokens of a row are of one example, (B, L, L); what is of none is by itself."""
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0) | itself


def _apart(segments: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What makes the net see the examples of a row apart: its mask (B, 1, L, L), and positions that begin anew (B, L)."""
    seen = _same(segments).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    starts = nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return {"attention_mask": mask[:, None], "position_ids": at - at.masked_fill(~starts, 0).cummax(1).values}


def _mask(batch: Batch) -> Tensor:
    """1 for tokens, 0 for padding, (B, L), of packed rows, too."""
    return (batch["segments"] > 0).long() if "segments" in batch else token_mask(batch)


def prompt_mask(batch: Batch) -> Tensor:
    """Whether a token is of the prompt, (B, L): it has no label that counts; in rows that have no such token, whether it is one at all."""
    every = _mask(batch).bool()
    if "labels" not in batch:
        return every
    prompt = every & (batch["labels"] == IGNORED)
    return torch.where(prompt.any(1, keepdim=True), prompt, every)
