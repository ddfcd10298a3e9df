"""From text to tokens: where a tokenizer comes from, and which tokens of a record count in the loss.

Shapes: L tokens of a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skillbank.bank import Bank, Base, Checkpoint
from skillbank.tasks.records import Record, kind_of
from skillbank.tokenizer import byte_tokenizer, restored

__all__ = ["Encoded", "asked", "encoded", "tokenizer_of"]


class Encoded(NamedTuple):
    """A record as tokens (L,): ids, and whether each is to be learned."""

    ids: list[int]
    counts: list[bool]


def tokenizer_of(where: str, bank: Bank | str | Path = "adapters") -> Any:
    """Tokenizer of a base, a folder or the Hub.

    Args:
        where: `bytes`, one token per byte of UTF-8; a folder, or a file in the format of `tokenizers`; a version in the bank, whose base has one; or
            id of a repository of the Hub.
        bank: where versions are looked up.

    Raises:
        ValueError: there is none.

    """
    if where == "bytes":
        return byte_tokenizer()
    if Path(where).is_file():
        return PreTrainedTokenizerFast(tokenizer_file=where)
    if Path(where).is_dir():
        return AutoTokenizer.from_pretrained(where)
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    try:
        exact = bank.resolve(where)
    except (LookupError, ValueError, FileNotFoundError):
        exact = None
    if exact is not None:
        base = bank.get(bank.base_of([exact]))
        if isinstance(base, Checkpoint):
            return AutoTokenizer.from_pretrained(base.repo, revision=base.revision)
        if not isinstance(base, Base) or "tokenizer" not in base.model:
            raise ValueError(f"the base of {where!r} has no tokenizer: it is no language model, or give the task a tokenizer of its own")
        return restored(base.model["tokenizer"])
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no tokenizer {where!r}: there is no such folder, no such version in {bank}, and the Hub says: {reason}") from None


def asked(tokenizer: Any, record: Record) -> list[int]:
    """Tokens of what a record asks: its prompt, the conversation before the last answer, or the start of a plain text."""
    kind = kind_of(record)
    if kind == ("prompt", "completion"):
        return [*_start(tokenizer), *_plain(tokenizer, record["prompt"])]
    if kind == ("messages",):
        turns = record["messages"]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return _chat(tokenizer, turns[:last], ask=True)
    return _start(tokenizer)


def encoded(tokenizer: Any, record: Record) -> Encoded:
    """A record as tokens: completions, what the assistant says, or a whole plain text count, with the token that ends them.

    Raises:
        ValueError: a conversation, and a tokenizer that has no template for one, or one whose turns change what was said before.

    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = kind_of(record)
    if kind == ("messages",):
        return _conversation(tokenizer, record["messages"])
    prompt = asked(tokenizer, record)
    answer = [*_plain(tokenizer, record["text" if kind == ("text",) else "completion"]), *end]
    return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _conversation(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> Encoded:
    ids: list[int] = []
    counts: list[bool] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, after = _chat(tokenizer, turns[:i], ask=True), _chat(tokenizer, turns[: i + 1])
            if before[: len(ids)] != ids or after[: len(before)] != before:
                raise ValueError(
                    f"the chat template changes what was said before turn {i}, so its tokens cannot be told apart: give one answer per record"
                )
            counts += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
            ids = after
    return Encoded(ids, counts)


def _chat(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, ask: bool = False) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: give the task one as chat_template, or records of prompt and completion")
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
    return _plain(tokenizer, text)


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _start(tokenizer: Any) -> list[int]:
    """The token that starts every text, if the tokenizer sets one."""
    return [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
