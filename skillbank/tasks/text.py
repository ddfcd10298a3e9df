"""Text that goes on from prompts, judged by exact answers and by the loss: the language `Task`.

Shapes: B batch, L tokens of the longest row, E examples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from skillbank.bank import Bank
from skillbank.model import Batch, Batches, Model, Recorded, evaluating, on, shown
from skillbank.tasks.records import KINDS, Record, digest_of, kind_of, read_records
from skillbank.tasks.tokens import Encoded, asked, encoded, tokenizer_of
from skillbank.tokenizer import kept

__all__ = ["TextTask", "complete", "prompts", "rows_of"]

IGNORED = -100
MEGA = 32
"""Batches that are sorted by length together."""


class TextTask:
    """Learn what follows prompts, what an assistant says, or how plain text goes on.

    Args:
        name: what the skill is called, e.g. `strings/reverse`.
        data: records that are trained on, see `read_records`.
        tokenizer: see `tokenizer_of`; mostly the base, which has one.
        bank: where the base is.
        columns: what the records call their parts otherwise.
        examples: train on the first this many; None on all but the held-out ones.
        held_out: the next this many validate, and are never trained on.
        test: further records, that evaluation takes; None evaluates what is held out.
        length: tokens of the longest example.
        pack: put short examples into one row, up to `length` tokens; they do not see each other.
        chat_template: of conversations, over the tokenizer's own.

    Raises:
        FileNotFoundError: there are no such records.
        ValueError: unsuitable records, fewer than asked for, one that is longer than `length`, no such tokenizer, or numbers out of range.

    """

    kinds = KINDS
    """What its records may have."""

    def __init__(
        self,
        *,
        name: str,
        data: str | Path | Iterable[Record],
        tokenizer: str | Any,
        bank: Bank | str | Path = "adapters",
        columns: Mapping[str, str] | None = None,
        examples: int | None = None,
        held_out: int = 0,
        test: str | Path | Iterable[Record] | None = None,
        length: int = 1024,
        pack: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if held_out < 0 or length < 2 or (examples is not None and examples < 1):
            given = f"{examples=}, {held_out=}, {length=}"
            raise ValueError(f"task {name!r}: examples must be at least 1, held_out at least 0 and length at least 2, got {given}")
        if tokenizer is None:
            raise ValueError(f"task {name!r} has no tokenizer: give task.tokenizer=<base>, a folder, a Hub id, or bytes for a new base")
        self.name, self.length, self.pack = name, length, pack
        self.source = str(data) if isinstance(data, str | Path) else "records"
        self.tokenizer = tokenizer_of(tokenizer, bank) if isinstance(tokenizer, str) else tokenizer
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        records = read_records(data, columns, self.kinds)
        wanted = len(records) - held_out if examples is None else examples
        if not 1 <= wanted <= len(records) - held_out:
            raise ValueError(f"task {name!r}: {self.source} has {len(records)} records, {wanted} are to be trained on beside {held_out} held out")
        self.records, self.held_out = records[:wanted], records[wanted : wanted + held_out]
        self.test = self.held_out if test is None else read_records(test, columns, self.kinds)
        self._examples = self._encoded(self.records)

    def __repr__(self) -> str:
        """One line: name, source, number of records."""
        return f"{type(self).__name__}({self.name!r}, {self.source!r}, {len(self.records)} records)"

    @property
    def dimensions(self) -> dict[str, Any]:
        """The tokenizer, which a new base carries."""
        return {"tokenizer": kept(self.tokenizer)}

    @property
    def data(self) -> dict[str, str]:
        """SHA-256 of what is trained on, by source."""
        return {self.source: digest_of(self.records, self.kinds)}

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        """Endless training batches: `input_ids` (B, L), `attention_mask` and `labels`; the batch of step i depends on (seed, i) alone.

        Every example is seen once before any is seen again, examples of about the same length together. Packed rows have `segments` (B, L)
        instead of a mask: which example a token is of, from 1 on, 0 where there is none.

        Raises:
            ValueError: a batch size below 1 or a negative seed.

        """
        if batch_size < 1 or seed < 0:
            raise ValueError(f"task {self.name!r}: batches need a batch size of at least 1 and a seed of at least 0, got {batch_size=}, {seed=}")
        sizes = np.array([len(each.ids) for each in self._examples])
        per_epoch = -(-len(sizes) // batch_size)

        def order(epoch: int) -> list[np.ndarray[Any, Any]]:
            generator = np.random.Generator(np.random.Philox(key=seed, counter=epoch << 192))
            shuffled = np.resize(generator.permutation(len(sizes)), per_epoch * batch_size)
            together = [
                part[np.argsort(sizes[part], kind="stable")]
                for part in np.split(shuffled, range(MEGA * batch_size, len(shuffled), MEGA * batch_size))
            ]
            batches = np.concatenate(together).reshape(per_epoch, batch_size)
            return list(batches[generator.permutation(per_epoch)])

        def stream(start: int) -> Iterator[Batch]:
            known, batches = -1, list[np.ndarray[Any, Any]]()
            for step in count(start):
                epoch, position = divmod(step, per_epoch)
                if epoch != known:
                    known, batches = epoch, order(epoch)
                yield self._batch([self._examples[i] for i in batches[position]])

        return stream

    def validation(self, *, batch_size: int) -> Iterator[Batch]:
        """One pass over the held-out records.

        Raises:
            ValueError: nothing is held out.

        """
        if not self.held_out:
            raise ValueError(f"task {self.name!r} holds out no records: set held_out to the number that validate")
        examples = self._encoded(self.held_out)
        return (self._batch(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size))

    @torch.no_grad()
    def evaluate(self, model: Model, *, seed: int = 0, episodes: int | None = None) -> dict[str, float]:
        """Share of records that are answered exactly (blanks at both ends aside), of those that ask something; the loss and the number of all.

        Args:
            model: that answers.
            seed: ignored: an evaluation takes the same records every time.
            episodes: take the first this many; None takes all.

        Raises:
            ValueError: there are no records to evaluate.

        """
        records = self.test[:episodes]
        if not records:
            raise ValueError(f"task {self.name!r} has no records to evaluate: give it test records, or held_out")
        loss, module = 0.0, cast("Any", model)
        device = next(module.parameters()).device
        with evaluating(module):
            for i in range(0, len(records), 64):
                part = records[i : i + 64]
                loss += float(module(on(device, self._rows(self._encoded(part))))) * len(part)
        found = {"loss": loss / len(records), "examples": float(len(records))}
        return {**self._share(model, records), **found}

    def _share(self, model: Model, records: Sequence[Record]) -> dict[str, float]:
        """Share of records that a model gets right, by the name of the metric; nothing where there is no right or wrong."""
        asking = [record for record in records if kind_of(record) != ("text",)]
        if not asking:
            return {}
        answers = self.answers(model, asking)
        return {"exact": sum(given.strip() == answer_of(record).strip() for given, record in zip(answers, asking, strict=True)) / len(asking)}

    def by(self, key: str) -> dict[str, TextTask]:
        """Tasks that evaluate the records with the same value of a key, by that value.

        Raises:
            ValueError: a record without that key.

        """
        missing = next((i for i, record in enumerate(self.test) if key not in record), None)
        if missing is not None:
            raise ValueError(f"task {self.name!r}: record {missing} of those that evaluate has no {key!r}: it has {sorted(self.test[missing])}")
        groups: dict[str, TextTask] = {}
        for value in dict.fromkeys(str(record[key]) for record in self.test):
            groups[value] = copy.copy(self)
            groups[value].test = [record for record in self.test if str(record[key]) == value]
        return groups

    def answers(self, model: Model, records: Sequence[Record], *, batch_size: int = 64) -> list[str]:
        """What the model says to each record's prompt, as long as the longest right answer of those asked at once, and its end, at most."""
        new = [len(self.tokenizer(answer_of(record), add_special_tokens=False).input_ids) + 1 for record in records]
        asks, found = [asked(self.tokenizer, record) for record in records], [""] * len(records)
        for some in _groups([max(len(ask), 1) for ask in asks], new):
            options = {"tokenizer": self.tokenizer, "batch_size": batch_size, "max_new_tokens": max(new[i] for i in some)}
            for i, said in zip(some, complete(model, [asks[i] for i in some], **options), strict=True):
                found[i] = said
        return found

    def record(self, model: Model) -> Recorded:
        """Weights that a gate gives for the records that evaluate, at most 100 of them, (E, K); for tokens, their mean."""
        batch = prompts([asked(self.tokenizer, record) for record in self.test[:100]], self.tokenizer)
        return Recorded(shown(model, batch), unit="prompt")

    def _encoded(self, records: Sequence[Record]) -> list[Any]:
        found = [self._encode(record) for record in records]
        over = [i for i, each in enumerate(found) if len(each.ids) > self.length]
        if over:
            size = len(found[over[0]].ids)
            raise ValueError(
                f"task {self.name!r}: {len(over)} records are longer than length={self.length} tokens, record {over[0]} is the first, with {size}: "
                "raise length to what the base can take, or shorten them"
            )
        return found

    def _encode(self, record: Record) -> Any:
        """An example, with its tokens as `ids`."""
        return encoded(self.tokenizer, record)

    def _batch(self, examples: Sequence[Any]) -> Batch:
        return packed(examples, self.length, self.tokenizer) if self.pack else self._rows(examples)

    def _rows(self, examples: Sequence[Any]) -> Batch:
        """Batch with a row for each example."""
        return rows_of(examples, self.tokenizer)


