"""Classifiers of transformers: encoders, or decoders, with a head that gives text one of a few classes.

Shapes: B batch, L tokens, D hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from skillbank.model import Batch
from skillbank.models.pretrained import Pretrained, mean_over, readable, token_mask

__all__ = ["Classifier"]


class Classifier(Pretrained):
    """A sequence classifier as a `Model`.

    Batches hold `input_ids` (B, L), `attention_mask` (B, L) where rows are padded, on the right, and for training `label` (B,), the class from 0
    on. A gate sees the mean of a row's input embeddings, or every token's. What a fresh skill adapts is the body alone: the head, and the pooler
    before it, stay the base's, so that all its skills give what one head understands, and whatever they adapt runs on tokens, which a gate can
    weight.

    Args:
        net: a sequence classifier of transformers; id of a Hub repository, or a folder, to load one from, where an encoder without a head gets a new
            one; or the configuration of one to start anew, as a mapping with its `model_type`.
        classes: C names; None for those of the net's configuration.
        tokenizer: of a model that starts anew, as `skillbank.tokenizer.kept` gives it.
        tokens: a gate weights every token by itself.
        revision: of the repository.
        checkpointing: compute activations again in the backward pass instead of keeping them, in train mode: under a gate, whose base stays in eval
            mode, it changes nothing.
        options: of `from_pretrained`: `dtype`, `quantization_config`, `attn_implementation`, `ignore_mismatched_sizes`.

    Raises:
        ValueError: fewer than two classes, a number of them that is not the head's, a configuration that transformers does not know, or a model that
            cannot be loaded.

    """

    auto, kind = AutoModelForSequenceClassification, "classifier"

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any] | str,
        *,
        classes: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        tokens: bool = False,
        revision: str | None = None,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        named = {} if classes is None else {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        try:
            super().__init__(net, tokenizer=tokenizer, revision=revision, checkpointing=checkpointing, options=options, config=named)
        except RuntimeError as error:  # what transformers says to a head of another size
            raise ValueError(f"{net!r} has a head for other classes than {classes}: give ignore_mismatched_sizes=True to start a new one") from error
        self.classes = [self.net.config.id2label[i] for i in range(self.net.config.num_labels)] if classes is None else list(classes)
        if not 1 < len(self.classes) == self.net.config.num_labels:
            raise ValueError(f"a classifier needs at least 2 classes, as many as its head has ({self.net.config.num_labels}), got {self.classes}")
        self.tokens = tokens

    def forward(self, batch: Batch) -> Tensor:
        """Cross entropy of the right class, (): the mean of `losses`."""
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Cross entropy of every row's class, (B,); a ValueError for one that the head has not, or, on a CPU, a row that begins with padding."""
        label = batch["label"]
        if readable(label) and not 0 <= int(label.min()) <= int(label.max()) < len(self.classes):
            worst = int(label.min() if label.min() < 0 else label.max())
            raise ValueError(f"label {worst} is none of the {len(self.classes)} classes {self.classes}: the task has the classes of another base")
        logits = self._logits(batch)
        return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), label, reduction="none")

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Mean of the input embeddings of a row's tokens (B, D); with `tokens` every one of them (B, L, D)."""
        self._check(batch["input_ids"])
        hidden = cast("Tensor", self.net.get_input_embeddings()(batch["input_ids"]))
        return hidden if self.tokens else mean_over(token_mask(batch), hidden)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Most likely class of every row, (B, 1)."""
        return self._logits(batch).argmax(-1, keepdim=True)

    @contextmanager
    def passes(self, before: Callable[[Tensor], None], blank: Callable[[int], None], *, live: bool = False) -> Iterator[None]:
        """In this block, `before` is told the context of every pass of the net ahead of it, whoever calls the net."""

        def start(net: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            rows = {"input_ids": args[0] if args else kwargs["input_ids"]}
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            before(self.context(rows if mask is None else {**rows, "attention_mask": mask}))

        handle = self.net.register_forward_pre_hook(start, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _logits(self, batch: Batch) -> Tensor:
        self._check(batch["input_ids"])
        mask = token_mask(batch)
        if readable(mask) and not mask[:, 0].all():
            raise ValueError("a row begins with padding, where many classifiers look first: pad rows on the right (padding_side='right')")
        return cast("Tensor", self.net(input_ids=batch["input_ids"], attention_mask=mask).logits)
