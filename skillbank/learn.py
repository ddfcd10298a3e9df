"""Merge weights learned from data, on the exact weighted sum: by gradient, one per skill or one per skill and module, or by search."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.fit import Fit, fit, validation_loss
from skillbank.mixture import Mixed, Mixture
from skillbank.model import Batch, Batches, Model, ModelModule
from skillbank.skill import Skill, modules_of

__all__ = ["Weighted", "learn_weights", "search_weights"]

Objective = Callable[[ModelModule, Batch], Tensor]


class Weighted(Mixed):
    """A model under K weights that are the same for every input, or K per module: a merge that is not carried out yet. A `Model`.

    Args:
        model: the base, changed in place: the stack of the skills is attached to its net.
        skills: K skills.
        start: (K,) to start from, default 1 / K each.
        per_module: weights of its own for every module.
        objective: what is minimised, from the model and a batch; default is the model's own loss.

    """

    def __init__(
        self,
        model: nn.Module,
        skills: Sequence[Skill],
        *,
        start: Sequence[float] | None = None,
        per_module: bool = False,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        values = [1 / len(skills)] * len(skills) if start is None else [float(each) for each in start]
        if len(values) != len(skills):
            raise ValueError(f"got {len(values)} weights for {len(skills)} skills: give one weight per skill")
        self.model, self.objective = cast("ModelModule", model), objective
        self.mixture = Mixture(self.model.net, skills)
        self.modules_of_skills = modules_of(skills) if per_module else None
        self.weights = nn.Parameter(torch.tensor(values, device=next(model.parameters()).device).repeat(len(self.modules_of_skills or [0]), 1))
        self.model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Weighted:
        """Base and skills stay in eval mode."""
        self.training = mode
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Objective under the weights, ()."""
        self._mix(batch)
        return self.model(batch) if self.objective is None else self.objective(self.model, batch)

    def for_merge(self) -> list[float] | list[dict[str, float]]:
        """Weights as `merge` takes them."""
        rows = self.weights.detach().double().tolist()
        if self.modules_of_skills is None:
            return rows[0]
        return [{name: row[k] for name, row in zip(self.modules_of_skills, rows, strict=True)} for k in range(len(rows[0]))]

    def _mix(self, batch: Batch, repeats: int = 1) -> Tensor:
        rows = len(next(iter(batch.values())))
        each = [row.expand(rows, -1) for row in self.weights]
        self.mixture.cell.mix(each[0] if self.modules_of_skills is None else dict(zip(self.modules_of_skills, each, strict=True)), repeats)
        return self.weights


def learn_weights(
    model: Model,
    skills: Sequence[Skill],
    batches: Batches,
    *,
    steps: int = 200,
    lr: float = 0.02,
    start: Sequence[float] | None = None,
    per_module: bool = False,
    objective: Objective | None = None,
    **options: Any,
) -> tuple[list[float] | list[dict[str, float]], Fit]:
    """Learn the weights of a merge from data.

    The gradient goes through the factors, so that a step costs what a step of a gate costs, and what is learned is what `merge(skills, weights)`
    computes. With weights per module this is LoRA soups' CAT (arXiv 2410.13025); with the entropy of the predictions as objective and unlabelled
    batches, AdaMerging (arXiv 2310.02575).

    Args:
        model: the base; the skills are attached to it.
        skills: K skills.
        batches: as for `fit`, for example `task.batches(batch_size=256, seed=0)`.
        steps: of the optimiser.
        lr: learning rate.
        start: (K,) to start from, default 1 / K each.
        per_module: weights of its own for every module.
        objective: from the model and a batch to what is minimised, (); default is the model's loss.
        options: of `fit`.

    Returns:
        Weights for `merge`, (K,) or a mapping per skill; and what the training came to.

    """
    weighted = Weighted(cast("nn.Module", model), skills, start=start, per_module=per_module, objective=objective)
    came_to = fit(weighted, batches, [weighted.weights], steps=steps, lr=lr, **{"weight_decay": 0.0, "ema": None, **options})
    return weighted.for_merge(), came_to


def search_weights(
    model: Model,
    skills: Sequence[Skill],
    batches: Iterable[Batch],
    *,
    evaluations: int = 40,
    within: tuple[float, float] = (-1.5, 1.5),
    penalty: float = 0.05,
    objective: Objective | None = None,
    optimizer: str = "NGOpt",
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """Search for the weights of a merge without gradients, from no skill at all; what is evaluated is what `merge(skills, weights)` computes.

    The idea of LoraHub (arXiv 2307.13269), which merges A and B apart; here on the exact sum. For objectives that have no gradient, or few skills.

    Args:
        model: the base; the skills are attached to it.
        skills: K skills.
        batches: of the task, all of them looked at in every evaluation.
        evaluations: of the objective, the one at 0 first.
        within: bounds of every weight, with 0, where the search starts, between them.
        penalty: of the mean absolute weight, added to the objective.
        objective: from the model and a batch to what is minimised, (); default is the model's loss. It may draw random numbers, the same in every
            evaluation.
        optimizer: of nevergrad.
        seed: of the search.

    Returns:
        Weights for `merge`, (K,), and the best value after every evaluation.

    Raises:
        ImportError: nevergrad is not installed.
        ValueError: no batches, no evaluations, bounds without 0, or an objective that is not finite there.

    """
    import nevergrad

    looked_at = list(batches)
    if not looked_at or evaluations < 1:
        raise ValueError(f"a search needs batches and evaluations, got {len(looked_at)} and {evaluations}")
    if not within[0] <= 0 <= within[1]:
        raise ValueError(f"a search starts at 0, which is not within={within}: give bounds around it")
    weighted = Weighted(cast("nn.Module", model), skills, start=[0.0] * len(skills), objective=objective)

    def value(weights: Sequence[float]) -> float:
        with torch.no_grad():
            weighted.weights.copy_(torch.tensor([list(weights)]))
        return validation_loss(weighted, looked_at, seed=seed, repeats=1) + penalty * sum(map(abs, weights)) / len(skills)

    space = nevergrad.p.Array(init=[0.0] * len(skills)).set_bounds(*within)
    space.random_state.seed(seed)
    search = nevergrad.optimizers.registry[optimizer](parametrization=space, budget=evaluations)
    best: list[float] = [0.0] * len(skills)
    trace: list[float] = []
    search.suggest(best)
    for turn in range(evaluations):
        with warnings.catch_warnings(action="ignore"):  # what its optimisers say to each other
            asked = search.ask()
        found = value(asked.value.tolist())
        if turn == 0 and not math.isfinite(found):
            raise ValueError(f"the objective is {found} where all weights are 0: look at the base and the batches")
        search.tell(asked, found if math.isfinite(found) else sys.float_info.max)
        best, least = (asked.value.tolist(), found) if not trace or found < trace[-1] else (best, trace[-1])
        trace.append(least)
    return best, trace
