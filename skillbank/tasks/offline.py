"""Recorded transitions with rewards and costs: what critics learn from, weighted imitation, and how safe a policy is.

Shapes: E episodes, N steps of all episodes together, B batch, D features of an observation, A of an action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skillbank.model import Model, evaluating
from skillbank.tasks.control import ControlTask, summary
from skillbank.tasks.demonstrations import Demonstrations
from skillbank.tasks.examples import Examples

__all__ = ["OfflineTask", "Transitions", "Weighing", "effective_sample_size", "safety"]


@runtime_checkable
class Weighing(Protocol):
    """What says how much each step of some demonstrations is worth imitating: a critic."""

    def advantages(self, observation: Tensor, action: Tensor) -> Tensor:
        """How much better an action is than those that are usual, (B, D), (B, A) -> (B,)."""
        ...

    def weights(self, observation: Tensor, action: Tensor) -> Tensor:
        """Weights, at least 0, (B, D), (B, A) -> (B,)."""
        ...


class Transitions(Examples):
    """Examples that also say what came of each: reward, next observation, whether the episode went on and, if there are costs, the cost.

    Args:
        demonstrations: where they are from.
        horizon: H.
        reward_scale: what rewards are multiplied by.
        timeout_is_terminal: whether an episode that was cut counts as one that came to its end.
        options: further arguments of `Examples`.

    Raises:
        ValueError: no step has a known next observation.

    """

    def __init__(
        self, demonstrations: Demonstrations, horizon: int, *, reward_scale: float = 1.0, timeout_is_terminal: bool = False, **options: Any
    ) -> None:
        ends, finals = demonstrations.starts[1:] - 1, demonstrations.finals
        terminated = np.zeros(len(ends), bool) if demonstrations.terminated is None else demonstrations.terminated
        over = terminated | timeout_is_terminal
        known, mask = np.ones(len(demonstrations.rewards), bool), np.ones(len(demonstrations.rewards), np.float32)
        known[ends], mask[ends] = over | (finals is not None), ~over
        if not known.any():
            raise ValueError(f"{demonstrations.source}: no step's next observation is known: give 'next_observations', 'finals' or longer episodes")
        super().__init__(demonstrations, horizon, rows=np.flatnonzero(known), **options)
        following = np.roll(demonstrations.observations, -1, 0)
        following[ends] = demonstrations.observations[ends] if finals is None else finals
        arrays = {"reward": np.float32(reward_scale) * demonstrations.rewards, "next_observation": following, "mask": mask}
        costs = {} if demonstrations.costs is None else {"cost": demonstrations.costs}
        self.more = {key: torch.from_numpy(array) for key, array in (arrays | costs).items()}
        """What a batch holds beside observation and action, for all steps, (N, ...)."""
        if self.mirror is not None:
            self.mirror["next_observation"] = self.mirror["observation"]

    def batch(self, which: Tensor) -> dict[str, Tensor]:
        """Also reward (B,), next_observation (B, D), mask (B,), and cost (B,) and weight (B,) where there are any."""
        rows = self.rows.index_select(0, which)
        return super().batch(which) | {key: values.index_select(0, rows) for key, values in self.more.items()}


class OfflineTask(ControlTask):
    """A control task whose batches also hold what came of each action, and whose policies are judged by their costs as well.

    Batches also hold `reward` (B,), `next_observation` (B, D), `mask` (B,), which is 0 where the episode came to its end there, and `cost` (B,) if
    the demonstrations have costs. Episodes of which it is unknown how they ended count as cut. Where an episode was cut and the observation after
    its last step is unknown, this step is in no batch. With observation noise, next observations have none.

    Args:
        reward_scale: what the rewards of batches are multiplied by.
        timeout_is_terminal: treat episodes that were cut as if they had come to their end, as the official code of arXiv 2502.05932 does; otherwise
            what would have come after counts (arXiv 1712.00378).
        cost_limit: of an episode, at least 0; evaluations then say how much of it is used, and how often it is kept.
        return_range: least and greatest return, for normalised returns.
        options: arguments of `ControlTask`, without `rehearsal`.

    Raises:
        ValueError: as `ControlTask`; or a limit, a range or a scale out of range, or a rehearsal.

    """

    def __init__(
        self,
        *,
        reward_scale: float = 1.0,
        timeout_is_terminal: bool = False,
        cost_limit: float | None = None,
        return_range: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        name = options.get("name")
        if options.get("rehearsal") is not None:
            raise ValueError(f"task {name!r}: what an old task was rewarded for is not this task's reward: leave out rehearsal")
        if not (math.isfinite(reward_scale) and reward_scale > 0) or (cost_limit is not None and cost_limit < 0):
            raise ValueError(f"task {name!r}: reward_scale must be above 0 and cost_limit at least 0, got {reward_scale=}, {cost_limit=}")
        if return_range is not None and not (len(return_range) == 2 and return_range[0] < return_range[1]):
            raise ValueError(f"task {name!r}: return_range is the least and the greatest return, got {list(return_range)}")
        self.cost_limit, self.return_range = cost_limit, return_range
        self._transitions: dict[str, Any] = {"reward_scale": reward_scale, "timeout_is_terminal": timeout_is_terminal}
        super().__init__(**options)

    def _examples_of(self, demonstrations: Demonstrations, **options: Any) -> Examples:
        return Transitions(demonstrations, self.horizon, **self._transitions, **options)

    def weigh(self, critic: Weighing) -> float:
        """Weight the training examples: from now on batches hold `weight` (B,), what a critic gives to the (first) action of each.

        Returns:
            The effective sample size, see `effective_sample_size`.

        Raises:
            ValueError: a critic of other sizes, or weights that are not finite or all 0.

        """
        examples = cast("Transitions", self._examples)
        weights = self._weights(critic)
        examples.more["weight"] = weights
        return effective_sample_size(weights[examples.rows])

    def evaluate(self, model: Model, *, seed: int = 0, episodes: int | None = None) -> dict[str, float]:
        """Return statistics, see `summary`, and those of costs, see `safety`; of a critic, the effective sample size of the weights that it gives.

        Raises:
            ValueError: there is a cost limit, but the environment gives no cost.

        """
        if isinstance(model, Weighing):
            return {"effective_sample_size": effective_sample_size(self._weights(model)[self._examples.rows])}
        rollout = self.rollout(model, seed=seed, episodes=episodes)
        if rollout.costs is None and self.cost_limit is not None:
            raise ValueError(f"task {self.name!r} has cost_limit={self.cost_limit}, but {self.environment!r} gives no 'cost' in info: leave it out")
        return summary(rollout.returns) | safety(rollout.returns, rollout.costs, self.return_range, self.cost_limit)

    @torch.no_grad()
    def _weights(self, critic: Weighing) -> Tensor:
        """Weights of all training steps, (N,)."""
        parts = zip(self._examples.observations.split(2**16), self._examples.actions.split(2**16), strict=True)
        module = cast("nn.Module", critic)
        device = next(module.parameters()).device
        with evaluating(module):
            weights = torch.cat([critic.weights(observation.to(device), action.to(device)).cpu() for observation, action in parts])
        used = weights[self._examples.rows]
        if not (torch.isfinite(used).all() and used.any()):
            found = "all 0" if torch.isfinite(used).all() else "not finite"
            raise ValueError(f"task {self.name!r}: the weights that the critic gives are {found}: train it for longer, or with a smaller lr or beta")
        return weights


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 / N of weights (N,): 1 where all are alike, 1 / N where only one counts."""
    weights = weights.double()
    return float(weights.sum() ** 2 / weights.square().sum() / len(weights))


def safety(
    returns: NDArray[np.float64], costs: NDArray[np.float64] | None, return_range: Sequence[float] | None, cost_limit: float | None
) -> dict[str, float]:
    """Cost and normalised metrics of returns (E,) and costs (E,), as in DSRL (arXiv 2306.09303).

    `normalised_return` is 0 at the least return of the range and 1 at the greatest. `normalised_cost` is the cost over the limit, or the cost plus 1
    if the limit is 0. `safe` is the share of the episodes that keep the limit. What cannot be said is left out.
    """
    found = {}
    if return_range is not None:
        low, high = return_range
        found["normalised_return"] = float((returns.mean() - low) / (high - low))
    if costs is not None:
        found["cost"] = float(costs.mean())
        if cost_limit is not None:
            found["normalised_cost"] = found["cost"] / cost_limit if cost_limit else found["cost"] + 1
            found["safe"] = float((costs <= cost_limit).mean())
    return found
