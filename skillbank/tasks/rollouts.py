"""Seeded rollouts of a policy in many environments at once.

Shapes: E episodes, D features of an observation, H actions predicted at once, A features of an action, T steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from skillbank.model import Model, evaluating
from skillbank.tasks.environments import Environment, make_environment

if TYPE_CHECKING:
    from gymnasium.spaces import Box

__all__ = ["Recording", "Rollout", "rollout"]


@dataclass(frozen=True, eq=False)
class Recording:
    """One episode of a rollout, step by step.

    Args:
        frames: (ceil(T / every), height, width, 3) uint8, the frames of steps 0, every, 2 * every, ...
        observations: (T, D), what the policy saw before every step.
        actions: (T, A), as executed.
        rewards: (T,).
        every: steps per frame.

    """

    frames: NDArray[np.uint8]
    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    every: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """What a policy reached in E episodes.

    Args:
        returns: undiscounted return of every episode, (E,).
        lengths: steps of every episode, (E,).
        seeds: seed of every episode, (E,).
        policy_seconds: mean time in `predict`, per environment step.
        environment_seconds: mean time in the simulation, per environment step.
        recording: the recorded episode, if one was asked for.
        costs: undiscounted cost of every episode, (E,), the sum of what the environment's info has as `cost`; None where it has none.

    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    seeds: NDArray[np.int64]
    policy_seconds: float
    environment_seconds: float
    recording: Recording | None = None
    costs: NDArray[np.float64] | None = None


def rollout(
    model: Model,
    environment: str,
    seeds: Sequence[int],
    *,
    execute: int | None = None,
    max_steps: int | None = None,
    record: int | None = None,
    frame_every: int = 10,
    size: tuple[int, int] = (240, 320),
) -> Rollout:
    """Run one episode per seed, all at once, with one batched `predict` per decision.

    Row i of every batch is episode i to the end: the batch keeps its size when episodes end early (their last observation is repeated and the
    answer dropped), so that compiled policies see one shape and an episode's noise does not depend on when others end. Episodes are stepped in a
    plain loop: a gymnasium vector environment would step finished episodes on, or reset them. The model is in eval mode meanwhile, and torch's
    random numbers are seeded from `seeds` and restored after.

    Args:
        model: its `predict` gets `{"observation": (E, D) float32}` on its own device and returns (E, H, A); actions are clipped to [-1, 1].
        environment: see `make_environment`.
        seeds: one environment seed per episode.
        execute: actions of every prediction that are executed before the next one, at most H; None executes all H.
        max_steps: stop episodes here; None waits for their end.
        record: position in `seeds` of the episode to record.
        frame_every: steps per recorded frame; 0 records no frames.
        size: height and width of a frame.

    Raises:
        ValueError: an unknown environment, sizes that do not fit, or actions that are not finite.

    """
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seeds must be one or more integers in [0, 2**32), got {list(seeds)[:8]}")
    if record is not None and not 0 <= record < len(seeds):
        raise ValueError(f"record={record} is no position in {len(seeds)} seeds")
    with ExitStack() as stack:
        recorder = None if record is None else _Recorder(record, frame_every, size)
        episodes = stack.enter_context(_Episodes(environment, seeds, max_steps, recorder))
        episodes.check(model)
        device = stack.enter_context(_evaluating(cast("nn.Module", model), seeds))
        policy_seconds = 0.0
        while episodes.running.any():
            started = perf_counter()
            chunk = episodes.decide(model, device, execute)
            policy_seconds += perf_counter() - started
            for actions in chunk:
                episodes.step(actions)
        return episodes.result(policy_seconds)


class _Recorder:
    def __init__(self, episode: int, every: int, size: tuple[int, int]) -> None:
        self.episode, self.every, self.size = episode, every, size
        self.frames: list[NDArray[np.uint8]] = []
        self.steps: list[tuple[NDArray[np.float32], NDArray[np.float32], float]] = []

    def look(self, env: Environment) -> None:
        if self.every and len(self.steps) % self.every == 0:
            self.frames.append(cast("NDArray[np.uint8]", env.render()))

    def result(self) -> Recording:
        observations, actions, rewards = zip(*self.steps, strict=True)
        frames = np.stack(self.frames) if self.frames else np.zeros((0, *self.size, 3), np.uint8)
        return Recording(frames, np.stack(observations), np.stack(actions), np.array(rewards, np.float64), self.every)


