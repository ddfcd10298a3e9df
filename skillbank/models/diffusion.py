"""A diffusion policy: a conditional noise predictor, three noise schedules and the DDPM sampler.

Shapes: B batch, D observation features, H action horizon, A action dimensions, E time features, T denoise steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skillbank.model import Batch

__all__ = ["Denoiser", "DiffusionPolicy", "Schedule", "betas"]

Schedule = Literal["vp", "cosine", "linear"]


def betas(schedule: Schedule, steps: int) -> Tensor:
    """Noise variances beta_1..beta_T, (T,) float64 in (0, 1).

    `vp`: the discretised variance-preserving SDE with beta in [0.1, 10] (arXiv 2011.13456, eq. 32 and appendix E; the form of arXiv 2304.10573).
    `cosine`: arXiv 2102.09672, eq. 17, s = 0.008, clipped at 0.999. `linear`: arXiv 2006.11239, 1e-4 to 2e-2; it needs about 1000 steps to
    reach noise, at 5 steps it is there for completeness.

    Raises:
        ValueError: an unknown schedule, or fewer than one step.

    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if schedule == "vp":
        low, high = 0.1, 10.0
        return 1 - torch.exp(-low / steps - 0.5 * (high - low) * (2 * t - 1) / steps**2)
    if schedule == "cosine":
        u = torch.cat([torch.zeros(1, dtype=torch.float64), t]) / steps
        remaining = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - remaining[1:] / remaining[:-1]).clamp(0, 0.999)
    if schedule == "linear":
        return torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64)
    raise ValueError(f"unknown schedule {schedule!r}: choose vp, cosine or linear")


class FourierFeatures(nn.Module):
    """cos and sin of learned frequencies of the raw integer step, (B, 1) -> (B, E) (arXiv 2006.10739; frequencies start at N(0, 0.2^2))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(features // 2, 1))

    def forward(self, t: Tensor) -> Tensor:
        """Features of the steps t (B, 1)."""
        angle = 2 * math.pi * t @ self.frequencies.mT
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class _MishFunction(torch.autograd.Function):
    """x tanh(softplus(x)) with one exponential, its slope made on the way; torch's own takes twice as long on a CPU.

    With e = exp(x) and n = e^2 + 2 e: tanh(log(1 + e)) = n / (n + 2), and the slope is that plus 4 x e (1 + e) / (n + 2)^2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp().clamp_(max=5e8)  # so that n is finite; to clamp x instead takes three times as long once it is compiled
        n = e.add(2).mul_(e)
        more = n + 2
        tanh = n / more
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.addcmul(tanh, n.sub_(e).div_(more).div_(more), x, value=4))
        return x * tanh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope


