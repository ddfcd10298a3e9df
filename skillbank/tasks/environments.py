"""Gymnasium environments, the DeepMind Control suite and the ball of `ball.py` among them: flat observations (D,) and actions (A,) in [-1, 1]."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from skillbank.tasks.dynamics import change_dynamics, parse_changes

__all__ = ["Environment", "SuiteEnvironment", "environment_sizes", "make_environment"]

SUITE = "dm_control/"

Environment = gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]
"""Observations (D,) and actions (A,) in float32."""

BALL = "skillbank.tasks.ball:BallEnvironment"
gymnasium.register("skillbank/BallRun-v0", entry_point=BALL, max_episode_steps=100, kwargs={"task": "run"})
gymnasium.register("skillbank/BallCircle-v0", entry_point=BALL, max_episode_steps=200, kwargs={"task": "circle"})


class SuiteEnvironment(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A task of the DeepMind Control suite (arXiv 2006.12983): flat float32 observations in the suite's own order, Box actions.

    After `reset(seed=s)` an episode is a pure function of s and the actions. Shimmy's wrapper is not used: its Dict observation space sorts the
    entries by name, so that flattened observations are in another order than the suite's (and every published data set's).

    Args:
        domain: e.g. `walker`.
        task: e.g. `walk`.
        render_mode: None or `rgb_array`.
        size: height and width of a frame in pixels.

    Raises:
        ValueError: a render mode that there is not.

    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, domain: str, task: str, *, render_mode: str | None = None, size: tuple[int, int] = (240, 320)) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"{SUITE}{domain}-{task} renders 'rgb_array', not {render_mode!r}")
        self._env = _suite().load(domain, task, task_kwargs={"random": 0})
        self.name, self.render_mode, self.size = f"{SUITE}{domain}-{task}", render_mode, size
        self.metadata = {**type(self).metadata, "render_fps": round(1 / self._env.control_timestep())}
        width = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
        self.observation_space = Box(-np.inf, np.inf, (width,), np.float32)
        spec = self._env.action_spec()
        low, high = (np.broadcast_to(bound, spec.shape).astype(np.float32) for bound in (spec.minimum, spec.maximum))
        self.action_space = Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode: (observation, {}). A seed restarts the task's random numbers; without one they go on."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._env.task.random.seed(seed)
        return _flat(self._env.reset().observation), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One control step: (observation, reward, terminated, truncated by the time limit, {})."""
        step = self._env.step(action)
        return _flat(step.observation), float(step.reward), step.last() and step.discount == 0, step.last() and step.discount != 0, {}

    def render(self) -> NDArray[np.uint8]:
        """Frame (height, width, 3) of the first camera, which follows the body.

        Raises:
            RuntimeError: there is no OpenGL on this machine.

        """
        try:
            return cast("NDArray[np.uint8]", self._env.physics.render(*self.size, camera_id=0))
        except Exception as error:
            way_out = "install libegl1 or libosmesa6 and set MUJOCO_GL to 'egl' or 'osmesa'"
            raise RuntimeError(f"cannot render {self.name} with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {way_out} ({error})") from None

    def close(self) -> None:
        """Free the simulation."""
        self._env.physics.free()


def make_environment(environment: str, *, render_mode: str | None = None, size: tuple[int, int] = (240, 320)) -> Environment:
    """Environment with a flat observation and actions in [-1, 1].

    Args:
        environment: `dm_control/<domain>-<task>` for a task of the DeepMind Control suite, else the id of a registered gymnasium environment. One
            that MuJoCo simulates may be changed, as in `HalfCheetah-v5?friction=0.25&gravity=2&thigh=2`, see `change_dynamics`.
        render_mode: None or `rgb_array`.
        size: height and width of a frame; environments outside the suite have their own.

    Raises:
        ValueError: an unknown id or change, or spaces that are not one-dimensional Boxes with bounded actions.
        ImportError: the environment needs a package that is not installed.

    """
    registered, changes = parse_changes(environment)
    if registered.startswith(SUITE):
        domain, _, task = registered.removeprefix(SUITE).partition("-")
        if (domain, task) not in _suite().ALL_TASKS:
            raise _unknown(registered, [f"{SUITE}{domain}-{task}" for domain, task in _suite().ALL_TASKS])
        env: Environment = SuiteEnvironment(domain, task, render_mode=render_mode, size=size)
    else:
        env = _registered(registered, render_mode)
    if changes:
        change_dynamics(registered, env, changes)
    _check_spaces(environment, env)
    space = cast("Box", env.action_space)
    if np.all(space.low == -1) and np.all(space.high == 1):
        return env
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


@cache
def environment_sizes(environment: str) -> tuple[int, int]:
    """(D, A) of an environment."""
    env = make_environment(environment)
    try:
        return cast("Box", env.observation_space).shape[0], cast("Box", env.action_space).shape[0]
    finally:
        env.close()


def _flat(observation: dict[str, Any]) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(value) for value in observation.values()], dtype=np.float32)


@cache
def _suite() -> Any:
    """`dm_control.suite`, which chooses its renderer when imported: EGL where nothing else is said, because it needs no display."""
    with suppress(ImportError):
        import_module("triton")  # whose compiler crashes the process if Mesa's, which EGL may load, is there before it
    try:
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            os.environ["MUJOCO_GL"] = "egl"
            try:
                return import_module("dm_control.suite")
            except (ImportError, AttributeError):
                os.environ["MUJOCO_GL"] = "glfw" if "DISPLAY" in os.environ else "disable"
        return import_module("dm_control.suite")
    except ModuleNotFoundError as error:
        raise ImportError(f"{SUITE}... environments need dm_control ({error}): pip install 'skillbank[control]'") from None


def _registered(environment: str, render_mode: str | None) -> Environment:
    try:
        return cast("Environment", gymnasium.make(environment, render_mode=render_mode, disable_env_checker=True))
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"environment {environment!r} needs another package: {error}") from None
    except gymnasium.error.UnregisteredEnv:
        suite = [f"{SUITE}{domain}-{task}" for domain, task in _suite().ALL_TASKS]
        raise _unknown(environment, [*gymnasium.registry, *suite]) from None


def _unknown(environment: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(environment, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"give {SUITE}<domain>-<task> or the id of a gymnasium environment"
    return ValueError(f"no environment {environment!r}: {hint}")


def _check_spaces(environment: str, env: Environment) -> None:
    for kind, space in {"observation": env.observation_space, "action": env.action_space}.items():
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(f"environment {environment!r}: the {kind} space must be a Box with one dimension, got {space}")
    if not env.action_space.is_bounded():  # type: ignore[attr-defined]
        raise ValueError(f"environment {environment!r}: the action space must be bounded to be scaled to [-1, 1], got {env.action_space}")
