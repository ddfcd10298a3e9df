"""The diffusion policy, its skills under a gate, and its training in JAX: written from the same formulas, on the same numbers, for the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import skillbank as sb
from skillbank.gate import MLPGate
from skillbank.models.diffusion import DiffusionPolicy

__all__ = ["Twin"]

Numbers = Mapping[str, Any]


def mish(x: jax.Array) -> jax.Array:
    """As ours: one exponential."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * n / (n + 2)


class Twin:
    """A policy and K skills as jitted functions of their numbers.

    Args:
        policy: what it is the twin of; three blocks, no dropout.
        skills: K, of one rank.

    """

    def __init__(self, policy: DiffusionPolicy, skills: Sequence[sb.Skill]) -> None:
        self.policy = policy
        self.base = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in policy.net.state_dict().items()}
        self.names = list(skills[0])
        self.a = {name: jnp.asarray(np.stack([skill[name][0].numpy() for skill in skills])) for name in self.names}  # (K, R, I)
        self.b = {name: jnp.asarray(np.stack([skill[name][1].numpy() for skill in skills])) for name in self.names}  # (K, O, R)
        self.beta, self.kept = np.asarray(policy.beta), np.asarray(policy.kept)
        self.act: Callable[..., jax.Array] = jax.jit(self._act, static_argnames="samples")
        self.step: Callable[..., Any] = jax.jit(self._step)

    def linear(self, base: Numbers, name: str, x: jax.Array, a: Numbers, b: Numbers, weights: jax.Array) -> jax.Array:
        """`W x + b + sum_k w_k B_k A_k x`, the factors side by side: two products, whatever K is; weights (N, K)."""
        down = a[name].reshape(-1, a[name].shape[-1])
        up = b[name].transpose(0, 2, 1).reshape(len(down), -1)
        channels = jnp.repeat(weights, a[name].shape[1], axis=-1)
        return x @ base[f"{name}.weight"].T + base[f"{name}.bias"] + ((x @ down.T) * channels) @ up

    def embed(self, base: Numbers, t: jax.Array, a: Numbers, b: Numbers, weights: jax.Array) -> jax.Array:
        """Time features (N, E) of steps (N,)."""
        angle = 2 * jnp.pi * t[:, None] @ base["time.0.frequencies"].T
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        return self.linear(base, "time.3", mish(self.linear(base, "time.1", x, a, b, weights)), a, b, weights)

    def noise(self, base: Numbers, x: jax.Array, s: jax.Array, time: jax.Array, a: Numbers, b: Numbers, weights: jax.Array) -> jax.Array:
        """Predicted noise (N, H A)."""
        x = self.linear(base, "enter", jnp.concatenate([x, s, time], -1), a, b, weights)
        for i in range(len(self.policy.net.blocks)):
            centred = x - x.mean(-1, keepdims=True)
            y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            y = y * base[f"blocks.{i}.norm.weight"] + base[f"blocks.{i}.norm.bias"]
            y = mish(self.linear(base, f"blocks.{i}.expand", y, a, b, weights))
            x = x + self.linear(base, f"blocks.{i}.reduce", y, a, b, weights)
        return self.linear(base, "leave.1", mish(x), a, b, weights)

    def gate(self, gate: MLPGate) -> dict[str, jax.Array]:
        """Numbers of a gate."""
        return {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in gate.state_dict().items()}

    def _act(self, base: Numbers, a: Numbers, b: Numbers, gate: Numbers, observation: jax.Array, key: jax.Array, samples: int) -> jax.Array:
        """Gate once per observation, then T denoise steps of N samples each, (B N, H A)."""
        x = (observation - gate["mean"]) / gate["deviation"]
        layers = sorted({name.rsplit(".", 1)[0] for name in gate if name.startswith("body")}, key=lambda name: int(name.split(".")[1]))
        for layer in layers:
            x = jax.nn.relu(x @ gate[f"{layer}.weight"].T + gate[f"{layer}.bias"])
        few = x @ gate["head.weight"].T + gate["head.bias"]
        times = [self.embed(base, jnp.full(len(few), float(t)), a, b, few) for t in range(self.policy.steps)]
        weights, rows = jnp.repeat(few, samples, 0), jnp.repeat(observation, samples, 0)
        size = self.policy.horizon * self.policy.action_dim
        key, own = jax.random.split(key)
        x = jax.random.normal(own, (len(rows), size)) * float(self.policy.temperature > 0)
        for t in reversed(range(self.policy.steps)):
            beta, kept = self.beta[t], self.kept[t]
            predicted = self.noise(base, x, rows, jnp.repeat(times[t], samples, 0), a, b, weights)
            x = (x - beta / np.sqrt(1 - kept) * predicted) / np.sqrt(1 - beta)
            if t and self.policy.temperature:
                key, own = jax.random.split(key)
                x = x + self.policy.temperature * np.sqrt(beta) * jax.random.normal(own, x.shape)
            x = jnp.clip(x, -1, 1)
        return x

    def state(self, scale: float) -> dict[str, Any]:
        """What training starts from: factors of the first skill, moments, EMA, step."""
        trained = {"a": {name: self.a[name][0] for name in self.names}, "b": {name: self.b[name][0] for name in self.names}}
        zeros = jax.tree.map(jnp.zeros_like, trained)
        return {"p": trained, "m": zeros, "v": zeros, "ema": trained, "step": jnp.zeros(()), "scale": jnp.asarray(scale)}

    def _step(self, base: Numbers, state: Any, observation: jax.Array, action: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        """AdamW and EMA on the noise-prediction loss of one skill."""

        def loss(trained: Any) -> jax.Array:
            one, two = jax.random.split(key)
            t = jax.random.randint(one, (len(action),), 0, self.policy.steps)
            noise = jax.random.normal(two, action.shape)
            kept = jnp.asarray(self.kept)[t][:, None]
            a, b = ({name: trained[side][name][None] for name in self.names} for side in ("a", "b"))
            weights = jnp.full((len(action), 1), state["scale"])
            time = self.embed(base, t.astype(jnp.float32), a, b, weights)
            predicted = self.noise(base, jnp.sqrt(kept) * action + jnp.sqrt(1 - kept) * noise, observation, time, a, b, weights)
            return ((predicted - noise) ** 2).sum(-1).mean()

        value, gradient = jax.value_and_grad(loss)(state["p"])
        step = state["step"] + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["v"], gradient)
        lr, decay = 1e-3, 1e-4
        move = lambda p, m, v: p * (1 - lr * decay) - lr * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8)  # noqa: E731
        p = jax.tree.map(move, state["p"], m, v)
        ema = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, state["ema"], p)
        return {**state, "p": p, "m": m, "v": v, "ema": ema, "step": step}, value


def check(twin: Twin, composed: sb.Composed, observation: torch.Tensor) -> float:
    """Largest difference of the actions at temperature 0."""
    gate = composed.gate
    assert isinstance(gate, MLPGate)
    assert isinstance(composed.model, nn.Module)
    ours = composed.predict({"observation": observation}).flatten(1)
    theirs = twin.act(twin.base, twin.a, twin.b, twin.gate(gate), jnp.asarray(observation.numpy()), jax.random.PRNGKey(0), samples=1)
    return float(np.abs(np.asarray(theirs) - ours.numpy()).max())