class Mish(nn.Module):
    """x tanh(softplus(x)), elementwise (arXiv 1908.08681); at least in single precision, whatever x is."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if x.is_cuda:
            return nn.functional.mish(x)
        result: Tensor = _MishFunction.apply(x.to(torch.promote_types(x.dtype, torch.float32)))  # type: ignore[no-untyped-call]
        return result.to(x.dtype)


class ResidualBlock(nn.Module):
    """x + Linear(act(Linear(LayerNorm(Dropout(x))))), four times wider inside (arXiv 2304.10573, LN-ResNet)."""

    def __init__(self, width: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = _lecun(nn.Linear(width, 4 * width))
        self.activation = activation
        self.reduce = _lecun(nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        return x + self.reduce(self.activation(self.expand(self.norm(self.dropout(x)))))


class Denoiser(nn.Module):
    """Noise predictor eps(a_t, s, t): an LN-ResNet over [noisy action, observation, time features] (arXiv 2304.10573, section 4.2).

    Args:
        observation_dim: D.
        action_dim: size of the flattened action chunk, H * A.
        width: trunk width; blocks are four times wider inside.
        blocks: number of residual blocks.
        dropout: on the input of every block, in training only.
        time_dim: number of Fourier features of the step.
        time_hidden: widths of the two layers that process them.
        activation: name of a module in `torch.nn`; the same in base, skill and gate training.

    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        width: int = 256,
        blocks: int = 3,
        dropout: float = 0.1,
        time_dim: int = 64,
        time_hidden: Sequence[int] = (128, 128),
        activation: str = "Mish",
    ) -> None:
        super().__init__()
        act = Mish if activation == "Mish" else getattr(nn, activation)
        first, last = time_hidden
        self.time = nn.Sequential(FourierFeatures(time_dim), _xavier(nn.Linear(time_dim, first)), act(), _xavier(nn.Linear(first, last)))
        self.enter = _xavier(nn.Linear(action_dim + observation_dim + last, width))
        self.blocks = nn.Sequential(*(ResidualBlock(width, dropout, act()) for _ in range(blocks)))
        self.leave = nn.Sequential(act(), _xavier(nn.Linear(width, action_dim)))

    def forward(self, noisy: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """Predicted noise (B, H * A) for noisy actions (B, H * A), observations (B, D) and integer steps t (B,) in 0..T-1."""
        return self.at(noisy, observation, self.embed(t, noisy.dtype))

    def embed(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Processed features (..., E) of integer steps (...)."""
        return self.time(t[..., None].to(dtype))

    def at(self, noisy: Tensor, observation: Tensor, time: Tensor) -> Tensor:
        """As `forward`, with the steps embedded already: (B, E)."""
        return self.leave(self.blocks(self.enter(torch.cat([noisy, observation, time], dim=-1))))


class DiffusionPolicy(nn.Module):
    """A policy that denoises actions: DDPM (arXiv 2006.11239) over action chunks, conditioned on the observation.

    A `Model`: batches hold `observation` (B, D), `action` (B, H, A) in [-1, 1] for training and, optionally, `weight` (B,), the weight of each
    example in the loss. Observations come in the units of the environment: nothing normalises them.

    Args:
        observation_dim: D.
        action_dim: A.
        horizon: H, actions predicted at once.
        steps: T, denoise steps.
        schedule: `vp`, `cosine` or `linear`.
        temperature: scale of the noise that the sampler adds between steps, as in the official code. It starts from N(0, I), but at temperature
            0 from the mean, 0, so that the policy is deterministic.
        net: further arguments of `Denoiser`.

    """

    beta: Tensor
    kept: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        horizon: int = 1,
        steps: int = 5,
        schedule: Schedule = "vp",
        temperature: float = 1.0,
        **net: object,
    ) -> None:
        super().__init__()
        self.observation_dim, self.action_dim, self.horizon, self.steps = observation_dim, action_dim, horizon, steps
        self.temperature = temperature
        self.net = Denoiser(observation_dim, horizon * action_dim, **net)  # type: ignore[arg-type]
        beta = betas(schedule, steps)
        self.register_buffer("beta", beta.float(), persistent=False)
        self.register_buffer("kept", (1 - beta).cumprod(0).float(), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Noise-prediction loss, (): the mean of `losses`."""
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every example, (B,): its weight times the squared error summed over H * A, with fresh steps and fresh noise every call."""
        observation, action = batch["observation"], batch["action"]
        self._check(observation, action)
        action = action.flatten(1)
        t = torch.randint(self.steps, (len(action),), device=action.device)
        noise = torch.randn_like(action)
        error = (self.net(self.noised(action, noise, t), observation, t) - noise).square().sum(-1)
        return error * batch["weight"] if "weight" in batch else error

    def noised(self, action: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`sqrt(kept_t) action + sqrt(1 - kept_t) noise`, (B, H * A), for integer steps t (B,)."""
        kept = self.kept[t, None]
        return kept.sqrt() * action + (1 - kept).sqrt() * noise

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Observations (B, D)."""
        return batch["observation"]

    @torch.no_grad()
    def predict(self, batch: Batch, samples: int | None = None) -> Tensor:
        """Actions in [-1, 1], (B, H, A), or `samples` N for every observation, (B, N, H, A)."""
        self._check(batch["observation"])
        actions = self.sample(batch["observation"], samples=samples or 1)
        return actions if samples is None else actions.view(-1, samples, *actions.shape[1:])

    def sample(self, observation: Tensor, temperature: float | None = None, samples: int = 1) -> Tensor:
        """Denoise from noise to actions, (B, D) -> (B * N, H, A) in [-1, 1], with gradient; the samples of an observation stand together.

        The variance is beta_t and every intermediate is clipped to [-1, 1] after its noise (arXiv 2304.10573); both are part of the method.
        """
        heat = self.temperature if temperature is None else temperature
        steps = torch.arange(self.steps, device=observation.device).expand(len(observation), -1)
        times = self.net.embed(steps, observation.dtype)  # (B, T, E), all at once: they depend on nothing that is sampled
        rows = observation.repeat_interleave(samples, 0)
        return self.denoise(lambda x, t: self.net.at(x, rows, times[:, t].repeat_interleave(samples, 0)), len(rows), observation, heat)

    def denoise(self, predict_noise: Callable[[Tensor, int], Tensor], rows: int, like: Tensor, temperature: float) -> Tensor:
        """Run the sampler with any noise predictor `(x (B, H * A), t) -> noise`, t an integer in 0..T-1."""
        start = like.new_empty(rows, self.horizon * self.action_dim)
        x = start.normal_() if temperature else start.zero_()
        for step in reversed(range(self.steps)):
            beta, kept = self.beta[step], self.kept[step]
            x = (x - beta / (1 - kept).sqrt() * predict_noise(x, step)) / (1 - beta).sqrt()
            if step and temperature:
                x = x + temperature * beta.sqrt() * torch.randn_like(x)
            x = x.clamp(-1, 1)
        return x.view(rows, self.horizon, self.action_dim)

    def _check(self, observation: Tensor, action: Tensor | None = None) -> None:
        if observation.shape[1:] != (self.observation_dim,):
            raise ValueError(f"this policy reads observations (B, {self.observation_dim}), got {tuple(observation.shape)}")
        if action is not None and action.shape[1:] != (self.horizon, self.action_dim):
            raise ValueError(f"this policy trains on actions (B, {self.horizon}, {self.action_dim}), got {tuple(action.shape)}")


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _lecun(layer: nn.Linear) -> nn.Linear:
    """Truncated normal with variance 1 / fan_in after truncation at two standard deviations (the constant is its standard deviation there)."""
    scale = 1 / math.sqrt(layer.in_features) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=scale, a=-2 * scale, b=2 * scale)
    nn.init.zeros_(layer.bias)
    return layer
