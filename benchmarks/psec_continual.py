"""Continual policy shift on the DMC walker: S->W, S->R and S+W->R from few demonstrations, against the paper's table (arXiv 2502.05932).

python -m benchmarks.psec_continual --from-results     the table from benchmarks/results/psec_continual.jsonl; with --summary that of the README
python -m benchmarks.psec_continual                    what is missing there is trained and evaluated, row by row; stop and start it at will
python -m benchmarks.psec_continual --quick            one tiny cell, to see that it runs

A result row is one line of the results file: a name such as `S->W/det10/ours`, a training seed and the returns of ten test episodes. Nothing
is chosen by these returns: every recipe is fixed in conf/, and what was tuned was tuned on environment seeds from 20,000 on.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock
from hydra.utils import instantiate

import compose as compose_entry
import skillbank as sb
import train as train_entry
from benchmarks import stored
from benchmarks.intervals import interval
from benchmarks.levels import ActionLevel, NoiseLevel
from skillbank.load import skills_on_base
from skillbank.model import Model, ModelModule
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.recipe import run_key
from skillbank.report import markdown
from skillbank.tasks.control import ControlTask
from skillbank.tasks.demonstrations import load_demonstrations

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "psec_continual.jsonl"
BASE = "walker/stand"
SCENARIOS = {"S->W": ("walk", ("walk",)), "S->R": ("run", ("run",)), "S+W->R": ("run", ("walk", "run"))}
SETTINGS = {"det10": ("_deterministic", 10), "sto10": ("", 10), "sto3": ("", 3)}
MORE = {"det30": ("_deterministic_30", 30), **{f"sto{count}": ("_100", count) for count in (30, 50, 100)}}
"""Of `walk`, for benchmarks/psec_ablations.py."""
STEPS = {"walk": 4000, "run": 16000}
"""Of a skill of this library's recipe."""
Level = Callable[[DiffusionPolicy, list[sb.Skill]], torch.nn.Module]
PAPER = {
    ("S->W", "scratch"): 58.9,
    ("S->W", "asec"): 65.7,
    ("S->W", "nsec"): 320.9,
    ("S->W", "psec"): 688,
    ("S->R", "scratch"): 25.5,
    ("S->R", "asec"): 24.3,
    ("S->R", "nsec"): 38.5,
    ("S->R", "psec"): 221,
    ("S+W->R", "scratch"): 25.5,
    ("S+W->R", "asec"): 30.8,
    ("S+W->R", "nsec"): 39.4,
    ("S+W->R", "psec"): 247,
}
"""Means of the paper's table for 10 demonstrations; its data are TD3 experts' and not these."""


