"""Text that is of one of a few classes, judged by accuracy and by the loss.

Shapes: B batch, L tokens of the longest row, E examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from skillbank.bank import Bank, Base
from skillbank.model import Model, Recorded, evaluating, on, shown
from skillbank.tasks.records import Record
from skillbank.tasks.text import TextTask, prompts

__all__ = ["LabelTask", "classes_of"]


class Labelled(NamedTuple):
    """A record as tokens (L,), with those that the tokenizer puts around a text, and its class."""

    ids: list[int]
    label: int


class LabelTask(TextTask):
    """Learn the class of a text. `evaluate` gives `accuracy`, the share of records whose class is right, `loss`, and `examples`, their number.

    Batches are as those of `TextTask`, with `label` (B,) in the place of `labels`.

    Args:
        name: what the skill is called.
        data: records of `text` and `label`, a text or a whole number, see `read_records`.
        tokenizer: see `tokenizer_of`; mostly the base, which has one.
        classes: their names in the order of the model's head; a version in the bank, whose base has them; or None for the labels of all that is
            trained on, sorted.
        bank: where the base is.
        columns: what the records call their parts otherwise.
        examples: train on the first this many; None on all but the held-out ones.
        held_out: the next this many validate, and are never trained on.
        test: further records, that evaluation takes; None evaluates what is held out.
        length: tokens of the longest example.

    Raises:
        FileNotFoundError: there are no such records.
        ValueError: unsuitable records, a label that is none of the classes, fewer records than asked for, one that is longer than `length`, no such
            tokenizer, a base without classes, or numbers out of range.

    """

    kinds = (("text", "label"),)

    def __init__(
        self,
        *,
        name: str,
        data: str | Path | Iterable[Record],
        tokenizer: str | Any,
        classes: str | Sequence[str] | None = None,
        bank: Bank | str | Path = "adapters",
        columns: Mapping[str, str] | None = None,
        examples: int | None = None,
        held_out: int = 0,
        test: str | Path | Iterable[Record] | None = None,
        length: int = 1024,
    ) -> None:
        self._given = classes_of(classes, bank) if isinstance(classes, str) else classes
        options: dict[str, Any] = {"columns": columns, "examples": examples, "held_out": held_out, "test": test, "length": length}
        super().__init__(name=name, data=data, tokenizer=tokenizer, bank=bank, **options)
        for record in (*self.held_out, *self.test):
            self._class(record)

    @cached_property
    def classes(self) -> list[str]:
        """Their names, in the order of the model's head."""
        if self._given is not None:
            return [str(each) for each in self._given]
        labels = {record["label"] for record in self.records}
        return [str(each) for each in sorted(labels, key=None if all(isinstance(each, int) for each in labels) else str)]

    @property
    def dimensions(self) -> dict[str, Any]:
        """The tokenizer and the names of the classes, which a new base carries."""
        return {**super().dimensions, "classes": self.classes}

    def record(self, model: Model) -> Recorded:
        """Weights that a gate gives for the records that evaluate, at most 100 of them, (E, K); for tokens, their mean."""
        return Recorded(shown(model, self._rows(self._encoded(self.test[:100]))), unit="text")

    def _share(self, model: Model, records: Sequence[Record]) -> dict[str, float]:
        module, right = cast("Any", model), 0
        device = next(module.parameters()).device
        with evaluating(module):
            for i in range(0, len(records), 64):
                batch = on(device, self._rows(self._encoded(records[i : i + 64])))
                right += int((module.predict(batch)[:, 0] == batch["label"]).sum())
        return {"accuracy": right / len(records)}

    def _class(self, record: Record) -> int:
        label = str(record["label"])
        if label not in self.classes:
            raise ValueError(f"task {self.name!r}: label {label!r} is none of the classes {self.classes}, which are the base's or those trained on")
        return self.classes.index(label)

    def _encode(self, record: Record) -> Labelled:
        return Labelled(self.tokenizer(record["text"]).input_ids, self._class(record))

    def _rows(self, examples: Sequence[Labelled]) -> dict[str, Tensor]:
        rows = prompts([each.ids for each in examples], self.tokenizer)
        return {**rows, "label": torch.tensor([each.label for each in examples])}


def classes_of(ref: str, bank: Bank | str | Path = "adapters") -> list[str]:
    """Names of the classes that the base of a version in the bank tells apart.

    Args:
        ref: a base, or what is on one.
        bank: where it is.

    Raises:
        UnknownRef: no such version.
        ValueError: the base is no classifier.

    """
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    base = bank.get(bank.base_of([ref]))
    if not isinstance(base, Base) or "classes" not in base.model:
        raise ValueError(
            f"the base of {ref!r} has no classes, it is no classifier: train one with fit=base model=classifier, or give the classes as a list"
        )
    return list(base.model["classes"])