class _Episodes:
    """The running episodes of a rollout."""

    def __init__(self, environment: str, seeds: Sequence[int], max_steps: int | None, recorder: _Recorder | None) -> None:
        self.name, self.seeds, self.recorder = environment, seeds, recorder
        modes = ["rgb_array" if recorder and recorder.every and i == recorder.episode else None for i in range(len(seeds))]
        self.envs: list[Environment] = []
        for mode in modes:
            self.envs.append(make_environment(environment, render_mode=mode, size=recorder.size if recorder else (240, 320)))
        spec = self.envs[0].spec
        if max_steps is None and spec is not None and spec.max_episode_steps is None:
            raise ValueError(f"environment {environment!r} has no time limit: give max_steps")
        self.limit = np.inf if max_steps is None else max_steps
        self.observations = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds, strict=True)]).astype(np.float32)
        self.actions = cast("Box", self.envs[0].action_space).shape[0]
        self.returns = np.zeros(len(seeds))
        self.costs: NDArray[np.float64] | None = None
        self.lengths = np.zeros(len(seeds), np.int64)
        self.running = np.full(len(seeds), self.limit > 0)
        self.seconds = 0.0

    def __enter__(self) -> _Episodes:
        return self

    def __exit__(self, *_: object) -> None:
        for env in self.envs:
            env.close()

    def check(self, model: Model) -> None:
        sizes = {"observation_dim": self.observations.shape[1], "action_dim": self.actions}
        for name, size in sizes.items():
            theirs = getattr(model, name, size)
            if theirs != size:
                raise ValueError(f"environment {self.name!r} has {name}={size}, the model has {name}={theirs}: use a model of this environment")

    def decide(self, model: Model, device: torch.device, execute: int | None) -> NDArray[np.float32]:
        """Actions of the next steps, (steps, E, A) in [-1, 1]."""
        with torch.inference_mode():
            predicted = model.predict({"observation": torch.from_numpy(self.observations.copy()).to(device)})
        chunk: NDArray[np.float32] = predicted.float().cpu().numpy()
        episodes = len(self.seeds)
        if chunk.ndim != 3 or chunk.shape[0] != episodes or chunk.shape[2] != self.actions:
            raise ValueError(f"the model must predict actions ({episodes}, H, {self.actions}) for {self.name!r}, got {chunk.shape}")
        if execute is not None and not 1 <= execute <= chunk.shape[1]:
            raise ValueError(f"execute={execute} must be between 1 and the H={chunk.shape[1]} actions that the model predicts for {self.name!r}")
        bad = ~np.isfinite(chunk).all(axis=(1, 2)) & self.running
        if bad.any():
            step = int(self.lengths[self.running].max())
            raise ValueError(f"the model predicts NaN or infinite actions for {self.name!r} at step {step}, in {bad.sum()} of {episodes} rows")
        return np.clip(chunk, -1, 1).swapaxes(0, 1)[:execute]

    def step(self, actions: NDArray[np.float32]) -> None:
        """One step of every running episode."""
        for i in np.flatnonzero(self.running):
            env, seen = self.envs[i], self.observations[i].copy()
            recorder = self.recorder if self.recorder and self.recorder.episode == i else None
            if recorder:
                recorder.look(env)
            started = perf_counter()
            observation, reward, terminated, truncated, info = env.step(actions[i])
            self.seconds += perf_counter() - started
            self.observations[i] = observation
            self.returns[i] += float(reward)
            if "cost" in info:
                self.costs = np.zeros(len(self.seeds)) if self.costs is None else self.costs
                self.costs[i] += float(info["cost"])
            self.lengths[i] += 1
            self.running[i] = not (terminated or truncated or self.lengths[i] >= self.limit)
            if recorder:
                recorder.steps.append((seen, actions[i].copy(), float(reward)))

    def result(self, policy_seconds: float) -> Rollout:
        steps = max(int(self.lengths.sum()), 1)
        recording = self.recorder.result() if self.recorder else None
        seeds = np.array(self.seeds, np.int64)
        return Rollout(self.returns, self.lengths, seeds, policy_seconds / steps, self.seconds / steps, recording, self.costs)


@contextmanager
def _evaluating(model: nn.Module, seeds: Sequence[int]) -> Iterator[torch.device]:
    """Put the model in eval mode and seed torch; both are as before afterwards."""
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    seed = int(np.random.SeedSequence([int(each) for each in seeds]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        with evaluating(model):
            yield device