class Study:
    """One setting and one training seed: everything that its rows are made of, kept in a bank of its own and made once.

    Args:
        setting: of `SETTINGS` or `MORE`.
        seed: of all training.
        overrides: added to every training, for a quick run.

    """

    def __init__(self, setting: str, seed: int, overrides: tuple[str, ...] = ()) -> None:
        self.setting, self.seed, self.overrides = setting, seed, overrides
        self.used: dict[str, str] = {}  # hashes of what was asked for, by name
        self.folder = Path("runs/psec_continual") / ("quick" if overrides else "full")
        self.bank = sb.Bank(self.folder / "bank")
        with FileLock(self._ready()):
            self.bank.put(sb.Bank(ROOT / "adapters").get(BASE), BASE)

    def _ready(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / ".lock"

    def task_overrides(self, task: str) -> list[str]:
        """Hydra overrides that choose a task's demonstrations."""
        kind, count = (SETTINGS | MORE)[self.setting]
        given = [f"task=walker/{task}", f"task.demonstrations=demos/walker/{task}{kind}.npz", f"task.episodes={count}"]
        return given if self.setting in SETTINGS else [*given, "task.held_out=0"]

    def task(self, task: str) -> ControlTask:
        """The task with this setting's demonstrations, plain."""
        conf = stored.conf("train", *self.task_overrides(task), "experiment=paper")
        made: ControlTask = instantiate(conf.task, _convert_="all")
        return made

    def train(self, task: str, recipe: str, *more: str, base: str | None = BASE) -> str:
        """Reference of a skill (or of a policy from scratch, without a base), trained if it is not in the bank yet."""
        name = f"{recipe}/{self.setting}/seed-{self.seed}/{task}"
        overrides = [*self.task_overrides(task), f"name={name}", f"seed={self.seed}", f"bank={self.bank.root}", "episodes=0", *more]
        overrides += [f"base={base or 'null'}", *self.overrides]
        return self._once(name, "train", overrides, train_entry.train)

    def compose(self, scenario: str, recipe: str, skills: list[str], *more: str) -> str:
        """Reference of a composition."""
        name = f"{recipe}/{self.setting}/seed-{self.seed}/{scenario.lower().replace('->', '-to-').replace('+', '-')}"
        task = SCENARIOS[scenario][0]
        overrides = [*self.task_overrides(task), f"name={name}", f"seed={self.seed}", f"bank={self.bank.root}", "episodes=0", *more]
        overrides += [f"skills=[{','.join(skills)}]", *self.overrides]
        return self._once(name, "compose", overrides, compose_entry.compose)

    def _once(self, name: str, config: str, overrides: list[str], make: Callable[..., str]) -> str:
        return stored.once(self.bank, name, lambda: make(stored.conf(config, *overrides)), self.used)

    def load(self, ref: str, temperature: float = 1.0) -> ModelModule:
        """Model of a version, its sampler at the given temperature."""
        model = sb.load(ref, self.bank)
        policy: Any = model.model if isinstance(model, sb.Composed) else model
        policy.temperature = temperature
        return model

    # What the rows are. Each returns a model.

    def base(self, scenario: str) -> Model:
        """The base, untouched."""
        return self.load(BASE)

    def best_skill(self, scenario: str) -> Model:
        """The best that is there before the new skill is trained, untouched: our walk skill for S+W->R, otherwise the base."""
        return self.load(self.own_skills("S->W")[0], temperature=0.5) if scenario == "S+W->R" else self.load(BASE)

    def old_skill(self, scenario: str) -> Model:
        """The paper's recipe's older skill, untouched."""
        return self.load(self.paper_skills(scenario)[0])

    def scratch(self, scenario: str) -> Model:
        """The same network trained on the new demonstrations alone, as in the paper."""
        return self.load(self.train(SCENARIOS[scenario][0], "scratch", "experiment=paper", base=None))

    def lora(self, scenario: str) -> Model:
        """The new skill alone, trained as in the paper, at the weight that it was trained with."""
        return self.load(self.paper_skills(scenario)[-1])

    def fixed(self, scenario: str) -> Model:
        """Constant weights, chosen on a grid by the diffusion loss on held-out demonstrations."""
        policy, skills = self.apart(scenario)
        return tuned(cast("ModelModule", policy), skills, self.task(SCENARIOS[scenario][0]))

    def psec(self, scenario: str) -> Model:
        """The paper's recipe: raw linear gate from its official initialisation, 1,001 steps at batch 512, no regulariser (its continual runs)."""
        plain = ("task.observation_noise=0.0", "task.balance=0.0", "task.rehearsal=null")
        fit = ("fit.steps=1001", "fit.lr=3e-4", "+fit.schedule=constant", "batch_size=512")
        gate = ("gate=official", "standardise=false", *fit, *plain)
        return self.load(self.compose(scenario, "psec", self.paper_skills(scenario), *gate))

    def apart(self, scenario: str) -> tuple[DiffusionPolicy, list[sb.Skill]]:
        """The base, its sampler at the paper's temperature, and the skills of the paper's recipe, not on it yet."""
        _, model, skills, _ = skills_on_base(self.bank, self.paper_skills(scenario))
        policy = cast("DiffusionPolicy", model)
        policy.temperature = 1.0
        return policy, skills

    def untrained(self, scenario: str, kind: Level) -> Any:
        """A level over the base and the skills, its gate as it starts."""
        policy, skills = self.apart(scenario)
        torch.manual_seed(self.seed)
        return kind(policy, skills)

    def level(self, scenario: str, kind: Level, label: str, batch_size: int = 64) -> Model:
        """NSEC and ASEC: a gate over the base and the skills, trained on the squared error of the sampled action.

        A step samples with every member, so batches are of 64; the other rows' are of 256 and more.
        """
        level, task = self.untrained(scenario, kind), self.task(SCENARIOS[scenario][0])
        steps = 5 if self.overrides else 1001
        batches = task.batches(batch_size=8 if self.overrides else batch_size, seed=self.seed)
        made_from = run_key([self.bank.card(ref).hash for ref in self.paper_skills(scenario)], task.data, batch_size)
        folder = self.folder / label / self.setting / f"seed-{self.seed}" / scenario / made_from
        options: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.0, "ema": None}
        sb.fit(level, batches, level.gate.parameters(), steps=steps, seed=self.seed, folder=folder, **options)
        return cast("Model", level)

    def own_skills(self, scenario: str) -> list[str]:
        """Skills of this library's recipe, oldest first: the defaults of conf/ and `STEPS`, a later skill continuing from the earlier ones."""
        made: list[str] = []
        for task in SCENARIOS[scenario][1]:
            recipe = "ours" if not made else "ours-from-walk"
            made.append(self.train(task, recipe, f"start=[{','.join(made)}]", f"fit.steps={STEPS[task]}"))
        return made

    def ours(self, scenario: str) -> Model:
        """This library's recipe: the newest skill; for S+W->R it stands on the walk skill."""
        return self.load(self.own_skills(scenario)[-1], temperature=0.5)

    def ours_gate(self, scenario: str) -> Model:
        """The same skills under a gate that starts there and is trained on the same examples."""
        return self.load(self.compose(scenario, "ours-gate", self.own_skills(scenario), "gate=mlp"), temperature=0.5)

    def paper_skills(self, scenario: str) -> list[str]:
        """Skills of the paper's recipe, each trained from the base."""
        return [self.train(task, "paper", "experiment=paper") for task in SCENARIOS[scenario][1]]


