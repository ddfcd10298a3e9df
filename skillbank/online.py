"""A gate that learns from the task's reward instead of from demonstrations: PPO, whose action is the weights of the skills.

As in SkillBlender (arXiv 2506.09366) skills are frozen and a network above them learns on the task's reward how much of each there is to be; there it
blends what they do, here their parameters.

Shapes: E environments, D context features, K skills, H actions predicted at once, A features of an action.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from torch import nn

from skillbank.gate import MLPGate
from skillbank.mixture import Composed
from skillbank.model import Task
from skillbank.tasks.control import EPISODES_PER_SEED, ControlTask
from skillbank.tasks.environments import make_environment

__all__ = ["Reinforced", "check_online", "reinforce"]

FIRST_SEED = 2**31
"""Of training environments: far from the seeds that evaluate."""

BOUND = 1e3
"""No weight is greater; PPO's actions have to have a bound."""

MINIBATCHES = 4


@dataclass(frozen=True, eq=False)
class Reinforced:
    """How a gate was trained by reward.

    Args:
        algorithm: as it is after the last step; it observes contexts in standard deviations of the gate.
        metrics: `online_steps`, taken in the environments, and, where episodes have ended, `online_return`, the mean return of the last 100 of them,
            exploration and all.

    """

    algorithm: PPO
    metrics: dict[str, float]


