"""Environments against dm_control and gymnasium themselves."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from skillbank.tasks import environments
from skillbank.tasks.environments import SuiteEnvironment, environment_sizes, make_environment
from tests.walkers import WALK, suite_episode

ROOT = Path(__file__).parents[1]


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


def test_compilers_live_with_renderers():
    code = "from skillbank.tasks.environments import make_environment as m; m('dm_control/walker-walk').reset(seed=0); import triton; print('lives')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "lives"), done.stderr[-1000:]


def test_without_dm_control_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(sys.modules, "dm_control.suite", None)
    with pytest.raises(ImportError, match=r"dm_control/\.\.\. environments need dm_control .*pip install 'skillbank\[control\]'"):
        environments._suite.__wrapped__()
