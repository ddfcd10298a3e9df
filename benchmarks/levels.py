"""Composition at the levels of noise and of actions, the paper's NSEC and ASEC (arXiv 2502.05932, section 5; details from its code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from skillbank.gate import MLPGate
from skillbank.mixture import Composed
from skillbank.model import Batch
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.skill import Skill

__all__ = ["ActionLevel", "NoiseLevel"]


class _Level(nn.Module):
    """Base and K skills as K + 1 policies on one stack; a gate weights what they say. A `Model`."""

    members: Tensor

    def __init__(self, policy: DiffusionPolicy, skills: Sequence[Skill]) -> None:
        super().__init__()
        self.gate = MLPGate(policy.observation_dim, len(skills) + 1)
        self.composed = Composed(policy, nn.Identity(), skills)
        self.policy = policy
        # row i of `members` are the stack's weights that make it policy i: the base alone, then every skill alone
        self.register_buffer("members", torch.cat([torch.zeros(1, len(skills)), torch.eye(len(skills))]), persistent=False)

    @property
    def net(self) -> nn.Module:
        """Net of the base."""
        return self.policy.net

    def forward(self, batch: Batch) -> Tensor:
        """Squared error of the sampled action, (): the official loss of both levels."""
        return (self.act(batch["observation"]) - batch["action"]).square().flatten(1).sum(-1).mean()

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Observations (B, D)."""
        return batch["observation"]

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Actions (B, H, A)."""
        return self.act(batch["observation"])

    def become(self, member: int, rows: int) -> None:
        """Make the stack policy `member` for batches of `rows`."""
        self.composed.mixture.cell.mix(self.members[member].expand(rows, -1))

    def act(self, observation: Tensor) -> Tensor:
        raise NotImplementedError


class NoiseLevel(_Level):
    """NSEC: `eps = sum_i w_i(s) eps_i(a_t, s, t)`, the gradient going through all denoise steps."""

    def act(self, observation: Tensor) -> Tensor:
        """Sample with the mixed noise, (B, D) -> (B, H, A)."""
        weights, rows = self.gate(observation), len(observation)

        def noise(x: Tensor, step: int) -> Tensor:
            total, t = torch.zeros_like(x), torch.full((rows,), step, device=x.device)
            for member in range(len(self.members)):
                self.become(member, rows)
                total = total + weights[:, member, None] * self.net(x, observation, t)
            return total

        return self.policy.denoise(noise, rows, observation, self.policy.temperature)


class ActionLevel(_Level):
    """ASEC: `a = sum_i w_i(s) a_i`, every a_i sampled on its own and without gradient."""

    def act(self, observation: Tensor) -> Tensor:
        """Mix the sampled actions, (B, D) -> (B, H, A)."""
        weights = self.gate(observation)
        total = torch.zeros((), device=observation.device)
        for member in range(len(self.members)):
            self.become(member, len(observation))
            with torch.no_grad():
                action = self.policy.sample(observation)
            total = total + weights[:, member, None, None] * action
        return total