ROWS: dict[str, Callable[[Study, str], Model]] = {
    "base": Study.base,
    "best-skill": Study.best_skill,
    "old-skill": Study.old_skill,
    "scratch": Study.scratch,
    "lora": Study.lora,
    "fixed": Study.fixed,
    "asec": partial(Study.level, kind=ActionLevel, label="ActionLevel"),
    "nsec": partial(Study.level, kind=NoiseLevel, label="NoiseLevel"),
    "psec": Study.psec,
    "ours": Study.ours,
    "ours-gate": Study.ours_gate,
}


def tuned(model: ModelModule, skills: list[sb.Skill], task: ControlTask) -> Model:
    """Skills at constant weights, chosen on a grid by the diffusion loss on held-out demonstrations."""
    levels = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    gate = sb.ConstantGate(task.observation_dim, len(skills))
    composed = sb.Composed(model, gate, skills)
    losses = {}
    for weights in itertools.product(levels, repeat=len(skills)):
        with torch.no_grad():
            gate.weights.copy_(torch.tensor(weights))
        losses[weights] = sb.validation_loss(composed, task.validation(batch_size=3000), repeats=2)
    best = min(losses, key=losses.__getitem__)
    with torch.no_grad():
        gate.weights.copy_(torch.tensor(best))
    print(f"   fixed weights {best}", flush=True)
    return composed


def trained(scenario: str, row: str) -> bool:
    """Whether anything of a row is trained, so that it has seeds; the best that is there before a first skill is the base."""
    return row != "base" and (row != "best-skill" or scenario == "S+W->R")


def cells(settings: list[str], seeds: list[int], rows: list[str]) -> Iterator[tuple[str, str, str, int]]:
    """(scenario, setting, row, seed) of everything that there is to compute."""
    for setting, seed, row, scenario in itertools.product(settings, seeds, rows, SCENARIOS):
        if (seed == 0 or trained(scenario, row)) and (row != "old-skill" or scenario == "S+W->R"):
            yield scenario, setting, row, seed


def read_results() -> list[dict[str, Any]]:
    """Stored result rows."""
    return stored.so_far(RESULTS)


