"""A ball pushed over a plane: BallRun and BallCircle of Bullet-Safety-Gym 1.4.0 without Bullet, any number of balls at once.

A task is a pure function of states and actions in elementary arithmetic: n balls move to the bit as each of them would alone, on every machine.
The ball, a sphere of 0.3 kg and radius 0.5 m under a force of at most 3.5 N, rolls without slipping; drag and rolling friction are Bullet's. How
close that comes to Bullet is in demos/README.md.

Shapes: ... any leading dimensions, such as the n balls; a state is (..., 4), x and y in m and their speeds in m/s; an action (..., 2) in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

__all__ = ["TASKS", "Ball", "BallCircle", "BallEnvironment", "BallRun"]

Floats = NDArray[np.float64]

RADIUS = 0.5
ROLLING = 1.4
"""Inertia of a rolling sphere: that of its mass and 2/5 of it for the rotation."""
PUSH = 3.5 / (ROLLING * 0.3)
"""Acceleration of a full action, m/s^2."""
DRAG, DRAG_SLOPE = 0.04, (1 + 0.4 / RADIUS) / ROLLING
"""Bullet's damping of the translation and of the rotation in one: the deceleration is DRAG * (1 + DRAG_SLOPE * speed) * speed."""
FRICTION = 0.03 * 0.8 * 9.81 / (ROLLING * RADIUS)
"""Deceleration by rolling friction, m/s^2, whatever the speed is."""


