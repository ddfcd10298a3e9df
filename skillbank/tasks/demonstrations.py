"""Demonstrations in memory, and one reader per file format.

Shapes: E episodes, N steps of all episodes together, D features of an observation, A of an action.
"""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skillbank.skill import digest

__all__ = ["Demonstrations", "load_demonstrations", "read_hdf5", "read_minari", "read_npz"]

ACTION_LIMIT = 1 - 1e-5
"""Actions are clipped to +-ACTION_LIMIT (arXiv 2501.04296 does so for every data set), so that no target lies on the sampler's own clip."""

ACTION_TOLERANCE = 1e-3
"""Rounding beyond [-1, 1] that is clipped; anything further out is in other units and refused."""

MINARI = "minari:"


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes of one expert, one after the other, possibly of different lengths.

    Args:
        observations: (N, D), stored as float32; row t is what the action of row t saw.
        actions: (N, A) in [-1, 1], stored as float32 and clipped to +-(1 - 1e-5).
        rewards: (N,), stored as float32.
        starts: (E + 1,) int64, the first row of every episode and, last, N.
        source: where they came from, for messages and cards.
        costs: (N,), stored as float32; None where there are none.
        terminated: (E,) bool, whether an episode came to its end; where not, a time limit or the recording cut it. None where that is unknown.
        finals: (E, D), stored as float32, the observation after the last step of every episode; None where it is unknown.

    Raises:
        ValueError: no steps, arrays that do not fit together, entries that are not finite, or actions outside [-1, 1].

    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    starts: NDArray[np.int64]
    source: str
    costs: NDArray[np.float32] | None = None
    terminated: NDArray[np.bool_] | None = None
    finals: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name, dims in {"observations": 2, "actions": 2, "rewards": 1, "costs": 1, "finals": 2}.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _floats(getattr(self, name), name, dims, self.source))
        object.__setattr__(self, "starts", np.asarray(self.starts, np.int64))
        steps = {name: len(getattr(self, name)) for name in ("observations", "actions", "rewards", "costs") if getattr(self, name) is not None}
        if len(set(steps.values())) != 1:
            raise ValueError(f"{self.source}: the arrays have different numbers of steps: {steps}")
        if not len(self.rewards):
            raise ValueError(f"{self.source} holds no steps: give a file with at least one episode")
        if self.starts.ndim != 1 or self.starts[0] != 0 or self.starts[-1] != len(self.rewards) or (np.diff(self.starts) < 1).any():
            raise ValueError(f"{self.source}: starts must rise from 0 to {len(self.rewards)}, got {self.starts.tolist()[:8]}")
        self._check_ends()
        for name in steps:
            self._check_finite(name)
        self._check_range()
        object.__setattr__(self, "actions", np.clip(self.actions, -ACTION_LIMIT, ACTION_LIMIT, dtype=np.float32))

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.starts) - 1

    def __repr__(self) -> str:
        """One line: source, episodes, steps, sizes, mean return."""
        sizes = f"{self.observations.shape[1]} -> {self.actions.shape[1]}"
        return f"Demonstrations({self.source}: {len(self)} episodes, {len(self.rewards):,} steps, {sizes}, return {self.returns.mean():.1f})"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the arrays that are here: another selection of episodes has another hash, another file with the same arrays has not."""
        arrays = {name: getattr(self, name) for name in ("observations", "actions", "rewards", "starts", "costs", "terminated", "finals")}
        return digest({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items() if array is not None})

    @property
    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of every episode, (E,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts[:-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of every episode, (E,)."""
        return np.diff(self.starts)

    def episodes(self, which: int | slice) -> Demonstrations:
        """Select the first `which` episodes, or a contiguous slice of them; `episodes(n)` is a prefix of `episodes(n + 1)`.

        Raises:
            ValueError: more episodes than there are, none, or a slice with a step.

        """
        span = slice(0, which) if isinstance(which, int) else which
        if span.stop is not None and span.stop > len(self):
            raise ValueError(f"{self.source} has {len(self)} episodes, asked for {span.stop}: ask for fewer or give more demonstrations")
        first, last, step = span.indices(len(self))
        if step != 1 or last <= first or (isinstance(which, int) and which < 1):
            raise ValueError(f"{self.source}: cannot select episodes {which!r} of {len(self)}: give a count of at least 1, or a contiguous slice")
        rows = slice(self.starts[first], self.starts[last])
        starts = self.starts[first : last + 1] - self.starts[first]
        parts = {"costs": rows, "terminated": slice(first, last), "finals": slice(first, last)}
        more = {name: getattr(self, name)[part] for name, part in parts.items() if getattr(self, name) is not None}
        return Demonstrations(self.observations[rows], self.actions[rows], self.rewards[rows], starts, self.source, **more)

    def _where(self, row: int) -> str:
        episode = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"episode {episode}, step {row - int(self.starts[episode])}"

    def _check_ends(self) -> None:
        wanted = {"terminated": (len(self),), "finals": (len(self), self.observations.shape[1])}
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array is not None and np.shape(array) != shape:
                raise ValueError(f"{self.source}: array {name!r} must have shape {shape}, a row for each episode, got {np.shape(array)}")
        if self.terminated is not None:
            object.__setattr__(self, "terminated", np.asarray(self.terminated).astype(bool))
        if self.finals is not None and not (fine := np.isfinite(self.finals).all(axis=1)).all():
            raise ValueError(f"{self.source}: array 'finals' is not finite for episode {int(fine.argmin())}: remove this episode")

    def _check_finite(self, name: str) -> None:
        values = getattr(self, name).reshape(len(self.rewards), -1)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            value = values[row][~np.isfinite(values[row])][0]
            raise ValueError(f"{self.source}: array {name!r} holds {value} at {self._where(row)} ({bad.sum()} such steps): remove these episodes")

    def _check_range(self) -> None:
        size = np.abs(self.actions).max(axis=1)
        row = int(size.argmax())
        if size[row] > 1 + ACTION_TOLERANCE:
            raise ValueError(
                f"{self.source}: array 'actions' reaches {size[row]:.4g} at {self._where(row)}, outside [-1, 1]: rescale the actions to [-1, 1]"
            )


