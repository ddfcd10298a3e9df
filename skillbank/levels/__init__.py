"""Where skills are composed, behind one switch: in the parameters, the logits, the answers, or the prompt; every level makes one `Model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from skillbank.attach import attach
from skillbank.gate import ConstantGate
from skillbank.levels.answers import Rerank, Vote
from skillbank.levels.in_context import InContext, described
from skillbank.levels.level import Level, Weights, numbers
from skillbank.levels.logits import Emulated, Logits
from skillbank.merge import merge
from skillbank.mixture import Composed
from skillbank.model import ModelModule
from skillbank.models.transformer import CausalLM
from skillbank.runtime.fused import fuse
from skillbank.skill import Skill
from skillbank.words import did_you_mean

__all__ = ["LEVELS", "compose_at", "described"]


def _merge(model: ModelModule, skills: Sequence[Skill], weights: Any, **options: Any) -> nn.Module:
    attach(model.net, merge(skills, weights, **options))
    fuse(model.net)
    return Level(model)


def _gate(model: ModelModule, skills: Sequence[Skill], weights: Weights, *, gate: nn.Module | None = None, **options: Any) -> nn.Module:
    if gate is not None and weights is not None:
        raise ValueError(f"level 'gate' got a gate and weights {weights}: give one of them")
    if gate is None:
        gate = ConstantGate(0, len(skills), weights=numbers("gate", weights, len(skills))).to(next(model.parameters()).device)
    return Composed(model, gate, skills, **options)


LEVELS: Mapping[str, Callable[..., nn.Module]] = {
    "merge": _merge,
    "gate": _gate,
    "logits": Logits,
    "emulated": Emulated,
    "vote": Vote,
    "rerank": Rerank,
    "in_context": InContext,
}
"""What makes the model of a level, from a base, skills, weights and options."""


def compose_at(level: str, model: nn.Module, skills: Sequence[Skill], weights: Any = None, **options: Any) -> ModelModule:
    """Compose skills on a base at one of the `LEVELS`, all of which a task evaluates alike; `losses` (B,), `forward` and `predict` are the level's.

    - `merge`: in the parameters, once; options of `merge`.
    - `gate`: in the parameters, by a `gate` from the context to weights, or by constant weights; options of `Composed`.
    - `logits`: the sum `sum_k w_k logits_k` of the next token. Log-probabilities would give the same distribution, being logits less a constant per
      position. Weights that do not sum to 1 sharpen it, or flatten it. All skills are rows of one pass, with one cache.
    - `emulated`: `large + scale * sum_k w_k (skill_k - base)`, logits of a `large` base moved as the skills move this small one; proxy tuning where
      scale is 1. Needs the same vocabulary (arXiv 2310.12962, 2401.08565). `generation` is the large model's.
    - `vote`: every skill answers, the answer with most votes wins; of several, the one that its own skill finds likeliest per token. A skill has
      as many votes as its weight, 1 unless given. The loss is the mean of the skills' losses.
    - `rerank`: every skill answers, the answer wins whose `losses` are least: the mean over the `skills` by weight, of the `base`, or of a model that
      is given as `judge`.
    - `in_context`: the base answers after the skills' `cards` and `examples`, records by skill, as text of `heading` and `template`; conversations
      by the chat template. What follows the completion in the template ends an answer. Cut up by `tokenizer`, the base's own (arXiv 2308.00304).

    Args:
        level: one of the above.
        model: the base, changed in place: give every level a copy of its own. A `CausalLM`, at `merge` and `gate` any `Model`.
        skills: K >= 1 on that base; at `in_context` they are only counted, and may be none.
        weights: (K,), 1 / K each unless given; at `merge` as there.
        options: of the level.

    Raises:
        TypeError: the level needs a `CausalLM`.
        ValueError: an unknown level or option, one that is missing, other numbers of weights, examples or cards than of skills, unsuitable weights,
            another vocabulary, or as `merge` and `attach`.

    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: {did_you_mean(level, LEVELS)}")
    known = dict(list(inspect.signature(LEVELS[level]).parameters.items())[3:])
    free = any(each.kind is each.VAR_KEYWORD for each in known.values())
    if not free and (unknown := next((key for key in options if key not in known), None)):
        raise ValueError(f"level {level!r} takes no {unknown!r}: {did_you_mean(unknown, known) if known else 'it has no options'}")
    if missing := [key for key, each in known.items() if each.kind is each.KEYWORD_ONLY and each.default is each.empty and key not in options]:
        raise ValueError(f"level {level!r} needs {missing[0]}: give {missing[0]}=")
    if not skills and level != "in_context":
        raise ValueError(f"level {level!r} got no skills: give at least one")
    if not isinstance(model, CausalLM) and level not in ("merge", "gate"):
        raise TypeError(f"level {level!r} is of language models, got {type(model).__name__}: give a CausalLM, or compose at merge or gate")
    made = LEVELS[level](model, skills, weights, **options)
    return cast("ModelModule", made.requires_grad_(False).eval() if isinstance(made, Level) else made)
