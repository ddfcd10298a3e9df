"""Environments against dm_control and gymnasium themselves, and the laws of rollouts."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from skillbank.tasks import environments
from skillbank.tasks.environments import SuiteEnvironment, environment_sizes, make_environment, rollout

WALK = "dm_control/walker-walk"
ROOT = Path(__file__).parents[1]


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


@pytest.fixture
def registered():
    Short.seen = []
    made = {"Short-v0": Short, "Wide-v0": Short, "Choice-v0": Short, "Open-v0": Short}
    wide = {"action_space": Box(-np.inf, np.inf, (2,))}, {"action_space": Discrete(3)}
    classes = [Short, type("Wide", (Short,), wide[0]), type("Choice", (Short,), wide[1]), Short]
    for (name, _), each in zip(made.items(), classes, strict=True):
        gymnasium.register(name, entry_point=each, max_episode_steps=None if name == "Open-v0" else 50, order_enforce=False)
    yield
    for name in made:
        del gymnasium.registry[name]


def suite_episode(task, seed, actions):
    from dm_control import suite

    env = suite.load("walker", task, task_kwargs={"random": seed})
    steps = [env.reset(), *(env.step(action) for action in actions)]
    names = ("orientations", "height", "velocity")
    observations = np.stack([np.concatenate([np.ravel(step.observation[name]) for name in names]) for step in steps])
    return observations.astype(np.float32), np.array([step.reward for step in steps[1:]])


@pytest.mark.parametrize("task", ["stand", "walk", "run"])
def test_the_suite_itself_gives_the_same_episode(task):
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 6)).astype(np.float32)
    env = make_environment(f"dm_control/walker-{task}")
    for seed in (5, 0, 5):
        observations, rewards = suite_episode(task, seed, actions)
        assert np.array_equal(env.reset(seed=seed)[0], observations[0])
        steps = [env.step(action) for action in actions]
        assert np.array_equal(np.stack([step[0] for step in steps]), observations[1:])
        assert [step[1] for step in steps] == rewards.tolist()
        assert env.observation_space.contains(steps[0][0])
    env.close()


@pytest.mark.parametrize(("file", "task", "seed"), [("walk", "walk", 7), ("run_deterministic", "run", 11), ("stand", "stand", 7)])
def test_shipped_demonstrations_replay(file, task, seed):
    import mujoco

    steps = 60
    with np.load(ROOT / "demos/walker" / f"{file}.npz") as arrays:
        observations, actions, rewards = (arrays[name][0, :steps] for name in ("observations", "actions", "rewards"))
    env = make_environment(f"dm_control/walker-{task}")
    env.reset(seed=seed)
    seen, earned = [env.reset()[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        seen.append(observation)
        earned.append(reward)
    env.close()
    exact = mujoco.__version__ == "3.17.0"
    np.testing.assert_allclose(np.stack(seen[:-1]), observations, atol=0 if exact else 1e-3)
    np.testing.assert_allclose(np.float32(earned), rewards, atol=0 if exact else 1e-3)


def test_an_episode_is_truncated_by_its_time_limit():
    env = SuiteEnvironment("cartpole", "balance")
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    env.close()
    assert not any(any(end) for end in ends[:-1])
    assert ends[-1] == (False, True)


def test_every_domain_makes_a_flat_environment():
    from dm_control import suite

    for domain in sorted({domain for domain, _ in suite.BENCHMARKING}):
        env = make_environment(f"dm_control/{domain}-{suite.TASKS_BY_DOMAIN[domain][0]}")
        assert env.observation_space.contains(env.reset(seed=1)[0]), domain
        env.close()


def test_a_seed_restarts_the_random_numbers_and_none_goes_on():
    env = make_environment(WALK)
    first, second = env.reset(seed=3)[0], env.reset()[0]
    assert not np.array_equal(first, second)
    assert np.array_equal(env.reset(seed=3)[0], first)
    assert np.array_equal(env.reset()[0], second)


def test_other_action_spaces_are_rescaled():
    env, plain = make_environment("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    assert env.action_space == Box(-1, 1, (1,), np.float32)
    env.reset(seed=0), plain.reset(seed=0)
    np.testing.assert_allclose(env.step(np.float32([0.5]))[0], plain.step(np.float32([1.0]))[0], rtol=1e-6)
    assert environment_sizes("Pendulum-v1") == (3, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dm_control/walker-wlak", "no environment 'dm_control/walker-wlak': did you mean 'dm_control/walker-walk'?"),
        ("dm_control/walker/walk", "did you mean 'dm_control/walker-walk'?"),
        ("walker-walk", "no environment 'walker-walk': did you mean"),
        ("Pendulm-v1", "no environment 'Pendulm-v1': did you mean 'Pendulum-v1'?"),
        ("Pendulum-v77", "no environment 'Pendulum-v77': did you mean 'Pendulum-v1'?"),
        ("zzzzqqq", "no environment 'zzzzqqq': give dm_control/<domain>-<task> or the id of a gymnasium environment"),
        ("CartPole-v1", "environment 'CartPole-v1': the action space must be a Box with one dimension, got Discrete(2)"),
        ("FrozenLake-v1", "environment 'FrozenLake-v1': the observation space must be a Box with one dimension, got Discrete(16)"),
        ("Wide-v0", "environment 'Wide-v0': the action space must be bounded to be scaled to [-1, 1], got Box(-inf, inf, (2,), float32)"),
    ],
)
@pytest.mark.usefixtures("registered")
def test_unsuitable_environments(name, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make_environment(name)
    assert message in str(caught.value)


def test_rollouts_repeat_and_leave_no_trace():
    policy = Policy(noise=0.3).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = rollout(policy, WALK, [4, 9], max_steps=20)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    torch.manual_seed(99)
    two = rollout(policy, WALK, [4, 9], max_steps=20)
    assert np.array_equal(one.returns, two.returns)
    assert policy.calls == [((2, 24), False, True)] * 40
    assert not np.array_equal(one.returns, rollout(policy, WALK, [4, 10], max_steps=20).returns)
    assert one.lengths.tolist() == [20, 20]
    assert one.seeds.tolist() == [4, 9]
    assert one.policy_seconds > 0
    assert one.environment_seconds > 0


def test_an_episode_does_not_depend_on_the_others():
    together = rollout(Policy(), WALK, [3, 8, 1], max_steps=40).returns
    alone = [rollout(Policy(), WALK, [seed], max_steps=40).returns[0] for seed in (3, 8, 1)]
    assert together.tolist() == alone


@pytest.mark.usefixtures("registered")
def test_episodes_of_different_lengths():
    policy = Policy(2, 2)
    result = rollout(policy, "Short-v0", [3, 1, 5])
    assert result.lengths.tolist() == [3, 1, 5]
    assert result.returns.tolist() == [6, 1, 15]
    assert [shape for shape, *_ in policy.calls] == [(3, 2)] * 5
    assert rollout(policy, "Short-v0", [3, 1, 5], max_steps=2).returns.tolist() == [3, 1, 3]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("execute", "decisions"), [(None, 2), (3, 2), (2, 3), (1, 5)])
def test_chunks_are_executed_in_order(execute, decisions):
    policy = Policy(2, 2, horizon=3)
    result = rollout(policy, "Short-v0", [5], execute=execute)
    assert (result.lengths.tolist(), len(policy.calls)) == ([5], decisions)
    gain = np.tile(policy.gain.detach().numpy()[: execute or 3], (5, 1))[:5]
    seen = np.array([[5.0, step - step % (execute or 3)] for step in range(5)])
    scaled = np.tanh(seen * gain)
    np.testing.assert_allclose(np.stack(Short.seen), scaled * [2, 0.5] + [0, 0.5], atol=1e-6)


@pytest.mark.usefixtures("registered")
def test_actions_are_clipped_before_they_are_rescaled():
    policy = Policy(2, 2)
    policy.predict = lambda batch: torch.full((len(batch["observation"]), 1, 2), 7.0)
    rollout(policy, "Short-v0", [2])
    np.testing.assert_allclose(np.stack(Short.seen), [[2, 1], [2, 1]])


def test_a_recording_is_the_episode():
    from dm_control import _render

    result = rollout(Policy(), WALK, [2, 6], max_steps=7, record=1, frame_every=3 if _render.BACKEND == "egl" else 0, size=(48, 64))
    recording = result.recording
    assert recording.observations.shape == (7, 24)
    assert recording.rewards.sum() == result.returns[1]
    observations, rewards = suite_episode("walk", 6, recording.actions)
    assert np.array_equal(recording.observations, observations[:-1])
    assert recording.rewards.tolist() == rewards.tolist()
    if recording.every:
        assert (recording.frames.shape, recording.frames.dtype) == ((3, 48, 64, 3), np.uint8)
        assert recording.frames.std() > 1
    assert np.array_equal(result.returns, rollout(Policy(), WALK, [2, 6], max_steps=7).returns)


def test_without_opengl_everything_but_frames_works():
    code = f"""
