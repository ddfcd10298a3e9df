"""Rewards and costs at once: a skill for each on a policy of all data, and a gate trained on few safe demonstrations (arXiv 2502.05932, section 5.1).

python -m benchmarks.psec_safe --from-results     the table from benchmarks/results/psec_safe.jsonl, as it stands in docs/safe.md
python -m benchmarks.psec_safe                    what is missing there is trained and evaluated, row by row; stop and start it at will
python -m benchmarks.psec_safe --quick            one tiny cell of each row, to see that it runs

A result is one line of the results file: a task and a row such as `run/gate`, a training seed, and returns and costs of twenty test episodes.
Nothing is chosen by them: what was tuned was tuned on environment seeds from 20,000 on. The tasks are DSRL's BallRun and BallCircle without
Bullet, and CarRun and CarCircle in Bullet itself, which `make bullet` installs; the data are ours (demos/README.md): the paper's figures, for its
own data, stand beside ours for the order of the rows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

import compose as compose_entry
import skillbank as sb
import train as train_entry
from benchmarks import bullet_environment, stored
from benchmarks.example_safe import COST, CRITIC, NET, REWARD, SKILL, STEPS
from benchmarks.intervals import interval
from benchmarks.levels import ActionLevel, NoiseLevel, ParameterLevel
from benchmarks.psec_continual import tuned
from skillbank.load import skills_on_base
from skillbank.model import Model, ModelModule
from skillbank.models.critics import BestOf, Critic
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.recipe import run_key
from skillbank.report import markdown
from skillbank.tasks.offline import OfflineTask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "psec_safe.jsonl"
TASKS = {"run": "ball/run", "circle": "ball/circle", "car_run": "car/run", "car_circle": "car/circle"}
"""Names and configurations. The cars need Bullet."""
HJ = ("model.objective=hj", "model.discount=0.9")
SAMPLES = 16
"""Of which the best is taken."""


def feasibility_weights(value: Tensor, q: Tensor, advantage: Tensor) -> Tensor:
    """Weights of examples for one policy of both objectives, (B,) (arXiv 2401.10700).

    Where costs cannot be avoided any more, `exp(5 (V_h - Q_h))`, at most 150: what leads back counts. Elsewhere `exp(3 (Q - V))`, at most 100, of
    the actions that keep it so, and 0 of the others.

    Args:
        value: V_h, the safety value of the state, above 0 where costs cannot be avoided, (B,).
        q: Q_h, that of the action, (B,).
        advantage: Q - V of rewards, (B,).

    """
    back = (5 * (value - q)).exp().clamp(max=150)
    on = (3 * advantage).exp().clamp(max=100) * (q <= 0)
    return torch.where(value > 0, back, on)


class Feasible(nn.Module):
    """A critic of rewards and a safety value as one `Weighing`.

    Args:
        reward: of objective `reward`.
        safety: of objective `hj`.

    """

    def __init__(self, reward: Critic, safety: Critic) -> None:
        super().__init__()
        self.reward, self.safety = reward, safety

    def advantages(self, observation: Tensor, action: Tensor) -> Tensor:
        """Of rewards, (B,)."""
        return self.reward.advantages(observation, action)

    @torch.no_grad()
    def weights(self, observation: Tensor, action: Tensor) -> Tensor:
        """As `feasibility_weights`, (B,)."""
        value = self.safety.net["v"](observation).squeeze(-1)
        return feasibility_weights(value, value - self.safety.advantages(observation, action), self.advantages(observation, action))


@dataclass(frozen=True)
class Study:
    """One task and one training seed: everything that its rows are made of, kept in a bank and made once.

    Args:
        name: of the task, one of TASKS.
        seed: of all training.
        quick: train next to nothing.

    """

    name: str
    seed: int
    quick: bool = False
    used: dict[str, str] = field(default_factory=dict)
    """Hashes of what was asked for, by name."""

    @property
    def folder(self) -> Path:
        """Of everything."""
        return Path("runs/psec_safe") / ("quick" if self.quick else "full")

    @property
    def bullet(self) -> bool:
        """Whether the task needs Bullet."""
        return TASKS[self.name].startswith("car/")

    @property
    def bank(self) -> sb.Bank:
        """Where everything is kept."""
        return sb.Bank(self.folder / "bank")

    def conf(self, entry: str, *overrides: str) -> Any:
        """Resolved configuration of train.py or compose.py."""
        return stored.conf(entry, *overrides, *(stored.QUICK if self.quick else ()))

    def task(self, kind: str = "") -> OfflineTask:
        """The task with all data, or with the safe demonstrations (`_safe`)."""
        if self.bullet:
            bullet_environment.ensure_data(self.name)
        made: OfflineTask = instantiate(self.conf("train", f"task={TASKS[self.name]}{kind}").task, _convert_="all")
        made.max_steps = 20 if self.quick else None
        return made

    def load(self, ref: str) -> ModelModule:
        """Model of a version."""
        return sb.load(ref, self.bank)

    def made(self, name: str, kind: str, *overrides: str, entry: Callable[..., str] = train_entry.train) -> str:
        """Reference of a version, trained on all data or on the safe demonstrations (`_safe`) if it is not in the bank yet."""
        name = f"{name}/{self.name}/seed-{self.seed}"
        given = (f"task={TASKS[self.name]}{kind}", f"name={name}", f"seed={self.seed}", f"bank={self.bank.root}", "episodes=0")
        return stored.once(self.bank, name, lambda: entry(self.conf(entry.__name__, *given, *overrides)), self.used)

    def policy(self, name: str, kind: str, steps: int) -> str:
        """A policy trained from scratch."""
        return self.made(name, kind, *NET, f"fit.steps={steps}")

    def critic(self, name: str, *overrides: str) -> str:
        """A critic of all data."""
        return self.made(f"critic/{name}", "", *CRITIC, f"fit.steps={STEPS['critic']}", *overrides)

    def skill(self, name: str, kind: str, *overrides: str) -> str:
        """A skill on the policy of all data."""
        base = self.policy("base", "", STEPS["base"])
        return self.made(name, kind, *SKILL, f"base={base}", f"fit.steps={STEPS['skill']}", *overrides)

    def skills(self) -> list[str]:
        """Those for rewards and costs."""
        reward, cost = self.critic("reward", *REWARD), self.critic("cost", *COST)
        return [self.skill("reward", "", f"critic={reward}"), self.skill("cost", "", f"critic={cost}")]

    def composed(self, name: str, *overrides: str) -> ModelModule:
        """A composition of both skills."""
        return self.load(self.made(name, "_safe", f"skills=[{','.join(self.skills())}]", *overrides, entry=compose_entry.compose))

    # What the rows are. Each returns a model.

    def base(self) -> Model:
        """The policy of all data, untouched."""
        return self.load(self.policy("base", "", STEPS["base"]))

    def alone(self, which: int) -> Model:
        """One skill at the weight that it was trained with."""
        return self.load(self.skills()[which])

    def fixed(self, weights: str) -> Model:
        """Both skills at weights that were not tuned."""
        return self.load(
            self.made("fixed", "_safe", f"skills=[{','.join(self.skills())}]", "merge=stack", f"weights={weights}", entry=compose_entry.compose)
        )

    def tuned(self) -> Model:
        """Both skills at constant weights, chosen by the diffusion loss on held-out safe demonstrations."""
        _, model, skills, _ = skills_on_base(self.bank, self.skills())
        return tuned(model, skills, self.task("_safe"))

    def scratch(self) -> Model:
        """A policy of the safe demonstrations alone."""
        return self.load(self.policy("scratch", "_safe", STEPS["base"] // 2))

    def lora(self) -> Model:
        """A skill of the safe demonstrations on the policy of all data."""
        return self.load(self.skill("safe", "_safe"))

    def feasible(self) -> Model:
        """One policy whose examples are weighted by both critics."""
        critics = [self.critic("reward", *REWARD), self.critic("hj", *HJ)]
        reward, safety = (cast("Critic", self.load(ref)) for ref in critics)
        task = self.task()
        print(f"   effective sample size {task.weigh(Feasible(reward, safety)):.3f}", flush=True)
        conf = self.conf("train", *NET, f"fit.steps={STEPS['base']}")
        torch.manual_seed(self.seed)
        policy: DiffusionPolicy = instantiate(conf.model, **task.dimensions, _convert_="all")
        folder = self.folder / "feasible" / self.name / f"seed-{self.seed}" / run_key([self.bank.card(ref).hash for ref in critics], task.data)
        batches = task.batches(batch_size=conf.batch_size, seed=self.seed)
        sb.fit(policy, batches, policy.parameters(), steps=conf.fit.steps, lr=conf.fit.lr, seed=self.seed, folder=folder)
        return policy

    def gate(self, regulariser: str) -> ModelModule:
        """A gate over both skills, trained on the safe demonstrations."""
        return self.composed(f"gate-{regulariser}", "gate=mlp", f"regulariser={regulariser}", f"fit.steps={STEPS['gate']}")

    def level(self, kind: Callable[..., Any], label: str, temperature: float | None = None) -> Model:
        """NSEC, ASEC and PSEC with their loss: a gate trained on the squared error of the sampled action, in batches of 64."""
        _, model, skills, refs = skills_on_base(self.bank, self.skills())
        policy = cast("DiffusionPolicy", model)
        policy.temperature = temperature or policy.temperature
        torch.manual_seed(self.seed)
        level, task = kind(policy, skills), self.task("_safe")
        batches = task.batches(batch_size=64, seed=self.seed)
        cast("sb.MLPGate", level.gate).standardise(torch.cat([batch["observation"] for batch in islice(batches(0), 40)]))
        steps = 3 if self.quick else STEPS["gate"]
        made_from = run_key([self.bank.card(ref).hash for ref in refs], task.data)
        folder = self.folder / label / self.name / f"seed-{self.seed}" / made_from
        options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "ema": None}
        sb.fit(level, batches, level.gate.parameters(), steps=steps, seed=self.seed, folder=folder, **options)
        return level

    def hot(self, gated: bool) -> Model:
        """At the sampler's temperature of the paper, 1; the other rows are at 0.5."""
        model: Any = self.gate("none") if gated else self.base()
        (model.model if gated else model).temperature = 1.0
        return cast("Model", model)

    def best(self, gated: bool) -> Model:
        """The least dangerous of several actions, by the critic of costs."""
        model = self.gate("none") if gated else cast("ModelModule", self.base())
        return BestOf(model, cast("Critic", self.load(self.critic("cost", *COST))), SAMPLES)


