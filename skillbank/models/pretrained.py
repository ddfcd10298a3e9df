"""Nets of transformers with the tokenizer that goes with them: anew from a configuration, or from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from skillbank.model import Batch
from skillbank.tokenizer import restored

__all__ = ["Pretrained", "mean_over", "readable", "token_mask"]


class Pretrained(nn.Module):
    """What models of text share: a net, its tokenizer, and what they say to tokens that it cannot take.

    Args:
        net: a net of that kind; id of a Hub repository, or a folder, to load one from; or the configuration of one to start anew, as a mapping with
            its `model_type`.
        tokenizer: of a model that starts anew, as `skillbank.tokenizer.kept` gives it.
        revision: of the repository.
        checkpointing: compute activations again in the backward pass instead of keeping them, in train mode: under a gate, whose base stays in eval
            mode, it changes nothing.
        options: of `from_pretrained`.
        config: entries of the configuration, whatever it comes from.

    Raises:
        ValueError: a configuration that transformers does not know, a model that cannot be loaded, or options for one that is not loaded.

    """

    auto: Any
    """Class of transformers that builds the net, such as `AutoModelForCausalLM`."""
    kind: str
    """What an error message calls the net."""

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any] | str,
        *,
        tokenizer: Mapping[str, Any] | None,
        revision: str | None,
        checkpointing: bool,
        options: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if options and not isinstance(net, str):
            raise ValueError(f"{sorted(options)} are said to nets that are loaded from a folder or the Hub, this one is not: leave them out")
        self.net: Any = net
        self._tokenizer, self._from = tokenizer, (net, revision)
        if isinstance(net, Mapping):
            known = {} if tokenizer is None else _vocabulary(tokenizer)
            self.net = self.auto.from_config(AutoConfig.for_model(**{**known, **net, **(config or {})}))
        elif isinstance(net, str):
            self.net = self._loaded(net, revision=revision, **(config or {}), **options)
        if checkpointing:
            enable = getattr(self.net, "activation_checkpointing_enable", None) or self.net.gradient_checkpointing_enable  # its older name
            enable({"use_reentrant": False})

    def _loaded(self, name: str, **options: Any) -> nn.Module:
        try:
            return cast("nn.Module", self.auto.from_pretrained(name, **options))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"no {self.kind} at {name!r}, neither as a folder nor on the Hub ({reason}): give a folder, or download it") from None

    @cached_property
    def tokenizer(self) -> Any:
        """What cuts text up for it; None where the model was given without one."""
        if self._tokenizer is not None:
            return restored(self._tokenizer)
        name, revision = self._from
        return AutoTokenizer.from_pretrained(name, revision=revision) if isinstance(name, str) else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the net, and its tokenizer, as transformers loads them."""
        self.net.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _check(self, ids: Tensor, length: int | None = None) -> None:
        """Raise a ValueError for tokens, or more of them, than the net knows."""
        length = length or ids.shape[1]
        limit = getattr(self.net.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"{length} tokens are more than the {limit} that {type(self.net).__name__} can take: shorten the text, or max_new_tokens"
            )
        words = self.net.get_input_embeddings()
        rows = getattr(words, "base_layer", words).num_embeddings  # with a skill on it, too
        if readable(ids) and int(ids.max()) >= rows:
            raise ValueError(
                f"token {int(ids.max())} is not among the {rows} that {type(self.net).__name__} knows: the text was cut up by the tokenizer of "
                "another base"
            )


def token_mask(batch: Batch) -> Tensor:
    """1 for tokens, 0 for padding, (B, L)."""
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])


def mean_over(mask: Tensor, hidden: Tensor) -> Tensor:
    """Mean of hidden states (B, L, D) over the tokens of a mask (B, L), (B, D); 0 where it has none."""
    mask = mask.to(hidden.dtype)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def readable(ids: Tensor) -> bool:
    """Whether looking at values costs no wait for a GPU and stops no compiler."""
    return not ids.is_cuda and not torch.compiler.is_compiling()


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a tokenizer: the size of its vocabulary and the special tokens."""
    words = tokenizer["tokenizer"]["model"]["vocab"]
    ids = dict(words) if isinstance(words, Mapping) else {word: i for i, (word, _) in enumerate(words)}
    ids |= {added["content"]: added["id"] for added in tokenizer["tokenizer"]["added_tokens"]}
    special = {f"{key}_id": ids[tokenizer[key]] for key in ("pad_token", "bos_token", "eos_token") if key in tokenizer}
    return {"vocab_size": max(ids.values()) + 1, "bos_token_id": None, "eos_token_id": None, **special}