import sys
sys.modules["dm_control._render.pyopengl.egl_renderer"] = None
from skillbank.tasks import environments
from skillbank.tasks.environments import make_environment
env = make_environment({WALK!r}, render_mode="rgb_array")
env.reset(seed=0)
env.step(env.action_space.sample())
try:
    env.render()
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "cannot render dm_control/walker-walk with MUJOCO_GL=disable: install libegl1" in done.stdout


def test_without_dm_control_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(sys.modules, "dm_control.suite", None)
    with pytest.raises(ImportError, match=r"dm_control/\.\.\. environments need dm_control .*pip install 'skillbank\[control\]'"):
        environments._suite.__wrapped__()


class Wrong(Policy):
    def __init__(self, answer, **sizes):
        super().__init__()
        self.answer = answer
        for name, size in sizes.items():
            setattr(self, name, size)

    def predict(self, batch):
        return self.answer(len(batch["observation"]))


def bad_rows(value):
    def answer(rows):
        actions = torch.zeros(rows, 1, 6)
        actions[1:, 0, 2] = value
        return actions

    return answer


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Wrong(bad_rows(torch.nan)), {}, r"NaN or infinite actions for 'dm_control/walker-walk' at step 0, in 2 of 3 rows"),
        (Wrong(bad_rows(torch.inf)), {}, r"NaN or infinite actions for 'dm_control/walker-walk' at step 0, in 2 of 3 rows"),
        (Wrong(lambda rows: torch.zeros(rows, 6)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(3, 6\)"),
        (Wrong(lambda rows: torch.zeros(rows, 1, 5)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(3, 1, 5\)"),
        (Wrong(lambda rows: torch.zeros(1, 1, 6)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(1, 1, 6\)"),
        (Policy(horizon=2), {"execute": 3}, r"execute=3 must be between 1 and the H=2 actions"),
        (Policy(), {"execute": 0}, r"execute=0 must be between 1 and the H=1 actions"),
        (Wrong(None, observation_dim=17), {}, r"'dm_control/walker-walk' has observation_dim=24, the model has observation_dim=17"),
        (Wrong(None, action_dim=3), {}, r"'dm_control/walker-walk' has action_dim=6, the model has action_dim=3"),
        (Policy(), {"record": 3}, r"record=3 is no position in 3 seeds"),
    ],
)
def test_wrong_models(model, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(model, WALK, [0, 1, 2], **options)


@pytest.mark.parametrize("seeds", [[], [-1], [2**32]])
def test_wrong_seeds(seeds):
    with pytest.raises(ValueError, match=r"seeds must be one or more integers in \[0, 2\*\*32\), got \["):
        rollout(Policy(), WALK, seeds)


@pytest.mark.usefixtures("registered")
def test_an_environment_without_an_end_needs_max_steps():
    with pytest.raises(ValueError, match="environment 'Open-v0' has no time limit: give max_steps"):
        rollout(Policy(2, 2), "Open-v0", [3])
    assert rollout(Policy(2, 2), "Open-v0", [3], max_steps=2).lengths.tolist() == [2]