@dataclass(frozen=True)
class Row:
    """What stands in the table.

    Args:
        label: what the table calls it.
        model: makes it.
        paper: normalised return and cost in the paper's table, of each task.

    """

    label: str
    model: Callable[[Study], Model]
    paper: tuple[str, str, str, str] = ("", "", "", "")


ROWS = {
    "base": Row("policy of all data", Study.base, ("0.67 / 11.38", "0.72 / 10.02", "0.96 / 1.88", "0.65 / 11.16")),
    "reward": Row("reward skill alone", partial(Study.alone, which=0)),
    "cost": Row("cost skill alone", partial(Study.alone, which=1)),
    "half": Row("both skills, half each", partial(Study.fixed, weights="[0.5,0.5]")),
    "tuned": Row("both skills, weights tuned on validation loss", Study.tuned),
    "feasible": Row("one policy, weighted as in FISOR", Study.feasible),
    "scratch": Row("safe demonstrations alone", Study.scratch),
    "lora": Row("LoRA of the safe demonstrations", Study.lora),
    "asec": Row("composed actions of base and skills", partial(Study.level, kind=ActionLevel, label="asec")),
    "nsec": Row("composed noise of base and skills", partial(Study.level, kind=NoiseLevel, label="nsec")),
    "asec-two": Row(
        "composed actions of both skills (ASEC)",
        partial(Study.level, kind=partial(ActionLevel, base=False), label="asec-two"),
        ("0.35 / 4.35", "0.54 / 1.58", "0.93 / 0.39", "0.41 / 2.86"),
    ),
    "nsec-two": Row(
        "composed noise of both skills (NSEC)",
        partial(Study.level, kind=partial(NoiseLevel, base=False), label="nsec-two"),
        ("0.58 / 7.46", "0.58 / 2.08", "0.93 / 0.66", "0.40 / 2.62"),
    ),
    "gate": Row(
        "gate over both skills (PSEC)",
        partial(Study.gate, regulariser="none"),
        ("0.15 / 0.95", "0.34 / 0.22", "0.83 / 0.00", "0.36 / 0.20"),
    ),
    "gate-action": Row("the same, trained on the sampled action", partial(Study.level, kind=ParameterLevel, label="gate-action")),
    "gate-mean": Row("the same, regulariser *mean*", partial(Study.gate, regulariser="mean")),
    "gate-code": Row("the same, regulariser *code*", partial(Study.gate, regulariser="code")),
    "base-hot": Row("policy of all data, temperature 1", partial(Study.hot, gated=False)),
    "gate-hot": Row("gate, temperature 1", partial(Study.hot, gated=True)),
    "asec-hot": Row(
        "ASEC, temperature 1, in training as well", partial(Study.level, kind=partial(ActionLevel, base=False), label="asec-hot", temperature=1.0)
    ),
    "nsec-hot": Row(
        "NSEC, temperature 1, in training as well", partial(Study.level, kind=partial(NoiseLevel, base=False), label="nsec-hot", temperature=1.0)
    ),
    "base-best": Row(f"policy of all data, best of {SAMPLES} by cost", partial(Study.best, gated=False)),
    "gate-best": Row(f"gate, best of {SAMPLES} by cost", partial(Study.best, gated=True)),
}


