"""Composition at the levels of noise and of actions, the paper's NSEC and ASEC (arXiv 2502.05932, section 5; details from its code).

Beside them that of parameters with the loss of the others. Shapes: B batch, D observation, H horizon, A action, M members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skillbank.gate import Init, MLPGate
from skillbank.mixture import Composed
from skillbank.model import Batch
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.skill import Skill

__all__ = ["ActionLevel", "NoiseLevel", "ParameterLevel"]


class _Level(nn.Module):
    """Base and K skills on one stack; a gate weights the M policies that they are: the base alone, then every skill alone. A `Model`.

    Args:
        policy: the base, changed in place.
        skills: K of them.
        per_dimension: a weight for every dimension of the action, where the level has actions or noise to weight.
        base: whether the base alone is among what is weighted.
        init: of the gate, see `MLPGate`: `newest` says 1 for the newest member, `official` the raw output of a random head.

    """

    members: Tensor

    def __init__(
        self, policy: DiffusionPolicy, skills: Sequence[Skill], *, per_dimension: bool = False, base: bool = True, init: Init = "newest"
    ) -> None:
        super().__init__()
        self.policy, self.dimensions = policy, policy.action_dim if per_dimension else 1
        # row i of `members` are the stack's weights that make it policy i
        self.register_buffer("members", torch.cat([torch.zeros(int(base), len(skills)), torch.eye(len(skills))]), persistent=False)
        self.gate: nn.Module = self.fresh_gate(len(self.members), init)
        self.composed = Composed(policy, nn.Identity(), skills)

    def fresh_gate(self, members: int, init: Init = "newest") -> MLPGate:
        """A gate of a weight per member and dimension."""
        gate = MLPGate(self.policy.observation_dim, members * self.dimensions, init=init, scale=1.0)
        if init == "newest":
            with torch.no_grad():
                gate.head.bias[-self.dimensions :] = 1.0
        return gate

    @property
    def net(self) -> nn.Module:
        """Net of the base."""
        return self.policy.net

    def train(self, mode: bool = True) -> _Level:
        """Switch the gate only, as `Composed` does: base and skills are without dropout."""
        self.gate.train(mode)
        self.training = mode
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Squared error of the sampled action, (): the official loss of the levels of noise and of actions."""
        return (self.act(batch["observation"]) - batch["action"]).square().flatten(1).sum(-1).mean()

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Observations (B, D)."""
        return batch["observation"]

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Actions (B, H, A)."""
        return self.act(batch["observation"])

    def weights(self, observation: Tensor) -> Tensor:
        """Of the members, (B, M, A), or (B, M, 1) where all dimensions have the same."""
        weights: Tensor = self.gate(observation)
        return weights.unflatten(-1, (-1, self.dimensions))

    def become(self, member: int, rows: int) -> None:
        """Make the stack policy `member` for batches of `rows`."""
        self.composed.mixture.cell.mix(self.members[member].expand(rows, -1))

    def act(self, observation: Tensor) -> Tensor:
        raise NotImplementedError


class NoiseLevel(_Level):
    """NSEC: `eps = sum_i w_i(s) eps_i(a_t, s, t)`; in the official loss the gradient goes through all denoise steps.

    Args:
        policy: see `_Level`, as all others.
        skills: K of them.
        on_noise: train on the noise-prediction loss, as the level of parameters, and not on the official one.
        options: see `_Level`.

    """

    def __init__(self, policy: DiffusionPolicy, skills: Sequence[Skill], *, on_noise: bool = False, **options: Any) -> None:
        super().__init__(policy, skills, **options)
        self.on_noise = on_noise

    def forward(self, batch: Batch) -> Tensor:
        """The official loss, or that of the mixed noise, ()."""
        if not self.on_noise:
            return super().forward(batch)
        observation, action = batch["observation"], batch["action"].flatten(1)
        t, noise = torch.randint(self.policy.steps, (len(action),), device=action.device), torch.randn_like(action)
        mixed = self.noise(self.policy.noised(action, noise, t), observation, t, self.weights(observation))
        return (mixed - noise).square().sum(-1).mean()

    def act(self, observation: Tensor) -> Tensor:
        """Sample with the mixed noise, (B, D) -> (B, H, A)."""
        weights, rows = self.weights(observation), len(observation)

        def noise(x: Tensor, step: int) -> Tensor:
            return self.noise(x, observation, torch.full((rows,), step, device=x.device), weights)

        return self.policy.denoise(noise, rows, observation, self.policy.temperature)

    def noise(self, x: Tensor, observation: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """Mixed noise (B, H * A) of noisy actions (B, H * A) at steps t (B,)."""
        total = torch.zeros_like(x).view(len(x), -1, self.policy.action_dim)
        for member in range(len(self.members)):
            self.become(member, len(x))
            total = total + weights[:, member, None] * self.net(x, observation, t).view_as(total)
        return total.flatten(1)


class ActionLevel(_Level):
    """ASEC: `a = sum_i w_i(s) a_i`, every a_i sampled on its own and without gradient."""

    def act(self, observation: Tensor) -> Tensor:
        """Mix the sampled actions, (B, D) -> (B, H, A)."""
        weights = self.weights(observation)
        total = torch.zeros((), device=observation.device)
        for member in range(len(self.members)):
            self.become(member, len(observation))
            with torch.no_grad():
                action = self.policy.sample(observation)
            total = total + weights[:, member, None] * action
        return total


class ParameterLevel(_Level):
    """PSEC with the loss of the other levels: `W + sum_i w_i(s) B_i A_i` for the K skills, the gradient going through all denoise steps."""

    def __init__(self, policy: DiffusionPolicy, skills: Sequence[Skill]) -> None:
        super().__init__(policy, skills)
        self.gate = self.fresh_gate(len(skills))

    def act(self, observation: Tensor) -> Tensor:
        """Sample under the gate, (B, D) -> (B, H, A)."""
        self.composed.mixture.cell.mix(self.weights(observation)[..., 0])
        return self.policy.sample(observation)
