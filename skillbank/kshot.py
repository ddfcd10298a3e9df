"""Skills for a new task, found by a few labelled examples of it: every skill of a base on every example, many of them in one pass of the net.

Shapes: S skills, K examples, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from skillbank.attach import attach, detach, plain_modules
from skillbank.bank import Bank, Ref
from skillbank.gate import Routes
from skillbank.layers import matrix
from skillbank.load import load
from skillbank.mixture import Mixed
from skillbank.model import Batch, on
from skillbank.runtime.fused import unfuse
from skillbank.runtime.products import quicken
from skillbank.runtime.slots import Slots
from skillbank.runtime.streams import Streams
from skillbank.skill import Skill, cosine, modules_of

__all__ = ["Found", "best_skills", "losses_of", "text_batches"]


@dataclass(frozen=True)
class Found:
    """A skill beside its base, on the same examples.

    Args:
        ref: exact reference.
        loss: mean over the examples, as the model measures it: of text, nats per token of the answer.
        margin: mean over the examples of the base's loss less the skill's; above 0 where the skill helps.
        better: share of the examples on which its loss is below the base's, in [0, 1].
        cosine: largest of its delta with those of the skills found before it, in [-1, 1]; 0 for the first.

    """

    ref: Ref
    loss: float
    margin: float
    better: float
    cosine: float


def best_skills(
    bank: Bank | str | Path,
    base: str | Ref,
    examples: str | Path | Iterable[Batch],
    *,
    top: int = 5,
    diversity: float = 0.1,
    by: Literal["loss", "better"] = "loss",
    pattern: str | None = None,
    size: int = 4096,
    device: str | torch.device = "cpu",
) -> list[Found]:
    """Skills of a base that do best on K examples of a task, best first, and no two of them nearly the same.

    Selects experts as arXiv 2408.15915 does, with less: the paper ranks them by exact match and by reasoning perplexity, the exponential of the mean
    loss of right answers that are written with their reasoning, which tells those who can solve a task from those who guess. Here the rank is by its
    logarithm, the loss, and the margin is how far that lies below the base's; so let the examples' completions reason too. Nothing is generated.
    The paper looks through all groups for the most diverse one; this is greedy: always the next best that is not too near to one that is there.

    Args:
        bank: where the skills are; they are read a few at a time.
        base: reference of the base.
        examples: file of records, see `read_records`, or batches for the base's model, which needs `losses(batch)`, see `losses_of`.
        top: at most this many.
        diversity: two skills that are kept have a cosine of deltas of 1 - diversity at most, in [0, 2]; 0 keeps copies as well.
        by: `loss`, the mean, or `better`, the share of examples, then the loss: one example that is far off does not decide.
        pattern: shell pattern that the skills' names match, such as `walker/*`.
        size: of one pass, see `losses_of`.
        device: where they are computed.

    Raises:
        UnknownRef: no such base.
        FileNotFoundError: no such file of examples.
        ValueError: no base, no skills on it, no examples, a model without losses by row, no such GPU, or numbers out of range.

    """
    if top < 1 or not 0 <= diversity <= 2 or by not in ("loss", "better"):
        raise ValueError(f"top must be at least 1, diversity in [0, 2] and by loss or better, got {top=}, {diversity=}, {by=}")
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    exact = bank.resolve(base)
    if (kind := bank.card(exact).kind) != "base":
        raise ValueError(f"{str(exact)!r} is a {kind}, a base is needed: give base={bank.base_of([exact])}")
    refs = [entry.ref for entry in bank.list("skill", pattern, base=exact)]
    if not refs:
        raise ValueError(f"{bank} has no skills named {pattern or '*'!r} on the base {str(exact)!r}: train some, or give another base")
    batches = text_batches(examples, exact, bank) if isinstance(examples, str | Path) else examples
    model = load(str(exact), bank, device)
    nothing = cast("Skill", bank.get(refs[0])).scaled(0.0)
    losses = losses_of(model, chain([nothing], (cast("Skill", bank.get(ref)) for ref in refs)), batches, size=size)
    own, others = losses.masked_fill(losses.isnan(), torch.inf).split([1, len(refs)])
    ranked = zip(others.mean(1).tolist(), (own - others).mean(1).tolist(), (others < own).double().mean(1).tolist(), refs, strict=True)
    found: list[Found] = []
    kept: list[Skill] = []
    for loss, margin, better, ref in sorted(ranked, key=lambda each: (-each[2] if by == "better" else 0.0, each[0])):
        skill = cast("Skill", bank.get(ref))
        nearest = max(cosine([skill, *kept])[0, 1:].tolist(), default=0.0)
        if not kept or nearest <= 1 - diversity:
            found.append(Found(ref, loss, margin, better, nearest))
            kept.append(skill)
        if len(kept) == top:
            break
    return found


@torch.no_grad()
def losses_of(model: nn.Module, skills: Iterable[Skill], batches: Iterable[Batch], *, size: int = 4096, seed: int = 0) -> Tensor:
    """Loss of every skill on every example, (S, K) float64, in the order of both; to rounding, what each skill alone on the model's net gives.

    In a pass of the net the rows of a batch are there once per skill, and every skill has its factors for its own. Skills that adapt layers which are
    not linear are attached one by one, with those beside them.

    Args:
        model: the base, with nothing on its net; in eval mode. It has `losses(batch)`, the loss of every row (B,), or of every example of packed
            rows; what it draws at random it draws row by row, the same for every skill.
        skills: any iterable; those of two passes are in memory at most. They are computed in the dtype of the base.
        batches: of the examples.
        size: entries of the largest tensor of a batch that a pass takes, of text its tokens, one skill's at least: what bounds memory.
        seed: of what is drawn at random.

    Raises:
        ValueError: a model without such losses, or with skills, no skills, no examples, or a skill that does not fit the net.

    """
    if isinstance(model, Mixed):
        raise ValueError(f"{type(model).__name__} has skills on its net, which others cannot be compared on: give the base by itself")
    if not callable(getattr(model, "losses", None)):
        raise ValueError(f"{type(model).__name__} has no losses(batch), the loss of every row: without it skills cannot be told apart in one batch")
    device = next(model.parameters()).device
    given = [on(device, batch) for batch in batches]
    if not given:
        raise ValueError("there are no examples: give at least one batch of them")
    stream, count = iter(skills), max(1, size // max(value.numel() for batch in given for value in batch.values()))
    found = [_together(model, some, given, seed) for some in iter(lambda: list(islice(stream, count)), [])]
    if not found:
        raise ValueError("there are no skills to look at: give at least one")
    return torch.cat(found)


def text_batches(examples: str | Path | Iterable[Any], base: str | Ref, bank: Bank | str | Path = "adapters") -> list[dict[str, Tensor]]:
    """Batches of records, or a file of them, for `best_skills`, cut up by a base's tokenizer; raises as `read_records` and `tokenizer_of`."""
    from skillbank.tasks.records import read_records
    from skillbank.tasks.text import rows_of
    from skillbank.tasks.tokens import encoded, tokenizer_of

    tokenizer = tokenizer_of(str(base), bank)
    each = sorted((encoded(tokenizer, record) for record in read_records(examples)), key=lambda example: len(example.ids))
    return [rows_of(each[i : i + 16], tokenizer) for i in range(0, len(each), 16)]