def compute(study: Study, row: str, episodes: int = 20) -> dict[str, Any]:
    """Train what the row needs, run its test episodes and return its result."""
    started = time.time()
    task = study.task("_safe")
    model = ROWS[row].model(study)
    trained = time.time() - started
    rollout = task.rollout(model, episodes=episodes)
    assert rollout.costs is not None
    return {
        "name": f"{study.name}/{row}",
        "seed": study.seed,
        "returns": [round(float(each), 1) for each in rollout.returns],
        "costs": [int(each) for each in rollout.costs],
        "seconds": round(trained, 1),
        "steps": STEPS,
        "data": {Path(name).name: digest[:16] for name, digest in {**study.task().data, **task.data}.items()},
        "made_of": study.used,
        "threads": torch.get_num_threads(),
        **stored.where(),
    }


def shown(per_seed: list[list[float]]) -> str:
    """Mean over all, with an interval from three seeds on."""
    mean = sum(map(sum, per_seed)) / sum(map(len, per_seed))
    return f"{mean:.2f}" + (" ({:.2f}..{:.2f})".format(*interval(per_seed)) if len(per_seed) >= 3 else "")


def table(results: list[dict[str, Any]]) -> str:
    """Normalised returns and costs, and the share of the episodes that keep the limit; the paper's figures beside them."""
    lines = []
    tasks = {name: Study(name, 0).conf("train", f"task={TASKS[name]}").task for name in TASKS}
    for (i, name), (row, about) in itertools.product(enumerate(TASKS), ROWS.items()):
        found = sorted((each for each in results if each["name"] == f"{name}/{row}"), key=lambda each: each["seed"])
        if found:
            conf = tasks[name]
            low, high = conf.return_range
            returns = [[(each - low) / (high - low) for each in result["returns"]] for result in found]
            costs = [[each / conf.cost_limit for each in result["costs"]] for result in found]
            kept = [float(each <= conf.cost_limit) for result in found for each in result["costs"]]
            figures = {"return": shown(returns), "cost": shown(costs), "safe": f"{sum(kept) / len(kept):.2f}", "seeds": len(found)}
            lines.append({"": f"{name}: {about.label}", **figures, "paper": about.paper[i]})
    return markdown(lines) if lines else "no results yet"


