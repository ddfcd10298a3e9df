"""Critics of recorded transitions: implicit Q-learning for rewards and its mirror image for costs; the weights and the choices of actions they give.

Shapes: B batch, D features of an observation, H action horizon, A action dimensions, N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from skillbank.model import Batch, ModelModule

__all__ = ["BestOf", "Critic", "Objective"]

Objective = Literal["reward", "hj", "qc"]

VIOLATED, KEPT = 25.0, -1.0
"""What the safety value sees of a step with a cost, and of one without (arXiv 2401.10700 and 2502.05932)."""


class TwinQ(nn.Module):
    """Two action values with weights of their own."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_mlp(inputs, hidden) for _ in range(2))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """(B, D), (B, A) -> (2, B)."""
        both = torch.cat([observation, action], dim=-1)
        return torch.stack([head(both).squeeze(-1) for head in self.heads])


class Critic(nn.Module):
    """Action values Q and a state value V of recorded transitions, learned without asking for actions that were not taken.

    A `Model`: batches hold `observation` (B, D), `action` (B, H, A), of which the first is valued, `next_observation` (B, D), `mask` (B,), 0 where
    the episode came to its end and 1 elsewhere, and `reward` (B,) or `cost` (B,). With m the mask, V' = V(next) and g the discount:

    - `reward`: implicit Q-learning (arXiv 2110.06169, eq. 5 and 6). Q -> reward + g m V'; V -> the expectile of the lesser of the two Q.
    - `hj`: the safety value of Hamilton-Jacobi reachability (arXiv 2401.10700), below 0 where costs can be avoided for ever. With h = 25
      at a cost and -1 elsewhere, Q -> m ((1 - g) h + g max(h, V')) + (1 - m) h; V -> the lower expectile of the greater Q.
    - `qc`: discounted costs, Q -> cost + g m V'; V as for `hj`.

    One step of the optimiser is for Q and V together. V sees a copy of Q that follows it; the copy's tensors are parameters without a gradient, and
    every `forward` in train mode begins by moving them: so train all of `parameters()`, without an EMA, and a checkpoint holds everything. A step
    that accumulates batches moves them for each.

    Args:
        observation_dim: D.
        action_dim: A.
        objective: `reward`, `hj` or `qc`.
        hidden: widths of the hidden layers of every net.
        discount: per step, in [0, 1).
        expectile: in (0.5, 1), 0.5 being the mean of the actions that were taken and 1 the best of them; None is 0.7 for rewards and 0.9 for costs.
        tau: share of the way that the copy moves in a step, in (0, 1].
        beta: inverse temperature of the weights.
        clip: largest weight.
        layer_norm: normalise the observations that V sees, each by itself, as the official code of arXiv 2502.05932 does.

    Raises:
        ValueError: an unknown objective, or numbers out of range.

    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        objective: Objective = "reward",
        hidden: Sequence[int] = (256, 256),
        discount: float = 0.99,
        expectile: float | None = None,
        tau: float = 0.005,
        beta: float = 1.0,
        clip: float = 100.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if objective not in ("reward", "hj", "qc"):
            raise ValueError(f"unknown objective {objective!r}: choose reward, hj or qc")
        self.observation_dim, self.action_dim, self.objective, self.discount, self.tau = observation_dim, action_dim, objective, discount, tau
        self.expectile = expectile if expectile is not None else 0.7 if objective == "reward" else 0.9
        self.beta, self.clip = beta, clip
        if not (0 <= discount < 1 and 0.5 <= self.expectile < 1 and 0 < tau <= 1 and beta > 0 and clip > 0):
            given = f"{discount=}, expectile={self.expectile}, {tau=}, {beta=}, {clip=}"
            raise ValueError(f"a critic needs discount in [0, 1), expectile in [0.5, 1), tau in (0, 1], beta and clip above 0, got {given}")
        value = _mlp(observation_dim, hidden)
        if layer_norm:
            value.insert(0, nn.LayerNorm(observation_dim))
        self.net = nn.ModuleDict({"q": TwinQ(observation_dim + action_dim, hidden), "v": value})
        self.target = copy.deepcopy(self.net["q"])
        self._ddp_params_and_buffers_to_ignore = [f"target.{name}" for name, _ in self.target.named_parameters()]
        """What several processes do not wait for: it gets no gradient."""

    def forward(self, batch: Batch) -> Tensor:
        """Loss (): the mean of `losses`; in train mode the copy of Q moves first."""
        if self.training:
            self._follow()
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every example, (B,): that of V, and the mean of those of the two Q."""
        self._check_keys(batch)
        observation, action = batch["observation"], batch["action"][:, 0]
        self._check_sizes(observation, action)
        value = self._value(observation)
        gain = self._gain(self._valued(observation, action), value)
        with torch.no_grad():
            aim = self.aim(batch, self._value(batch["next_observation"]))
        q: Tensor = self.net["q"](observation, action)
        return torch.where(gain < 0, 1 - self.expectile, self.expectile) * gain.square() + (q - aim).square().mean(0)

    def aim(self, batch: Batch, following: Tensor) -> Tensor:
        """What Q is to be, (B,), if the next states have the values `following` (B,)."""
        mask = batch["mask"]
        if self.objective == "hj":
            h = torch.where(batch["cost"] > 0, VIOLATED, KEPT).to(following)
            return torch.lerp(h, (1 - self.discount) * h + self.discount * torch.maximum(h, following), mask)
        return batch["reward" if self.objective == "reward" else "cost"] + self.discount * mask * following

    @torch.no_grad()
    def advantages(self, observation: Tensor, action: Tensor) -> Tensor:
        """How much better an action is than those that are usual, (B, D), (B, A) -> (B,): Q - V of rewards, V - Q of costs."""
        self._check_sizes(observation, action)
        return self._gain(self._valued(observation, action), self._value(observation))

    @torch.no_grad()
    def weights(self, observation: Tensor, action: Tensor) -> Tensor:
        """Weights of examples to imitate, (B, D), (B, A) -> (B,) in [0, clip]: exp(beta * advantage); of costs 0 where it is not positive.

        (arXiv 2110.06169, eq. 7; for costs arXiv 2502.05932.)
        """
        advantages = self.advantages(observation, action)
        weights = (self.beta * advantages).exp().clamp(max=self.clip)
        return weights if self.objective == "reward" else weights * (advantages > 0)

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Observations (B, D)."""
        return batch["observation"]

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Advantages of the actions of a batch, (B,)."""
        return self.advantages(batch["observation"], batch["action"][:, 0])

    @torch.no_grad()
    def _follow(self) -> None:
        online, target = list(self.net["q"].parameters()), list(self.target.parameters())
        if len(online) != len(target):
            raise ValueError("a critic is trained as a whole, and there is a skill on this one: train another, with model=critic and without base")
        for new, old in zip(online, target, strict=True):
            old.lerp_(new, self.tau)

    def _value(self, observation: Tensor) -> Tensor:
        value: Tensor = self.net["v"](observation)
        return value.squeeze(-1)

    @torch.no_grad()
    def _valued(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of the copy, the worse of the two, (B,): the lesser reward, the greater cost."""
        both: Tensor = self.target(observation, action)
        return both.amin(0) if self.objective == "reward" else both.amax(0)

    def _gain(self, q: Tensor, value: Tensor) -> Tensor:
        return q - value if self.objective == "reward" else value - q

    def _check_keys(self, batch: Batch) -> None:
        wanted = {"observation", "action", "next_observation", "mask", "reward" if self.objective == "reward" else "cost"}
        if missing := sorted(wanted - set(batch)):
            way_out = "train it on a task of transitions (task=offline)" + (", of demonstrations with costs" if "cost" in missing else "")
            raise ValueError(f"a critic of objective {self.objective!r} learns from {sorted(wanted)}, these batches have no {missing}: {way_out}")
        if "weight" in batch:
            raise ValueError("a critic learns from all transitions alike, these are weighted: leave out critic=...")

    def _check_sizes(self, observation: Tensor, action: Tensor) -> None:
        theirs, mine = (observation.shape[-1], action.shape[-1]), (self.observation_dim, self.action_dim)
        if theirs != mine:
            raise ValueError(f"this critic is of (observation, action) sizes {mine}, got {theirs}: train one on this task")


class BestOf(nn.Module):
    """The best of several actions of a policy, by a critic (arXiv 2304.10573): a `Model`, for a task to evaluate.

    Args:
        model: a policy whose `predict` takes `samples`.
        critic: of the same task; a chunk of actions is judged by its first.
        samples: N.

    Raises:
        ValueError: fewer than one sample.

    """

    def __init__(self, model: nn.Module, critic: Critic, samples: int) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"the best of at least 1 action can be taken, got samples={samples}")
        self.model, self.critic, self.samples = cast("ModelModule", model), critic, samples

    @property
    def net(self) -> nn.Module:
        """Net of the policy."""
        return self.model.net

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the policy."""
        loss: Tensor = self.model(batch)
        return loss

    def context(self, batch: Batch) -> Tensor:
        """Context of the policy."""
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Actions (B, H, A): of N that the policy draws for an observation, the one with the greatest advantage."""
        actions: Tensor = self.model.predict(batch, samples=self.samples)  # type: ignore[call-arg]
        observation = batch["observation"].repeat_interleave(self.samples, 0)
        advantages = self.critic.advantages(observation, actions[:, :, 0].flatten(0, 1)).view(-1, self.samples)
        return actions[torch.arange(len(actions), device=actions.device), advantages.argmax(1)]


def _mlp(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them and one output."""
    sizes, layers = [inputs, *hidden, 1], list[nn.Module]()
    for i, (before, after) in enumerate(pairwise(sizes)):
        layer = nn.Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer] if i == len(hidden) else [layer, nn.ReLU()]
    return nn.Sequential(*layers)