def load_demonstrations(source: str, *, episodes: int | None = None) -> Demonstrations:
    """Read demonstrations from a file, a folder or a data set, and keep the first `episodes` of them.

    Args:
        source: a `.npz`, `.hdf5` or `.h5` path relative to the current directory, `minari:<id or folder>`, or the folder of a Minari data set.
        episodes: keep the prefix `[:episodes]`; None keeps all.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ValueError: the file is damaged or of another kind, an array is missing or wrong, or there are fewer episodes.

    """
    readers: dict[str, Callable[[str], Demonstrations]] = {".npz": read_npz, ".hdf5": read_hdf5, ".h5": read_hdf5}
    suffix = Path(source).suffix
    if source.startswith(MINARI) or Path(source).is_dir():
        demonstrations = read_minari(source.removeprefix(MINARI), episodes=episodes)
    elif suffix in readers:
        demonstrations = readers[suffix](source)
    else:
        raise ValueError(f"demonstrations {source!r} are of no known kind: give a {', '.join(readers)} file or {MINARI}<id>")
    return demonstrations if episodes is None else demonstrations.episodes(episodes)


def read_npz(path: str) -> Demonstrations:
    """Read a NumPy archive, in the grid layout or the flat one.

    Grid: observations (E, T, D), actions (E, T, A), rewards (E, T) and, where they are known, costs (E, T), terminated (E,) and finals (E, D).
    Flat: observations (N, D), actions (N, A), rewards (N,), at the last step of every episode `terminals` (it came to its end) or `timeouts` (it was
    cut) (N,) and, where they are known, costs (N,) and next_observations (N, D). Other arrays are not read, and pickled ones are refused.
    """
    return _from_arrays(_read(path, _npz_arrays), path)