def cells(options: argparse.Namespace) -> Iterator[tuple[Study, str]]:
    """Everything that there is to compute."""
    for seed, name, row in itertools.product(options.seeds, options.tasks, options.rows):
        yield Study(name, seed, options.quick), row


def read_results() -> list[dict[str, Any]]:
    """Stored results."""
    return stored.so_far(RESULTS)


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "one cell of each row with a few steps")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    stored.study_options(parser, ROWS, 3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.chdir(ROOT)
    results = read_results()
    if options.quick:
        shutil.rmtree("runs/psec_safe/quick", ignore_errors=True)
        results = [compute(Study(options.tasks[0], 0, quick=True), row, episodes=2) for row in options.rows]
    elif not options.from_results:
        done = {(each["name"], each["seed"]) for each in results}
        missing = [(study, row) for study, row in cells(options) if (f"{study.name}/{row}", study.seed) not in done]
        if any(study.bullet for study, _ in missing):
            try:
                bullet_environment.python()
            except ImportError as error:
                parser.error(f"{error}, or leave out the cars: --tasks run circle")
        wanted = ((f"{study.name}/{row}", study.seed, partial(compute, study, row)) for study, row in missing)
        stored.complete(RESULTS, wanted, lambda row: f"{sum(row['returns']) / 20:.0f}, cost {sum(row['costs']) / 20:.1f}")
        results = read_results()
    print(table(results))


if __name__ == "__main__":
    main()
