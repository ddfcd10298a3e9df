"""Skills that are composed in the prompt: what their cards say, and examples, ahead of every question to the base.

Shapes: B batch, N new tokens, P tokens ahead of the prompts.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from skillbank.attach import detach
from skillbank.bank.card import Card
from skillbank.levels.level import IGNORED, Level, Weights, positions, tidy
from skillbank.model import Batch
from skillbank.models.transformer import CausalLM
from skillbank.skill import Skill
from skillbank.tasks.records import Record
from skillbank.tasks.tokens import encoded

__all__ = ["InContext", "described"]


class InContext(Level):
    """The base answers, after what the skills' cards say and examples of theirs; no adapter is on it."""

    def __init__(
        self,
        model: CausalLM,
        skills: Sequence[Skill],
        weights: Weights,
        *,
        examples: Sequence[Sequence[Record]] = (),
        cards: Sequence[Card] = (),
        tokenizer: Any = None,
        heading: str = "Skill: {description}\n",
        template: str = "{prompt}{completion}\n\n",
    ) -> None:
        counts = {"skills": len(skills), "examples": len(examples), "cards": len(cards)}
        given = {name: count for name, count in counts.items() if count}
        if len(set(given.values())) > 1 or not (examples or cards):
            raise ValueError(f"level 'in_context' got {counts}: give as many lists of examples, or cards, as there are skills")
        if weights is not None:
            raise ValueError(f"level 'in_context' has no use for weights, got {weights}: leave them out, or give a skill more examples")
        detach(model.net)
        super().__init__(model)
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise ValueError("level 'in_context' reads examples, and the base was given without a tokenizer: give one as tokenizer")
        self.end = template.rpartition("{completion}")[2]
        self.prefix: list[int] = []
        for k in range(len(examples or cards)):
            self.prefix += self._tokens(heading.format(description=described(cards[k]))) if cards else []
            for record in examples[k] if examples else ():
                if "prompt" in record and "completion" in record:
                    self.prefix += self._tokens(template.format(**record))
                else:
                    self.prefix += [i for i in encoded(self.tokenizer, record).ids if i != self.tokenizer.bos_token_id]
        if len(self.prefix) >= positions(model.net):
            raise ValueError(f"the examples are {len(self.prefix)} tokens, the base can take {positions(model.net)}: give fewer of them")

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every row after the examples, (B,): of its own tokens alone."""
        if "segments" in batch:
            raise ValueError("level 'in_context': packed rows have no place for examples, set pack to false")
        return super().losses(self._preceded({"labels": batch["input_ids"], **batch}))

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """Answers (B, N) after the examples, cut off where another example would begin."""
        said = super().predict(self._preceded(batch), **options)
        pad = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
        for row in said if self.end else ():
            answer, found, _ = self._text(row).partition(self.end)
            if found:
                row[bisect.bisect_left(range(len(row)), True, key=lambda n: self._text(row[:n]).startswith(answer)) :] = pad
        return said

    def _text(self, tokens: Tensor) -> str:
        return cast("str", self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _tokens(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False).input_ids)

    def _preceded(self, batch: Batch) -> dict[str, Tensor]:
        """Batch with the P tokens ahead of every row, behind the token that starts a text."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        first = mask.long().argmax(1, keepdim=True)
        start = ids.gather(1, first)
        starts = start == (-1 if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id)
        mask = mask.scatter(1, first, mask.gather(1, first) & ~starts)
        prefix = ids.new_tensor(self.prefix).expand(len(ids), -1)
        ahead = {"input_ids": torch.cat([start, prefix], 1), "attention_mask": torch.cat([starts, torch.ones_like(prefix).bool()], 1)}
        ahead["labels"] = torch.full_like(ahead["input_ids"], IGNORED)
        own = {key: value.masked_fill(~mask, IGNORED) if key == "labels" else value for key, value in {**batch, "attention_mask": mask}.items()}
        return tidy({key: torch.cat([ahead[key], value], 1) for key, value in own.items()})


def described(card: Card) -> str:
    """What a card says of its skill in one line: its task, notes and tags; a ValueError if it says nothing."""
    task = card.conf.get("task")
    name = task.get("name") if isinstance(task, Mapping) else None
    parts = [": ".join(str(part) for part in (name, " ".join(card.notes.split())) if part), f"({', '.join(card.tags)})" if card.tags else ""]
    if not any(parts):
        raise ValueError("a card says nothing of its skill, neither a task nor notes nor tags: publish it with notes, or give examples alone")
    return " ".join(part for part in parts if part)