def read_hdf5(path: str) -> Demonstrations:
    """Read an HDF5 file in the layout of D4RL and DSRL, which is the flat one of `read_npz`, or in the grid layout.

    A last episode without an end mark counts as an episode that was cut, as long as what is there of it.
    """
    return _from_arrays(_read(path, _hdf5_arrays), path)


def read_minari(dataset: str, *, episodes: int | None = None) -> Demonstrations:
    """Read a Minari data set: a local id (below MINARI_DATASETS_PATH), or the path of its folder. Nothing is downloaded.

    Actions are rescaled from the bounds of the data set's action space to [-1, 1], as `make_environment` does with the environment.
    Only the first `episodes` are read. Costs are what every step's info has as `cost`, if all have it.
    """
    data = _open_minari(dataset)
    name, space = f"{MINARI}{dataset}", data.action_space
    for kind, each in {"observation": data.observation_space, "action": space}.items():
        if type(each).__name__ != "Box" or len(each.shape) != 1:
            raise ValueError(f"{name}: the {kind} space must be a Box with one dimension, got {each}")
    if episodes is not None and episodes > data.total_episodes:
        raise ValueError(f"{name} has {data.total_episodes} episodes, asked for {episodes}: ask for fewer or give more demonstrations")
    parts = list(data.iterate_episodes(range(data.total_episodes if episodes is None else episodes)))
    if not parts:
        raise ValueError(f"{name} holds no steps: give a data set with at least one episode")
    actions = np.concatenate([each.actions for each in parts])
    if np.isfinite([space.low, space.high]).all() and not (np.all(space.low == -1) and np.all(space.high == 1)):
        actions = 2 * (actions - space.low) / (space.high - space.low) - 1
    costs = [np.asarray(each.infos["cost"])[-len(each.actions) :] for each in parts if "cost" in (each.infos or {})]  # after the reset's
    finals = [each.observations[len(each.actions)] for each in parts if len(each.observations) > len(each.actions)]
    return Demonstrations(
        np.concatenate([each.observations[: len(each.actions)] for each in parts]),
        actions,
        np.concatenate([each.rewards for each in parts]),
        np.cumsum([0, *(len(each.actions) for each in parts)]),
        name,
        costs=np.concatenate(costs) if len(costs) == len(parts) else None,
        terminated=np.array([each.terminations[-1] for each in parts]),
        finals=np.stack(finals) if len(finals) == len(parts) else None,
    )


def _open_minari(dataset: str) -> Any:
    import minari

    folder = Path(dataset)
    try:
        if folder.is_dir():
            return minari.MinariDataset(folder / "data" if (folder / "data").is_dir() else folder)
        return minari.load_dataset(dataset)
    except FileNotFoundError:
        raise FileNotFoundError(f"no Minari data set {dataset!r} on this machine: run `minari download {dataset}`, or give its folder") from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{MINARI}{dataset} is damaged or no Minari data set: {_line(error)}") from None


def _npz_arrays(path: str) -> dict[str, NDArray[Any]]:
    with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name in _ARRAYS}


def _hdf5_arrays(path: str) -> dict[str, NDArray[Any]]:
    import h5py

    with h5py.File(path, "r") as file:
        return {name: file[name][()] for name in _ARRAYS if isinstance(file.get(name), h5py.Dataset)}


_ARRAYS = ("observations", "actions", "rewards", "costs", "terminals", "timeouts", "next_observations", "terminated", "finals")