def compute(
    scenario: str,
    setting: str,
    row: str,
    seed: int,
    overrides: tuple[str, ...] = (),
    episodes: int = 10,
    rows: Mapping[str, Callable[[Study, str], Model]] = ROWS,
) -> dict[str, Any]:
    """Train what the cell needs, run its test episodes and return its result row."""
    started = time.time()
    study = Study(setting, seed, overrides)
    task = study.task(SCENARIOS[scenario][0])
    task.max_steps = 20 if overrides else None
    model = rows[row](study, scenario)
    trained = time.time() - started
    rollout = task.rollout(model, episodes=episodes)
    return {
        "name": f"{scenario}/{setting}/{row}",
        "seed": seed,
        "returns": [round(float(each), 2) for each in rollout.returns],
        "mean": round(float(rollout.returns.mean()), 2),
        "seconds": round(trained, 1),
        "policy_ms": round(1e3 * rollout.policy_seconds, 3),
        "data": next(iter(task.data.values()))[:16],
        "made_of": study.used,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": stored.commit(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean, interquartile mean and, from three seeds on, interval per row; the paper's figure and the demonstrations' own return beside them."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in results:
        grouped[each["name"]].append(each)
    lines: list[dict[str, Any]] = []
    for setting, scenario in itertools.product(SETTINGS, SCENARIOS):
        for row in ROWS:
            found = sorted(grouped.get(f"{scenario}/{setting}/{row}", []), key=lambda each: each["seed"])
            if not found:
                continue
            returns = [each["returns"] for each in found]
            ordered = np.sort(np.concatenate(returns))
            cut = len(ordered) // 4
            sure = len(found) >= 3 or not trained(scenario, row)
            lines.append(
                {
                    "row": f"{scenario}/{setting}/{row}",
                    "mean": f"{ordered.mean():.0f}",
                    "95 %": "{:.0f}..{:.0f}".format(*interval(returns)) if sure else "",
                    "IQM": f"{ordered[cut : len(ordered) - cut].mean():.0f}",
                    "per seed": " ".join(f"{each['mean']:.0f}" for each in found),
                    "paper": PAPER.get((scenario, row), "") if setting != "sto3" else "",
                }
            )
        if lines and lines[-1]["row"].startswith(f"{scenario}/{setting}/"):
            kind, count = SETTINGS[setting]
            shown = load_demonstrations(f"demos/walker/{SCENARIOS[scenario][0]}{kind}.npz", episodes=count).returns
            lines.append({"row": f"{scenario}/{setting}/expert", "mean": f"{shown.mean():.0f}", "per seed": "(the demonstrations)"})
    return markdown(lines) if lines else "no results yet"


LABELS = {
    "base": "base, untouched",
    "best-skill": "best that is there before, untouched",
    "old-skill": "the paper's recipe's walk skill, untouched",
    "scratch": "scratch, the paper's recipe",
    "lora": "LoRA, the paper's recipe",
    "fixed": "fixed weights, tuned on validation loss",
    "asec": "composed actions (ASEC)",
    "nsec": "composed noise (NSEC)",
    "psec": "PSEC, the paper's recipe",
    "ours": "**ours**",
}


def summary(results: list[dict[str, Any]]) -> str:
    """Means over all training seeds and episodes, a column per setting and scenario; in brackets how many seeds, where there are fewer than three."""
    columns = [(setting, scenario) for setting in SETTINGS for scenario in SCENARIOS]
    lines: list[dict[str, Any]] = []
    for row, label in LABELS.items():
        line: dict[str, Any] = {"": label}
        for setting, scenario in columns:
            means = [each["mean"] for each in results if each["name"] == f"{scenario}/{setting}/{row}"]
            few = f" ({len(means)})" if len(means) < 3 and trained(scenario, row) else ""
            line[f"{scenario} {setting}"] = f"{np.mean(means):.0f}{few}" if means else ""
        lines.append(line)
    shown = {
        f"{scenario} {setting}": f"{load_demonstrations(f'demos/walker/{SCENARIOS[scenario][0]}{kind}.npz', episodes=count).returns.mean():.0f}"
        for setting, (kind, count) in SETTINGS.items()
        for scenario in SCENARIOS
    }
    paper = {f"{scenario} {setting}": PAPER.get((scenario, "psec"), "") if setting != "sto3" else "" for setting, scenario in columns}
    return markdown([*lines, {"": "the demonstrations", **shown}, {"": "the paper's own figure for PSEC", **paper}])


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "one cell of each row with a few steps")
    parser.add_argument("--summary", action="store_true", help="print a table of the means alone")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    stored.study_options(parser, ROWS, 3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.chdir(ROOT)
    results = read_results()
    if options.quick:
        shutil.rmtree("runs/psec_continual/quick", ignore_errors=True)
        results = [compute("S+W->R", "sto3", row, 0, stored.QUICK, episodes=1) for row in options.rows]
    elif not options.from_results:
        chosen = (each for each in cells(options.settings, options.seeds, options.rows) if each[0] in options.scenarios)
        wanted = ((f"{scenario}/{setting}/{row}", seed, partial(compute, scenario, setting, row, seed)) for scenario, setting, row, seed in chosen)
        stored.complete(RESULTS, wanted, lambda row: f"{row['mean']:.0f} {row['returns']}")
        results = read_results()
    print(summary(results) if options.summary else table(results))


if __name__ == "__main__":
    main()
