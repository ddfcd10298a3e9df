"""Experts and demonstrations under a shift of dynamics (arXiv 2502.05932, section 5.3), made anew: SAC in changed and unchanged HalfCheetahs.

make experts                                                       an environment of its own (.venv-experts): JAX and its versions stay out of .venv
.venv-experts/bin/python -m benchmarks.dynamics_data               train what is missing, then write the sets to demos/dynamics
.venv-experts/bin/python -m benchmarks.dynamics_data --record --experts target     write these sets from what is trained so far
.venv-experts/bin/python -m benchmarks.dynamics_data --body walker2d

Training goes in rounds of 5,000 steps with a checkpoint and the whole replay buffer after each, under runs/dynamics: stop and start it at will;
larger --steps or --goal go on from there. It stops when the mean return of two deterministic episodes reaches the goal, or at the step budget.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skillbank.tasks.environments import Environment, make_environment

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/dynamics")
DEMONSTRATIONS = Path("demos/dynamics")
BODIES: dict[str, tuple[str, dict[str, float]]] = {
    "halfcheetah": ("HalfCheetah-v5", {"friction": 0.25, "gravity": 2, "thigh": 2}),
    "walker2d": ("Walker2d-v4", {"friction": 0.5, "gravity": 2, "thigh": 2}),
}
"""Target and factors of the sources. HalfCheetah-v5 moves and is rewarded as -v4; of Walker2d it is -v4 itself: -v5 has other feet and rewards."""

ROUND = 5000
EPISODES = 20
"""Of a source; a target set has half as many."""

TEST, SHOWN = 30_000, 40_000
"""First seeds of episodes that stop training, and of those that are recorded."""

Episode = dict[str, NDArray[Any]]
"""observations (T, D), actions (T, A), rewards (T,), finals (D,): what the last step led to, terminated ()."""


class Expert:
    """SAC in one environment, on disk: a checkpoint per round, what it reached, and the replay buffer of the newest.

    Args:
        name: `<body>/target` or `<body>/<change>`.
        seed: of its training.

    """

    def __init__(self, name: str, seed: int = 0) -> None:
        body, _, kind = name.partition("/")
        plain, changes = BODIES[body]
        self.name, self.seed, self.folder = name, seed, RUNS / name
        self.environment = plain if kind == "target" else f"{plain}?{kind}={changes[kind]:g}"

    @property
    def reached(self) -> dict[int, float]:
        """Mean return of every checkpoint, by its steps."""
        file = self.folder / "evaluations.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {row["steps"]: row["return"] for row in rows}

    def agent(self, steps: int, *, buffer: bool = False) -> Any:
        """A checkpoint, if asked to with what it had seen; at 0 steps a new agent.

        Settings are the usual ones but for what saves time: batches of 128, eight updates at once, the actor in every second, and an entropy
        coefficient that starts at 0.1 (from 1, it took 30,000 steps to fall out of the way).
        """
        from sbx import SAC

        env = make_environment(self.environment)
        if not steps:
            fast: dict[str, Any] = {"batch_size": 128, "train_freq": 8, "gradient_steps": 8, "policy_delay": 2, "ent_coef": "auto_0.1"}
            return SAC("MlpPolicy", env, seed=self.seed, buffer_size=500_000, learning_starts=ROUND, **fast)
        agent = SAC.load(self.folder / f"{steps:07d}.zip", env=env)
        if buffer:
            agent.load_replay_buffer(self.folder / "buffer.pkl")
            agent.replay_buffer.pos, agent.replay_buffer.full = steps, False  # killed between the buffer and its row, a round more was there
        return agent

    def train(self, steps: int, goal: float) -> None:
        """Go on to the goal or the budget."""
        if self._done(steps, goal):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        agent, env = self.agent(max(self.reached, default=0), buffer=True), make_environment(self.environment)
        while not self._done(steps, goal):
            started = time.time()
            agent.learn(ROUND, reset_num_timesteps=False)
            rate = ROUND / (time.time() - started)
            returns = [episode(agent, env, seed=TEST + i, deterministic=True)["rewards"].sum() for i in range(2)]
            agent.save(self.folder / f"{agent.num_timesteps:07d}.zip")
            agent.save_replay_buffer(self.folder / "new.pkl")
            os.replace(self.folder / "new.pkl", self.folder / "buffer.pkl")
            row = {"steps": agent.num_timesteps, "return": round(float(np.mean(returns)), 1), "steps_per_second": round(rate)}
            with (self.folder / "evaluations.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(self.name, row, flush=True)

    def _done(self, steps: int, goal: float) -> bool:
        return max(self.reached, default=0) >= steps or max(self.reached.values(), default=-np.inf) >= goal

    def best(self, at_least: float = np.inf) -> int:
        """Steps of the first checkpoint with this return, or else of the one with the highest."""
        reached = self.reached
        return next((steps for steps, each in reached.items() if each >= at_least), max(reached, key=reached.__getitem__))

    def episodes(self, steps: int, count: int, *, deterministic: bool) -> list[Episode]:
        """Play some episodes."""
        agent, env = self.agent(steps), make_environment(self.environment)
        return [episode(agent, env, seed=SHOWN + i, deterministic=deterministic) for i in range(count)]

    def seen(self, steps: int, count: int) -> list[Episode]:
        """Some of the whole episodes that it was trained on up to a checkpoint, drawn at random."""
        buffer = self.agent(max(self.reached), buffer=True).replay_buffer
        arrays = {name: getattr(buffer, name)[:steps, 0] for name in ("observations", "actions", "rewards", "next_observations", "dones", "timeouts")}
        joined = np.isclose(arrays["next_observations"][:-1], arrays["observations"][1:]).all(axis=1)
        ends = np.flatnonzero(np.append(~joined, True) | (arrays["dones"] > 0)) + 1
        found = []
        for first, last in zip([0, *ends], ends, strict=False):
            if arrays["dones"][last - 1]:
                part = {name: np.float32(arrays[name][first:last]) for name in ("observations", "actions", "rewards")}
                terminated = np.array(not arrays["timeouts"][last - 1])
                found.append({**part, "finals": np.float32(arrays["next_observations"][last - 1]), "terminated": terminated})
        return [found[i] for i in np.random.default_rng(self.seed).permutation(len(found))[:count]]


def episode(agent: Any, env: Environment, *, seed: int, deterministic: bool) -> Episode:
    """One episode; without an agent, of uniformly random actions."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps = []
    ended = terminated = False
    while not ended:
        action = env.action_space.sample() if agent is None else agent.predict(np.float32(observation), deterministic=deterministic)[0]
        following, reward, terminated, truncated, _ = env.step(action)
        steps.append((observation, action, reward))
        observation, ended = following, terminated or truncated
    names = ("observations", "actions", "rewards")
    found = {name: np.array(each, np.float32) for name, each in zip(names, zip(*steps, strict=True), strict=True)}
    return {**found, "finals": np.asarray(observation, np.float32), "terminated": np.array(terminated)}