def _read(path: str, arrays: Callable[[str], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    if not Path(path).is_file():
        folder = Path(path).parent
        close = difflib.get_close_matches(Path(path).name, [each.name for each in folder.glob("*")], n=1) if folder.is_dir() else []
        hint = f"did you mean {str(folder / close[0])!r}?" if close else f"the current directory is {Path.cwd()}"
        raise FileNotFoundError(f"no demonstration file {path!r}: {hint}")
    try:
        return arrays(path)
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no {Path(path).suffix} archive of plain arrays: {_line(error)}") from None


def _from_arrays(arrays: Mapping[str, NDArray[Any]], source: str) -> Demonstrations:
    missing = {"observations", "actions", "rewards"} - set(arrays)
    if missing:
        raise ValueError(f"{source}: missing array {', '.join(map(repr, sorted(missing)))}; it has {sorted(arrays)}")
    if arrays["observations"].ndim == 3:
        return _from_grid(arrays, source)
    starts = _starts(arrays, source)
    given = {name: arrays[name] for name in ("observations", "actions", "rewards", "costs") if name in arrays}
    ends, marks = starts[1:] - 1, arrays.get("terminals")
    terminated = np.zeros(len(ends), bool) if marks is None else marks.reshape(-1)[ends].astype(bool)
    finals = _following(arrays, starts, source)[ends] if "next_observations" in arrays else None
    return Demonstrations(**given, starts=starts, source=source, terminated=terminated, finals=finals)


def _from_grid(arrays: Mapping[str, NDArray[Any]], source: str) -> Demonstrations:
    episodes, steps = arrays["observations"].shape[:2]
    flat = {}
    for name, dims in {"observations": 3, "actions": 3, "rewards": 2, "costs": 2}.items():
        if name in arrays:
            array = arrays[name]
            if array.ndim != dims or array.shape[:2] != (episodes, steps):
                raise ValueError(f"{source}: observations are {episodes} episodes of {steps} steps, but array {name!r} has shape {array.shape}")
            flat[name] = array.reshape(-1, *array.shape[2:])
    ends = {name: arrays[name] for name in ("terminated", "finals") if name in arrays}
    return Demonstrations(**flat, starts=np.arange(0, episodes * steps + 1, max(steps, 1)), source=source, **ends)


def _starts(arrays: Mapping[str, NDArray[Any]], source: str) -> NDArray[np.int64]:
    steps = len(arrays["observations"]) if arrays["observations"].ndim else 0
    marks = {name: arrays[name].reshape(-1).astype(bool) for name in ("terminals", "timeouts") if name in arrays}
    if not marks:
        raise ValueError(f"{source}: missing array 'terminals' or 'timeouts': flat demonstrations need the end of every episode")
    wrong = {name: len(mark) for name, mark in marks.items() if len(mark) != steps}
    if wrong:
        raise ValueError(f"{source}: observations have {steps} steps, but the end marks have {wrong}")
    ends = np.flatnonzero(np.logical_or.reduce(list(marks.values()))) + 1
    return np.unique(np.concatenate([[0], ends, [steps]])).astype(np.int64)


def _following(arrays: Mapping[str, NDArray[Any]], starts: NDArray[np.int64], source: str) -> NDArray[Any]:
    """The observations after every step, which inside an episode must be those that the next step saw."""
    now, following = arrays["observations"], arrays["next_observations"]
    if following.shape != now.shape:
        raise ValueError(f"{source}: observations have shape {now.shape}, but array 'next_observations' has {following.shape}")
    apart = ~np.isclose(following[:-1], now[1:], rtol=1e-4, atol=1e-4).all(axis=1)
    apart[starts[1:-1] - 1] = False
    if apart.any():
        row = int(apart.argmax())
        where = f"row {row} ({apart.sum()} such rows)"
        raise ValueError(f"{source}: array 'next_observations' is not what the next step saw at {where}: mark where episodes end in 'timeouts'")
    return following


def _floats(array: NDArray[Any], name: str, dims: int, source: str) -> NDArray[np.float32]:
    array = np.asarray(array)
    if array.ndim != dims:
        want = "(steps, features)" if dims == 2 else "(steps,)"
        raise ValueError(f"{source}: array {name!r} must have shape {want}, got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{source}: array {name!r} must hold numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
