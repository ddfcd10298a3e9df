"""Tokenizers as plain values, so that a base of the bank carries its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["byte_tokenizer", "kept", "restored"]

SPECIAL = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token", "chat_template")


def kept(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer as plain values, so that a base can carry it."""
    named = {key: getattr(tokenizer, key, None) for key in SPECIAL}
    return {"tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()), **{key: value for key, value in named.items() if value is not None}}


def restored(conf: Mapping[str, Any]) -> Any:
    """Tokenizer of what `kept` gave."""
    options = dict(conf)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(options.pop("tokenizer"))), **options)


def byte_tokenizer() -> Any:
    """One token per byte of UTF-8, none of them trained."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