def write(path: Path, episodes: list[Episode]) -> dict[str, Any]:
    """Write a set in the grid layout, or in the flat one if lengths differ, and say what it is.

    A grid of equal episodes has their `finals` (E, D) and `terminated` (E,); the flat layout has next_observations, terminals and timeouts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if len({len(each["rewards"]) for each in episodes}) == 1:
        arrays = {name: np.stack([each[name] for each in episodes]) for name in episodes[0]}
    else:
        arrays = {name: np.concatenate([each[name] for each in episodes]) for name in ("observations", "actions", "rewards")}
        arrays["next_observations"] = np.concatenate([np.vstack([each["observations"][1:], each["finals"][None]]) for each in episodes])
        last = np.concatenate([np.arange(len(each["rewards"])) == len(each["rewards"]) - 1 for each in episodes])
        terminated = np.concatenate([np.full(len(each["rewards"]), each["terminated"]) for each in episodes])
        arrays["terminals"], arrays["timeouts"] = last & terminated, last & ~terminated
    np.savez_compressed(path, allow_pickle=False, **arrays)
    returns = [round(float(each["rewards"].sum()), 1) for each in episodes]
    found = {"episodes": len(episodes), "steps": sum(len(each["rewards"]) for each in episodes), "mean_return": round(float(np.mean(returns)), 1)}
    return {**found, "returns": returns, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def record(body: str, kinds: Sequence[str], seed: int) -> None:
    """Write the sets of some experts, and the manifest.

    Sources are deterministic. Of the target, as in D4RL (arXiv 2004.07219): *medium* samples the first checkpoint at a third of the expert's score,
    *medium-replay* is what that one was trained on, and in *medium-expert* episodes of it and of the expert take turns. *unshifted* is what a source
    would be if nothing had changed and nobody knew better than the data: that checkpoint again, deterministic.
    """
    folder = DEMONSTRATIONS / body
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text()) if file.exists() else {"sets": {}}
    packages = ("gymnasium", "mujoco", "numpy", "sbx-rl", "stable_baselines3", "jax")
    manifest["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    for kind in kinds:
        expert = Expert(f"{body}/{kind}", seed)
        best = expert.best()
        about = {"environment": expert.environment, "training_seed": seed, "episode_seeds_from": SHOWN}
        if kind != "target":
            made = write(folder / f"{kind}.npz", expert.episodes(best, EPISODES, deterministic=True))
            manifest["sets"][kind] = {**about, "policy": "mean", "checkpoints": [best], **made}
            continue
        env, half = make_environment(expert.environment), EPISODES // 2
        random = [episode(None, env, seed=SHOWN + i, deterministic=False)["rewards"].sum() for i in range(half)]
        top = [each["rewards"].sum() for each in expert.episodes(best, half, deterministic=True)]
        low, high = float(np.mean(random)), float(np.mean(top))
        manifest["references"] = {"random": round(low, 1), "expert": round(high, 1), "episodes": half, "expert_checkpoint": best}
        medium = expert.best(low + (high - low) / 3)
        played, shown = (expert.episodes(steps, half, deterministic=False) for steps in (medium, best))
        mixed = [each for pair in zip(played, shown, strict=True) for each in pair][:half]
        manifest["sets"]["unshifted"] = {**about, "policy": "mean", "checkpoints": [medium]} | write(
            folder / "unshifted.npz", expert.episodes(medium, EPISODES, deterministic=True)
        )
        sets = {"medium": (played, [medium]), "medium-replay": (expert.seen(medium, half), [medium]), "medium-expert": (mixed, [medium, best])}
        for name, (episodes, checkpoints) in sets.items():
            policy = "what it was trained on" if name == "medium-replay" else "sampled"
            manifest["sets"][name] = {**about, "policy": policy, "checkpoints": checkpoints, **write(folder / f"{name}.npz", episodes)}
    file.write_text(json.dumps(manifest, indent=1) + "\n")
    for name, made in manifest["sets"].items():
        print(f"{name}: {made['episodes']} episodes, mean return {made['mean_return']:.0f}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", choices=BODIES, default="halfcheetah")
    parser.add_argument("--experts", nargs="+", help="target or a change; all if nothing is given")
    parser.add_argument("--steps", type=int, default=100_000, help="budget of each")
    parser.add_argument("--goal", type=float, default=6000, help="return at which an expert is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="train no further")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    kinds = options.experts or ["target", *BODIES[options.body][1]]
    if not options.record:
        for kind in kinds:
            Expert(f"{options.body}/{kind}", options.seed).train(options.steps, options.goal)
    record(options.body, kinds, options.seed)


if __name__ == "__main__":
    main()
