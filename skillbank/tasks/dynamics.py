"""Simulated bodies with other friction, gravity or limbs: the MJCF of a gymnasium environment, edited and compiled again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

__all__ = ["CHANGES", "change_dynamics", "parse_changes"]

CHANGES = ("friction", "gravity", "thigh")
"""What can be changed."""


def parse_changes(environment: str) -> tuple[str, dict[str, float]]:
    """Registered id and factors of an id with changes: `HalfCheetah-v5?friction=0.25&thigh=2` is (`HalfCheetah-v5`, {friction: 0.25, thigh: 2.0}).

    Raises:
        ValueError: a change that there is not, one that is given twice, or a factor that is not a positive number.

    """
    name, mark, query = environment.partition("?")
    changes: dict[str, float] = {}
    for change, value in parse_qsl(query, keep_blank_values=True):
        if change not in CHANGES or change in changes:
            problem = "is given twice" if change in changes else f"is none of {', '.join(CHANGES)}"
            raise ValueError(f"environment {environment!r}: the change {change!r} {problem}")
        try:
            changes[change] = float(value)
        except ValueError:
            changes[change] = math.nan
        if not 0 < changes[change] < math.inf:
            raise ValueError(f"environment {environment!r}: {change} must be a positive factor such as 0.25, got {value!r}")
    if mark and not changes:
        raise ValueError(f"environment {environment!r}: after '?' comes <change>=<factor> (joined by '&'), a change being {', '.join(CHANGES)}")
    return name, changes


def change_dynamics(name: str, env: Any, changes: Mapping[str, float]) -> None:
    """Edit the MJCF of a gymnasium MuJoCo environment that was not reset yet, and simulate what is compiled from it.

    These are the shifts of dynamics of PSEC (arXiv 2502.05932). `friction` multiplies every friction coefficient of every geom and contact pair,
    `gravity` the vector, `thigh` the radius and the half-length of every geom with *thigh* in its name; joints stay where they are. Masses and
    inertias follow from the densities when the model is compiled (and where the file fixes the total mass, as HalfCheetah's does, all bodies are
    then rescaled to it).

    Args:
        name: of the environment, for messages.
        env: as `gymnasium.make` made it; changed in place.
        changes: factors, by what they change.

    Raises:
        ValueError: no MuJoCo environment with an MJCF file, or no thighs whose size can be changed.

    """
    simulation = env.unwrapped
    if not hasattr(simulation, "fullpath") or not hasattr(simulation, "mujoco_renderer"):
        raise ValueError(f"environment {name!r} has no MJCF file: {', '.join(changes)} can be changed in gymnasium's MuJoCo environments alone")
    import mujoco

    spec = mujoco.MjSpec.from_file(simulation.fullpath)
    for each in (*spec.geoms, *spec.pairs):
        each.friction = changes.get("friction", 1.0) * each.friction
    spec.option.gravity = changes.get("gravity", 1.0) * spec.option.gravity
    if "thigh" in changes:
        thighs = [geom for geom in spec.geoms if "thigh" in geom.name]
        if not thighs or not all(np.isnan(geom.fromto[0]) for geom in thighs):
            problem = "are given by their end points" if thighs else "are not there"
            raise ValueError(f"environment {name!r}: the thighs cannot be resized: geoms with 'thigh' in their names {problem}")
        for geom in thighs:
            geom.size = changes["thigh"] * geom.size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*settotalmass")  # HalfCheetah's file says so, and MuJoCo calls it deprecated
        model = spec.compile()
    for size in ("offwidth", "offheight"):
        setattr(model.vis.global_, size, getattr(simulation.model.vis.global_, size))
    data = mujoco.MjData(model)
    for holder in (simulation, simulation.mujoco_renderer):
        holder.model, holder.data = model, data