def _together(model: Any, skills: Sequence[Skill], batches: Sequence[Batch], seed: int) -> Tensor:
    """Losses (S, K) of a few skills."""
    modules, plain = modules_of(skills), plain_modules(model.net)
    if not all(name in plain and matrix(plain[name]) is not None for name in modules):
        return torch.cat([_alone(model, skill, batches, seed) for skill in skills])
    slots = Slots(model.net, len(skills), rank=max(max(skill.ranks.values()) for skill in skills), modules=modules)
    quicken(model.net)
    try:
        for slot, skill in enumerate(skills):
            slots.put(slot, skill)
        index = torch.arange(len(skills), device=slots.a[0].device)[:, None]
        found = []
        for batch in batches:
            slots.cell.mix(Routes(index, torch.ones_like(index, dtype=slots.a[0].dtype)), repeats=_rows(batch))
            found.append(_losses(model, batch, len(skills), seed))
        return torch.cat(found, 1)
    finally:
        unfuse(model.net)


def _alone(model: Any, skill: Skill, batches: Sequence[Batch], seed: int) -> Tensor:
    attach(model.net, skill)
    try:
        return torch.cat([_losses(model, batch, 1, seed) for batch in batches], 1)
    finally:
        detach(model.net)


def _losses(model: Any, batch: Batch, count: int, seed: int) -> Tensor:
    """Losses (count, examples) of a batch that is repeated as often."""
    many = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    with Streams([seed] * count, _rows(many)):
        found: Tensor = model.losses(many)
    if found.dim() != 1 or len(found) % count:
        raise ValueError(f"{type(model).__name__}.losses gives {tuple(found.shape)} for {_rows(many)} rows: it must give the loss of every row, (B,)")
    return found.view(count, -1).double().cpu()


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
