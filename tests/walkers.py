"""Things to roll out: the suite's walker by itself, a policy, and an environment that is easy to follow."""

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

WALK = "dm_control/walker-walk"


class Policy(nn.Module):
    """Elementwise, so that a row's answer does not depend on the batch, not even in its last bit."""

    def __init__(self, features=24, actions=6, horizon=1, noise=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-2, 2, horizon * actions).view(horizon, actions))
        self.actions, self.horizon, self.noise, self.calls = actions, horizon, noise, []

    def forward(self, batch):
        return self.gain.sum()

    def context(self, batch):
        return batch["observation"]

    def predict(self, batch):
        observation = batch["observation"]
        self.calls.append((tuple(observation.shape), self.training, torch.is_inference_mode_enabled()))
        action = torch.tanh(observation[:, : self.actions].repeat(1, 1 + self.actions // observation.shape[1])[:, None, : self.actions] * self.gain)
        return action + self.noise * torch.randn_like(action)


class Short(gymnasium.Env):
    """Ends after as many steps as its seed says; the reward is the step's number, the observation (seed, step)."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(np.float32([-2, 0]), np.float32([2, 1]), dtype=np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.log = render_mode, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.end, self.now = seed, 0
        return np.array([seed, 0.0]), {}

    def step(self, action):
        assert self.now < self.end, "stepped after its end"
        self.now += 1
        type(self).seen.append(np.array(action))
        return np.array([self.end, self.now]), self.now, self.now == self.end, False, {}


def suite_episode(task, seed, actions):
    from dm_control import suite

    env = suite.load("walker", task, task_kwargs={"random": seed})
    steps = [env.reset(), *(env.step(action) for action in actions)]
    names = ("orientations", "height", "velocity")
    observations = np.stack([np.concatenate([np.ravel(step.observation[name]) for name in names]) for step in steps])
    return observations.astype(np.float32), np.array([step.reward for step in steps[1:]])