def answer_of(record: Record) -> str:
    """What a record wants to hear."""
    if kind_of(record) == ("prompt", "completion"):
        return str(record["completion"])
    return str(next(turn["content"] for turn in reversed(record["messages"]) if turn["role"] == "assistant"))


def _groups(prompts: Sequence[int], answers: Sequence[int]) -> Iterator[list[int]]:
    """Records in groups whose longest prompt and longest answer are together no longer than one record by itself is at most."""
    longest = max(map(sum, zip(prompts, answers, strict=True)))
    some, prompt = list[int](), 0
    for i in sorted(range(len(prompts)), key=lambda i: answers[i]):
        prompt = max(prompt, prompts[i])
        if prompt + answers[i] > longest:
            yield some
            some, prompt = [], prompts[i]
        some.append(i)
    yield some


def rows_of(examples: Sequence[Encoded], tokenizer: Any) -> dict[str, Tensor]:
    """Batch with a row for each example, filled up on the right."""
    width = max(len(each.ids) for each in examples)
    ids = torch.full((len(examples), width), _pad(tokenizer))
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, each in enumerate(examples):
        size = len(each.ids)
        ids[row, :size], mask[row, :size] = torch.tensor(each.ids), 1
        labels[row, :size] = torch.tensor([token if counts else IGNORED for token, counts in zip(*each, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(examples: Sequence[Encoded], length: int, tokenizer: Any) -> dict[str, Tensor]:
    """Batch whose rows hold as many examples as fit, the longest first."""
    bins: list[list[Encoded]] = []
    for each in sorted(examples, key=lambda example: -len(example.ids)):
        room = next((row for row in bins if sum(len(other.ids) for other in row) + len(each.ids) <= length), None)
        if room is None:
            bins.append([each])
        else:
            room.append(each)
    joined = [Encoded([i for each in row for i in each.ids], [c for each in row for c in each.counts]) for row in bins]
    batch = rows_of(joined, tokenizer)
    segments = torch.zeros_like(batch.pop("attention_mask"))
    for line, row in zip(segments, bins, strict=True):
        sizes = torch.tensor([len(each.ids) for each in row])
        line[: int(sizes.sum())] = torch.repeat_interleave(torch.arange(1, len(row) + 1), sizes)
    return {**batch, "segments": segments}


def prompts(asks: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, Tensor]:
    """Batch of prompts, filled up on the right; a prompt without tokens is one padding token."""
    rows = rows_of([Encoded(list(ask) or [_pad(tokenizer)], [False] * max(len(ask), 1)) for ask in asks], tokenizer)
    del rows["labels"]
    return rows


@torch.no_grad()
def complete(model: Any, asks: Sequence[str | Sequence[int]], *, tokenizer: Any = None, batch_size: int = 64, **options: Any) -> list[str]:
    """What a model says after prompts.

    Args:
        model: a `CausalLM`, or one under skills and a gate.
        asks: prompts as text, or as tokens.
        tokenizer: where it is not the model's own.
        batch_size: prompts at once, those of about the same length together.
        options: of generation, for example `max_new_tokens`.

    Raises:
        ValueError: neither the model nor the caller has a tokenizer.

    """
    tokenizer = tokenizer or getattr(getattr(model, "model", model), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{type(model).__name__} has no tokenizer of its own: give one, see tokenizer_of")
    tokens = [list(ask) if not isinstance(ask, str) else asked(tokenizer, {"prompt": ask, "completion": ""}) for ask in asks]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    device, found = next(model.parameters()).device, [""] * len(tokens)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            said = model.predict(on(device, prompts([tokens[i] for i in some], tokenizer)), **options)
            for i, text in zip(some, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True):
                found[i] = text
    return found


def _pad(tokenizer: Any) -> int:
    """What rows are filled up with; it never counts, so any token will do."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