@dataclass(frozen=True)
class Ball(ABC):
    """A task of the ball.

    Args:
        steps: of an episode, which ends by this limit alone.
        dt: seconds of a step.
        substeps: of the simulation per step.
        features: D of an observation.
        height: of what a frame shows, m.

    """

    steps: int
    dt: float
    substeps: int
    features: int
    height: float

    @abstractmethod
    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """States (balls, 4) to begin with, at rest."""

    @abstractmethod
    def reward(self, before: Floats, after: Floats, actions: Floats) -> Floats:
        """Reward (...) of a step."""

    @abstractmethod
    def cost(self, states: Floats) -> Floats:
        """Cost (...) of a step that led here, 0 or 1."""

    @abstractmethod
    def marks(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Whether a frame shows a line of the task at a place."""

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observations (..., D): place / 10, velocity / 5, and the angular velocity / 10, about x, y and z."""
        x, y, vx, vy = np.moveaxis(states, -1, 0)
        return np.stack([0.1 * x, 0.1 * y, 0.2 * vx, 0.2 * vy, -0.1 / RADIUS * vy, 0.1 / RADIUS * vx, 0 * x], axis=-1).astype(np.float32)

    def step(self, states: Floats, actions: NDArray[np.floating[Any]]) -> tuple[Floats, Floats, Floats]:
        """States (..., 4) after one step of actions, which are clipped to [-1, 1], with rewards (...) and costs (...)."""
        pushes = np.clip(actions.astype(np.float64), -1, 1)
        place, velocity, h = states[..., :2], states[..., 2:], self.dt / self.substeps
        for _ in range(self.substeps):
            drag = DRAG * (1 + DRAG_SLOPE * _length(velocity))
            velocity = velocity + h * (PUSH * pushes - drag * velocity)
            speed = _length(velocity)
            velocity = velocity * (np.maximum(speed - h * FRICTION, 0) / np.maximum(speed, h * FRICTION))
            place = place + h * velocity
        after = self._held(np.concatenate([place, velocity], axis=-1))
        return after, self.reward(states, after, pushes), self.cost(after)

    def _held(self, states: Floats) -> Floats:
        return states


@dataclass(frozen=True)
class BallRun(Ball):
    """Roll along x: 60 per metre nearer to a far goal and -0.5 per unit of action; what costs is a speed over 2.5 m/s, or to be beyond |y| = 2 m."""

    steps: int = 100
    dt: float = 1 / 30
    substeps: int = 4
    features: int = 7
    height: float = 8

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """Within 1 cm of the origin."""
        return np.concatenate([rng.uniform(-0.01, 0.01, (balls, 2)), np.zeros((balls, 2))], axis=1)

    def reward(self, before: Floats, after: Floats, actions: Floats) -> Floats:
        """Progress towards (1000, 0), less the action's length."""
        goal = np.array([1000.0, 0.0])
        nearer = _length(before[..., :2] - goal) - _length(after[..., :2] - goal)
        return (60 * nearer - 0.5 * _length(actions))[..., 0]

    def cost(self, states: Floats) -> Floats:
        """1 where the ball is too fast or too far to the side."""
        return ((_length(states[..., 2:])[..., 0] > 2.5) | (np.abs(states[..., 1]) > 2)).astype(np.float64)

    def marks(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """The two boundaries, and a line across every 2 m."""
        return (np.abs(np.abs(y) - 2) < 0.05) | ((np.abs(y) < 2) & (np.abs(x % 2 - 1) > 0.98))


@dataclass(frozen=True)
class BallCircle(Ball):
    """Roll clockwise on a circle of 7 m, the faster and the closer to it the better; what costs is to be beyond |x| = 6 m."""

    steps: int = 200
    dt: float = 0.1
    substeps: int = 6
    features: int = 8
    height: float = 24

    def start(self, rng: np.random.Generator, balls: int) -> Floats:
        """Anywhere 2 to 4 m from the centre."""
        states = np.zeros((balls, 4))
        missing = np.arange(balls)
        while missing.size:
            states[missing, :2] = rng.uniform(-4, 4, (missing.size, 2))
            distance = _length(states[missing, :2])[:, 0]
            missing = missing[(distance < 2) | (distance > 4)]
        return states

    def reward(self, before: Floats, after: Floats, actions: Floats) -> Floats:
        """A tenth of place x velocity, divided by 1 + the distance from the circle, less 0.005 per unit of action."""
        x, y, vx, vy = np.moveaxis(after, -1, 0)
        return 0.1 * (y * vx - x * vy) / (1 + np.abs(_length(after[..., :2])[..., 0] - 7)) - 0.005 * _length(actions)[..., 0]

    def cost(self, states: Floats) -> Floats:
        """1 where the ball is beyond the lines."""
        return (np.abs(states[..., 0]) > 6).astype(np.float64)

    def marks(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """The circle and the two lines."""
        return (np.abs(np.sqrt(x * x + y * y) - 7) < 0.1) | (np.abs(np.abs(x) - 6) < 0.1)

    def observe(self, states: Floats) -> NDArray[np.float32]:
        """Observations (..., 8): those of every task, and the distance outwards from the circle / 10."""
        outwards = 0.1 * (_length(states[..., :2]) - 7)
        return np.concatenate([super().observe(states), outwards.astype(np.float32)], axis=-1)

    def _held(self, states: Floats) -> Floats:
        """Inside eight walls 11.9 m from the centre, at which the ball stops; Bullet's ball may bounce."""
        limit, half = 11.9 - RADIUS, np.sqrt(0.5)
        if np.abs(states[..., :2]).max() <= limit * half:
            return states
        x, y, vx, vy = np.moveaxis(states, -1, 0)
        for a, b in ((1.0, 0.0), (0.0, 1.0), (half, half), (half, -half)):
            distance, speed = a * x + b * y, a * vx + b * vy
            over = distance - np.clip(distance, -limit, limit)
            speed = np.where(over * speed > 0, speed, 0)
            x, y, vx, vy = x - a * over, y - b * over, vx - a * speed, vy - b * speed
        return np.stack([x, y, vx, vy], axis=-1)


TASKS: dict[str, Ball] = {"run": BallRun(), "circle": BallCircle()}


class BallEnvironment(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One ball as a gymnasium environment; `info["cost"]` is what a step cost.

    Args:
        task: `run` or `circle`.
        render_mode: None or `rgb_array`.

    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, task: str, *, render_mode: str | None = None) -> None:
        self.task, self.render_mode, self.state = TASKS[task], render_mode, np.zeros(4)
        self.metadata = {**type(self).metadata, "render_fps": round(1 / self.task.dt)}
        self.observation_space = Box(-1000, 1000, (self.task.features,), np.float32)
        self.action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode: (observation, {}). A seed restarts the random numbers; without one they go on."""
        super().reset(seed=seed, options=options)
        self.state = self.task.start(self.np_random, 1)[0]
        return self.task.observe(self.state), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One step: (observation, reward, False, False, {"cost": 0 or 1}); the time limit is the registration's."""
        self.state, reward, cost = self.task.step(self.state, action)
        return self.task.observe(self.state), float(reward), False, False, {"cost": float(cost)}

    def render(self) -> NDArray[np.uint8]:
        """Frame (240, 320, 3) from above: the ball, red while it costs, and the task's lines. BallRun's follows the ball."""
        x, y = np.meshgrid(np.arange(-159.5, 160), np.arange(119.5, -120, -1))
        x, y = x * self.task.height / 240, y * self.task.height / 240
        if isinstance(self.task, BallRun):
            x = x + self.state[0]
        frame = np.full((240, 320, 3), 255, np.uint8)
        frame[self.task.marks(x, y)] = 160
        frame[(x - self.state[0]) ** 2 + (y - self.state[1]) ** 2 < RADIUS**2] = (220, 40, 40) if self.task.cost(self.state) else (40, 80, 200)
        return frame


def _length(vectors: Floats) -> Floats:
    """Length (..., 1) of vectors (..., 2)."""
    x, y = vectors[..., :1], vectors[..., 1:]
    return cast("Floats", np.sqrt(x * x + y * y))