def reinforce(
    composed: Composed,
    task: Task,
    *,
    steps: int,
    lr: float = 3e-4,
    noise: float = 0.3,
    discount: float = 0.99,
    environments: int = 16,
    rollout: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Reinforced:
    """Train the gate of a composition, from where it is, by PPO (arXiv 1707.06347) on the reward of a task; base and skills stay as they are.

    The mean of PPO's Gaussian policy has the gate's layers, and the gate gets them back; the critic is another network of the same widths. A decision
    lasts as many steps as the task executes of a prediction. Same seed, same gate. There are no checkpoints: a run that is stopped starts again.

    Args:
        composed: its gate is an `MLPGate` that gives weights of all skills.
        task: with an environment; its demonstrations are not looked at.
        steps: of all environments together, rounded up to whole rollouts.
        lr: learning rate, constant.
        noise: standard deviation of the weights that are tried, at the start; it is learned.
        discount: of a reward one decision later.
        environments: E.
        rollout: decisions in each environment between updates.
        seed: of everything random; environments have seeds that no evaluation has.
        progress: show a bar.

    Raises:
        ValueError: as `check_online`, or numbers out of range.

    """
    gate = check_online(composed.gate, task)
    size = environments * rollout
    if steps < 1 or seed < 0 or min(lr, noise) <= 0 or not 0 <= discount <= 1 or size < 2 * MINIBATCHES or size % MINIBATCHES:
        given = f"{steps=}, {seed=}, {lr=}, {noise=}, {discount=}, {environments=}, {rollout=}"
        raise ValueError(
            f"online training takes at least 1 step, a seed of at least 0, lr and noise above 0, a discount in [0, 1], and rollouts of at least "
            f"{2 * MINIBATCHES} decisions in all environments, a multiple of {MINIBATCHES}; got {given}"
        )
    assert isinstance(task, ControlTask)
    with torch.random.fork_rng(devices=[]):
        weighted = _Weighted(composed, gate, task, environments)
        widths = [layer.out_features for layer in gate.body if isinstance(layer, nn.Linear)]
        algorithm = PPO(
            "MlpPolicy",
            VecNormalize(VecMonitor(weighted), norm_obs=False, gamma=discount),
            learning_rate=lr,
            n_steps=rollout,
            batch_size=size // MINIBATCHES,
            gamma=discount,
            policy_kwargs={"net_arch": {"pi": widths, "vf": widths}, "activation_fn": nn.ReLU, "log_std_init": float(np.log(noise))},
            seed=seed,
            device="cpu",
        )
        algorithm.set_logger(Logger(None, []))  # its own leaves a folder behind
        mean = nn.ModuleList([algorithm.policy.mlp_extractor.policy_net, algorithm.policy.action_net])
        _copy(gate, mean, 1 / gate.divisor)
        algorithm.learn(ceil(steps / (task.execute or task.horizon)), progress_bar=progress)
        _copy(mean, gate, gate.divisor)
        metrics = {"online_steps": float(sum(weighted.get_attr("taken")))}
        weighted.close()
    returns = [episode["r"] for episode in algorithm.ep_info_buffer or ()]
    return Reinforced(algorithm, metrics | ({"online_return": float(np.mean(returns))} if returns else {}))


def check_online(gate: nn.Module, task: Task) -> MLPGate:
    """The gate, if it can be trained by reward on this task.

    Raises:
        ValueError: it is no `MLPGate`, it chooses k skills, or the task has no environment of its sizes.

    """
    if not isinstance(gate, MLPGate) or gate.k is not None:
        what = type(gate).__name__ + ("" if getattr(gate, "k", None) is None else f" with k={gate.k}")
        raise ValueError(f"online training moves the weights of all skills, which {what} does not give: use gate=mlp without gate.k")
    if not isinstance(task, ControlTask):
        raise ValueError(f"task {task.name!r} is a {type(task).__name__}, which has no environment to give a reward: leave out online.steps")
    task.check_environment()
    return gate


class _Chunked(gymnasium.Wrapper[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]):
    """An environment whose action is several actions (H, A), carried out one after the other until its episode ends."""

    taken = 0

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Last observation and info, summed rewards."""
        total = 0.0
        for each in action:
            observation, reward, terminated, truncated, info = self.env.step(each)
            total, self.taken = total + float(reward), self.taken + 1
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class _Weighted(VecEnvWrapper):
    """Environments in which a policy acts: the action is the weights (E, K) of its skills, what the gate's body sees is observed, (E, D)."""

    def __init__(self, composed: Composed, gate: MLPGate, task: ControlTask, count: int) -> None:
        self.composed, self.gate, self.execute = composed, gate, task.execute
        self.device = next(composed.parameters()).device
        limit = (-BOUND, BOUND, (composed.mixture.count,))
        venv = DummyVecEnv([partial(_chunked, task)] * count)
        super().__init__(venv, Box(-np.inf, np.inf, gate.mean.shape), Box(*limit))

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seeds of the environments, which no evaluation has."""
        assert seed is not None
        return list(self.venv.seed(FIRST_SEED + EPISODES_PER_SEED * seed % FIRST_SEED))

    def reset(self) -> NDArray[np.float32]:
        """Start episodes."""
        self.observations = cast("NDArray[np.float32]", self.venv.reset())
        return self._context(self.observations)

    @torch.no_grad()
    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Act under these weights."""
        model = self.composed.model
        self.composed.mixture.cell.mix(torch.from_numpy(actions).to(self.device), getattr(model, "repeats", 1))
        chunk = model.predict(self._batch(self.observations)).float().cpu().numpy()
        self.venv.step_async(chunk.clip(-1, 1)[:, : self.execute])

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """What came of it; environments whose episode ended have begun another."""
        found, rewards, dones, infos = self.venv.step_wait()
        self.observations = cast("NDArray[np.float32]", found)
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self._context(info["terminal_observation"][None])[0]
        return self._context(self.observations), rewards, dones, infos

    def _batch(self, observations: NDArray[np.float32]) -> dict[str, torch.Tensor]:
        return {"observation": torch.from_numpy(observations.astype(np.float32)).to(self.device)}

    @torch.no_grad()
    def _context(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.gate.standardised(self.composed.context(self._batch(observations))).cpu().numpy()


def _chunked(task: ControlTask) -> _Chunked:
    made = make_environment(task.environment)
    return _Chunked(made if task.max_steps is None else gymnasium.wrappers.TimeLimit(made, task.max_steps))


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, head: float) -> None:
    """Layers of a network into another of the same shape, the last one times `head`."""
    layers = [[layer for layer in each.modules() if isinstance(layer, nn.Linear)] for each in (source, target)]
    for one, other in zip(*layers, strict=True):
        factor = head if other is layers[1][-1] else 1.0
        other.weight.copy_(factor * one.weight)
        other.bias.copy_(factor * one.bias)
