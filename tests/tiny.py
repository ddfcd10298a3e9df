"""Tiny things to test on, and the tolerance of the laws, stated here once."""

import torch
from torch import nn

from skillbank import Skill
from skillbank.models.diffusion import DiffusionPolicy

RELATIVE = 2e-5
"""Outputs and deltas in float32, relative to the largest entry: the order of summation on the rank axis differs."""


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE) -> None:
    """Compare whole tensors at a tolerance relative to the largest expected entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * max(float(expected.detach().abs().max()), 1e-6))


def random_skill(net: nn.Module, rank: int = 4, modules=None, dtype=torch.float32, size: float = 0.1, seed: int = 0) -> Skill:
    """Non-trivial skill on the linear layers of a net."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and (modules is None or name in modules):
            a = torch.randn(rank, layer.in_features, generator=generator, dtype=torch.float64) * size
            b = torch.randn(layer.out_features, rank, generator=generator, dtype=torch.float64) * size
            factors[name] = (a.to(dtype), b.to(dtype))
    return Skill(factors)


def tiny_policy(**options) -> DiffusionPolicy:
    """Two blocks of width 16, everything else as in the real one."""
    torch.manual_seed(7)
    return DiffusionPolicy(5, 3, width=16, blocks=2, time_dim=8, time_hidden=(8, 8), **options).eval()


def tiny_batch(rows: int = 6, horizon: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"observation": torch.randn(rows, 5, generator=generator), "action": torch.rand(rows, horizon, 3, generator=generator) * 2 - 1}


def net_inputs(rows: int = 6, horizon: int = 1):
    batch = tiny_batch(rows, horizon)
    return batch["action"].flatten(1), batch["observation"], torch.arange(rows) % 5
