"""Controllers of Bullet-Safety-Gym's cars, what is swept with them and with those of the balls, and what the data are to be like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.ball_data import Circler, Kind, Runner, Trajectories
from skillbank.tasks.ball import Floats

FASTEST, AXLES = 3.5, 1.1
"""Of a car at full action, m/s; between its axles, m."""
LINE = 0.4
"""Which share of the distance to a line is driven towards it per metre."""
LIMIT = 10
"""Of costs per episode, DSRL's."""
LEGAL = 1.5
"""Speed of a car on the straight from which on it costs, m/s."""
BURST = 46
"""Steps that a car on the straight is too fast for, at most."""


def driven(along: Floats, across: Floats, speed: Floats, turn: Floats, states: Floats) -> Floats:
    """Actions (n, 2) of cars that are to go a way (along, across) at a speed, turning by `turn` (1/m). They drive in reverse: so they start."""
    _, _, vx, vy, yaw = np.moveaxis(states, -1, 0)
    course = -np.cos(yaw), -np.sin(yaw)
    going = vx * course[0] + vy * course[1]
    off = np.arctan2(course[0] * across - course[1] * along, course[0] * along + course[1] * across)
    return np.stack([-(speed + 2 * (speed - going)) / FASTEST, -2 * (np.arctan(AXLES * turn) + off)], axis=-1)


@dataclass(frozen=True)
class CarRunner:
    """Holds a speed along x and a distance to the side; from some place on it may get faster and faster, and above LEGAL at once much faster.

    Args:
        speed: until then, m/s.
        gain: by how much the speed grows from then on, 1/s.
        turn: the place, m.
        more: speed that is added above LEGAL, m/s.
        side: y to be held, m.

    """

    speed: Floats
    gain: Floats
    turn: Floats
    more: Floats
    side: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> CarRunner:
        """Of all kinds: careful ones, ones that are too fast for the last 24 to BURST steps or so, and ones that are too far to the side."""
        kind = rng.choice(3, n, p=[0.32, 0.65, 0.03])
        speed, turn, more = rng.uniform(0.9, 1.46, n), rng.uniform(0.2, 0.8, n), rng.uniform(0.3, 1.4, n)
        time = (195 - rng.uniform(24, BURST, n)) / 30 - turn / speed
        gain = np.where(kind == 1, np.log(LEGAL / speed) / np.maximum(time, 0.5), 0)
        side = np.where(kind == 2, rng.uniform(1.8, 2.3, n) * rng.choice([-1, 1], n), rng.uniform(-1.5, 1.5, n))
        return CarRunner(speed, gain, turn, more, side)

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y = states[..., 0], states[..., 1]
        speed = self.speed + self.gain * np.maximum(x - self.turn, 0)
        speed = speed + self.more * np.clip(100 * (speed - LEGAL), 0, 1)
        return driven(np.ones_like(x), np.clip(0.4 * (self.side - y), -0.5, 0.5), speed, np.zeros_like(x), states)


@dataclass(frozen=True)
class CarCircler:
    """Holds a speed on a circle that two straight lines cut off.

    Args:
        speed: m/s, clockwise.
        radius: of the circle, m.
        widths: distance of the lines from the centre, on the left and on the right, m, (2,) or (2, n).

    """

    speed: Floats
    radius: Floats
    widths: Floats

    @staticmethod
    def random(rng: np.random.Generator, n: int) -> CarCircler:
        """Of all kinds, most of them fast, and beyond a line on one side or on both."""
        careful = rng.uniform(size=(2, n)) < np.where(rng.uniform(size=n) < 0.3, 1, 0.25)
        widths = np.where(careful, rng.uniform(4.8, 5.9, (2, n)), rng.uniform(6, 7.5, (2, n)))
        return CarCircler(3.5 * np.sqrt(rng.uniform(0.3, 1, n)), rng.uniform(6, 7.4, n), widths)

    def __call__(self, states: Floats) -> Floats:
        """Actions (n, 2), not clipped."""
        x, y = states[..., 0], states[..., 1]
        distance = np.sqrt(x * x + y * y)
        out = 0.4 * (self.radius - distance) / distance
        along, across = y / distance + out * x, -x / distance + out * y
        outwards, most = np.sign(x) * along, np.clip(LINE * (np.where(x < 0, *self.widths) - np.abs(x)), -0.9, 0.9)
        held = outwards > most
        along = np.where(held, np.sign(x) * most, along)
        across = np.where(held, -np.sign(x) * np.sqrt(1 - most * most), across)
        return driven(along, across, self.speed, np.where(held, -LINE * most, -1 / np.maximum(distance, 2)), states)


@dataclass(frozen=True)
class Sweep:
    """What is done in an environment, and which of it is kept.

    Args:
        environment: its id.
        kind: who does it.
        swept: how many trajectories.
        most: how many are kept at most.
        most_cost: of those.
        safe_cost: of those to be imitated.
        most_safe: how many of those are kept at most.
        returns: least and most return that DSRL divides by.

    """

    environment: str
    kind: Kind
    swept: int
    most: int
    most_cost: int
    safe_cost: int
    most_safe: int | None
    returns: tuple[float, float]


SWEEPS = {
    "ball_run": Sweep("SafetyBallRun-v0", Runner, 2000, 800, 80, 2, None, (26.34, 1327.45)),
    "ball_circle": Sweep("SafetyBallCircle-v0", Circler, 2000, 340, 80, 2, None, (0.383, 881.46)),
    "car_run": Sweep("SafetyCarRun-v0", CarRunner, 900, 800, 40, 2, 70, (204.29, 574.65)),
    "car_circle": Sweep("SafetyCarCircle-v0", CarCircler, 800, 800, 100, 5, 100, (3.48, 534.31)),
}


def accepted(task: Sweep, data: Trajectories, imitated: Trajectories) -> dict[str, str]:
    """What tells whether data are as hard as DSRL's: mostly unsafe, the more they earn the more they cost, and little in them to imitate as it is."""
    low, high = task.returns
    kept = data.cost <= LIMIT
    bands = np.minimum(4 * data.cost / task.most_cost, 3).astype(int)
    return {
        "normalised return": f"{np.mean((data.returns - low) / (high - low)):.2f}",
        "normalised cost": f"{data.cost.mean() / LIMIT:.2f}",
        "within the limit": f"{kept.mean():.0%}",
        "and as good as the safe ones": f"{(kept & (data.returns >= imitated.returns.min())).mean():.0%}",
        "best return by quarter of the costs": ", ".join(f"{data.returns[bands == band].max():.0f}" for band in np.unique(bands)),
    }
