"""Imitation of demonstrations, judged by the return in the environment: the control `Task`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skillbank.model import Batch, Batches, Model, Recorded, shown
from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations
from skillbank.tasks.examples import Examples, Rehearsal

if TYPE_CHECKING:
    from skillbank.tasks.rollouts import Rollout

__all__ = ["ControlTask", "summary"]

EPISODES_PER_SEED = 1000


class ControlTask:
    """Clone the first episodes of some demonstrations, and be judged by the return in an environment.

    Evaluation episode i of seed s runs in the environment seeded `1000 * s + i`. Seeds 0 to 19 are for testing. Seeds from 20 on (environment
    seeds from 20,000) are for development: whatever is chosen by looking at returns is chosen there, and these returns are never reported.

    Args:
        name: what the skill is called, e.g. `walker/walk`.
        demonstrations: file, folder or data set, see `load_demonstrations`.
        environment: id, see `make_environment`.
        episodes: train on the first this many; None on all but the held-out ones.
        held_out: the next this many, after the training episodes, are for validation and never trained on.
        horizon: H, actions per example; where an episode ends, its last action is repeated.
        execute: actions of a prediction that are executed before the next one; None executes all.
        evaluation_episodes: episodes per evaluation, at most 1000.
        max_steps: stop evaluation episodes here; None waits for their end.
        seed: added to the seed of every evaluation.
        observation_noise: Gaussian noise on the observations of training batches; every example draws its level uniformly between 0 and this
            many standard deviations of each feature over the training demonstrations.
        balance: draw each training step with probability proportional to the distance to its 5th nearest neighbour to this power (features in
            standard deviations, distances clipped to [0.1, 1]), so that rare transients count more than the cycle that they lead to; 0 draws
            all steps alike.
        mirror: a symmetry of the environment as two permutations, `{"observation": [...], "action": [...]}`; half of the examples of a training
            batch, at random, are seen in the mirror.
        rehearsal: examples of an old task that are in every training batch as well, as arguments of `Rehearsal`.

    Raises:
        FileNotFoundError: there are no such demonstrations.
        ValueError: unreadable or unsuitable demonstrations, fewer episodes than asked for, or numbers out of range.

    """

    def __init__(
        self,
        *,
        name: str,
        demonstrations: str,
        environment: str,
        episodes: int | None = None,
        held_out: int = 0,
        horizon: int = 1,
        execute: int | None = None,
        evaluation_episodes: int = 10,
        max_steps: int | None = None,
        seed: int = 0,
        observation_noise: float = 0.0,
        balance: float = 0.0,
        mirror: Mapping[str, Sequence[int]] | None = None,
        rehearsal: Mapping[str, Any] | None = None,
    ) -> None:
        if horizon < 1 or held_out < 0 or seed < 0 or observation_noise < 0 or balance < 0 or (episodes is not None and episodes < 1):
            given = f"{horizon=}, {held_out=}, {seed=}, {observation_noise=}, {balance=}, {episodes=}"
            raise ValueError(f"task {name!r}: horizon and episodes must be at least 1, the others at least 0, got {given}")
        self.name, self.environment, self.horizon, self.execute = name, environment, horizon, execute
        self.evaluation_episodes, self.max_steps, self.seed = evaluation_episodes, max_steps, seed
        everything = load_demonstrations(demonstrations, episodes=None if episodes is None else episodes + held_out)
        if len(everything) <= held_out:
            raise ValueError(f"task {name!r}: {demonstrations} has {len(everything)} episodes, nothing is left beside held_out={held_out}")
        self.demonstrations = everything.episodes(len(everything) - held_out)
        """What is trained on."""
        self.held_out = everything.episodes(slice(len(everything) - held_out, None)) if held_out else None
        """What validates."""
        self._examples = self._examples_of(self.demonstrations, balance=balance, mirror=mirror)
        self._rehearsal = None if rehearsal is None else Rehearsal(self._examples, **rehearsal)
        self._noise = observation_noise * torch.from_numpy(self.demonstrations.observations.std(0))

    def __repr__(self) -> str:
        """One line: name, environment, demonstrations."""
        return f"ControlTask({self.name!r}, {self.environment!r}, {self.demonstrations!r})"

    @property
    def observation_dim(self) -> int:
        """D."""
        return int(self.demonstrations.observations.shape[1])

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self.demonstrations.actions.shape[1])

    @property
    def dimensions(self) -> dict[str, int]:
        """D and A under the names that models take them by."""
        return {"observation_dim": self.observation_dim, "action_dim": self.action_dim}

    @property
    def data(self) -> dict[str, str]:
        """SHA-256 of everything that is trained on, by source: the demonstrations and what is rehearsed."""
        rehearsed = [] if self._rehearsal is None else [self._rehearsal.demonstrations]
        return {each.source: each.hash for each in (self.demonstrations, *rehearsed)}

    def batches(self, *, batch_size: int, seed: int) -> Batches:
        """Endless training batches on the CPU: observation (B, D), action (B, H, A), drawn with replacement.

        The batch of step i depends on (seed, i) alone.

        Raises:
            ValueError: a batch size below 1 or a negative seed.

        """
        if batch_size < 1 or seed < 0:
            raise ValueError(f"task {self.name!r}: batches need a batch size of at least 1 and a seed of at least 0, got {batch_size=}, {seed=}")

        old = self._rehearsal
        count_old = 0 if old is None else round(old.share * batch_size)

        def stream(start: int) -> Iterator[Batch]:
            for step in count(start):
                generator = np.random.Generator(np.random.Philox(key=seed, counter=step << 192))
                batch = self._examples.draw(batch_size - count_old, generator)
                if old is not None:
                    drawn = old.examples.draw(count_old, generator)
                    batch = {key: torch.cat([batch[key], drawn[key]]) for key in batch}
                yield self._augmented(batch, generator)

        return stream

    def _examples_of(self, demonstrations: Demonstrations, **options: Any) -> Examples:
        return Examples(demonstrations, self.horizon, **options)

    def _augmented(self, batch: dict[str, Tensor], generator: np.random.Generator) -> Batch:
        if self._noise.any():
            rows, features = batch["observation"].shape
            level = torch.from_numpy(generator.random((rows, 1), np.float32))
            batch["observation"] = batch["observation"] + level * self._noise * torch.from_numpy(
                generator.standard_normal((rows, features), np.float32)
            )
        return batch

    def validation(self, *, batch_size: int) -> Iterator[Batch]:
        """One pass over the held-out steps in their order; the last batch may be smaller.

        Raises:
            ValueError: nothing is held out.

        """
        if self.held_out is None:
            raise ValueError(f"task {self.name!r} has no held-out demonstrations: set held_out to the number of episodes that validate")
        examples = self._examples_of(self.held_out)
        return (examples.batch(rows) for rows in torch.split(torch.arange(len(examples)), batch_size))

    def rollout(self, model: Model, *, seed: int = 0, episodes: int | None = None, record: int | None = None, frame_every: int = 10) -> Rollout:
        """Run the evaluation episodes of `seed`, and record one of them (by its position) if asked to.

        Args:
            model: the policy.
            seed: which episodes, see the class.
            episodes: run the first this many; None runs `evaluation_episodes`.
            record: position of the episode to record.
            frame_every: steps per recorded frame; 0 records no frames.

        Raises:
            ValueError: the demonstrations, the environment and the model differ in size, or the actions are not finite.

        """
        from skillbank.tasks.rollouts import rollout

        self.check_environment()
        seeds = self.environment_seeds(seed, episodes)
        return rollout(model, self.environment, seeds, execute=self.execute, max_steps=self.max_steps, record=record, frame_every=frame_every)

    def check_environment(self) -> None:
        """Check that the environment is there and of the sizes of the demonstrations.

        Raises:
            ValueError: it is not.

        """
        from skillbank.tasks.environments import environment_sizes

        sizes = environment_sizes(self.environment)
        if sizes != (self.observation_dim, self.action_dim):
            mine = f"{self.demonstrations.source} has {self.observation_dim} and {self.action_dim}"
            raise ValueError(f"environment {self.environment!r} has {sizes[0]} observations and {sizes[1]} actions, but {mine}: they must be equal")

    def environment_seeds(self, seed: int = 0, episodes: int | None = None) -> list[int]:
        """Environment seeds of the evaluation episodes of `seed`; fewer episodes are a prefix of more."""
        number = self.evaluation_episodes if episodes is None else episodes
        if not 1 <= number <= EPISODES_PER_SEED or seed < 0:
            raise ValueError(
                f"task {self.name!r}: an evaluation takes 1 to {EPISODES_PER_SEED} episodes and a seed of at least 0, got {number}, {seed}"
            )
        first = EPISODES_PER_SEED * (self.seed + seed)
        return list(range(first, first + number))

    def evaluate(self, model: Model, *, seed: int = 0, episodes: int | None = None) -> dict[str, float]:
        """Return statistics of the evaluation episodes of `seed`, see `summary`."""
        return summary(self.rollout(model, seed=seed, episodes=episodes).returns)

    def record(self, model: Model) -> Recorded:
        """An episode from where its first evaluation episode starts, with other noise of the sampler: frames, rewards, and weights if it has a gate.

        Where nothing can be rendered (a machine without OpenGL) there are no frames, and a line on stderr says why.
        """
        try:
            rollout = self.rollout(model, episodes=1, record=0)
        except Exception as error:  # whatever the OpenGL driver raises
            sys.stderr.write(f"no video: rendering failed ({type(error).__name__}: {error}); with a display or EGL, set MUJOCO_GL\n")
            rollout = self.rollout(model, episodes=1, record=0, frame_every=0)
        episode = rollout.recording
        assert episode is not None
        weights = shown(model, {"observation": torch.from_numpy(episode.observations)})
        return Recorded(weights, episode.rewards, episode.frames if len(episode.frames) else None, episode.every)


def summary(returns: NDArray[np.float64]) -> dict[str, float]:
    """Mean, standard deviation, interquartile mean, minimum, maximum and number of returns (E,)."""
    ordered = np.sort(returns)
    cut = len(ordered) // 4
    return {
        "return": float(ordered.mean()),
        "return_std": float(ordered.std()),
        "return_iqm": float(ordered[cut : len(ordered) - cut].mean()),
        "return_min": float(ordered[0]),
        "return_max": float(ordered[-1]),
        "episodes": float(len(ordered)),
    }
