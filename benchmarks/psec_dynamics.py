"""Dynamics shift on HalfCheetah: sources with other friction, gravity or thighs, few data of the target (arXiv 2502.05932, section 5.3).

python -m benchmarks.psec_dynamics --from-results     the table from benchmarks/results/psec_dynamics.jsonl
python -m benchmarks.psec_dynamics                    what is missing there is trained and evaluated, row by row; stop and start it at will
python -m benchmarks.psec_dynamics --quick            one tiny cell of every row, to see that it runs
python -m benchmarks.psec_dynamics --weights          what the gates say in the test episodes; stores nothing

A result row is one line of the results file: a name such as `friction/medium/lora`, a training seed, the returns of ten test episodes in the
unchanged HalfCheetah and their score: 100 (R - random) / (expert - random), with the random policy's and the expert's returns of this
repository (demos/dynamics/halfcheetah/manifest.json), not D4RL's. What does not depend on the shift or the data says `any` there.
Nothing is chosen by these returns. Sources and target data are made by benchmarks/dynamics_data.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

import compose as compose_entry
import skillbank as sb
import train as train_entry
from benchmarks import stored
from benchmarks.intervals import interval
from benchmarks.psec_ablations import met
from benchmarks.psec_continual import tuned
from skillbank.load import skills_on_base
from skillbank.model import Model, ModelModule
from skillbank.report import markdown
from skillbank.tasks.control import ControlTask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "psec_dynamics.jsonl"
DATA = "demos/dynamics/halfcheetah"
SHIFTS = ("friction", "gravity", "thigh")
TARGETS = ("medium", "medium-replay", "medium-expert")
STEPS = {"base": 5000, "skill": 2500, "critic": 10_000}
"""Of training, in batches of 256; the paper takes 200 thousand for base and skill, in batches of 512."""
PAPER = {"medium": (40, 41, 41), "medium-replay": (31, 29, 32), "medium-expert": (42, 42, 44)}
"""D4RL scores of PSEC in a figure of the paper, by target data, in the order of SHIFTS."""


def manifest() -> dict[str, Any]:
    """What is known of the data."""
    found: dict[str, Any] = json.loads((ROOT / DATA / "manifest.json").read_text())
    return found


def score(returns: float) -> float:
    """0 for the random policy, 100 for the expert."""
    references = manifest()["references"]
    return float(100 * (returns - references["random"]) / (references["expert"] - references["random"]))


@dataclass(frozen=True)
class Study:
    """One training seed: everything that its rows are made of, kept in a bank of its own and made once.

    Args:
        seed: of all training.
        quick: train next to nothing.

    """

    seed: int
    quick: bool = False
    used: dict[str, str] = field(default_factory=dict)
    """Hashes of what was asked for, by name."""

    @property
    def bank(self) -> sb.Bank:
        """Where everything is kept."""
        return sb.Bank(Path("runs/psec_dynamics") / ("quick" if self.quick else "full") / "bank")

    def task(self, data: str) -> ControlTask:
        """The task of a data set."""
        made: ControlTask = instantiate(stored.conf("train", f"task=halfcheetah/{data}").task, _convert_="all")
        made.max_steps = 20 if self.quick else None
        return made

    def load(self, ref: str) -> ModelModule:
        """Model of a version, its sampler at the paper's temperature."""
        model = sb.load(ref, self.bank)
        policy: Any = model.model if isinstance(model, sb.Composed) else model
        policy.temperature = 1.0
        return model

    def made(self, name: str, data: str, *overrides: str, entry: Callable[..., str] = train_entry.train) -> str:
        """Reference of a version, trained on a data set if it is not in the bank yet."""
        name = f"{name}/seed-{self.seed}"
        given = [f"task=halfcheetah/{data}", f"name={name}", f"seed={self.seed}", f"bank={self.bank.root}", "episodes=0", *overrides]
        given += stored.QUICK if self.quick else ()
        return stored.once(self.bank, name, lambda: entry(stored.conf(entry.__name__, *given)), self.used)

    def policy(self, name: str, data: str, *overrides: str) -> str:
        """A policy trained from scratch."""
        return self.made(name, data, "experiment=dynamics", f"fit.steps={STEPS['base']}", *overrides)

    def source(self, shift: str) -> str:
        """The base: what imitates the experts of a shift."""
        return self.policy(f"base/{shift}", shift)

    def skill(self, name: str, data: str, base: str, *overrides: str) -> str:
        """A skill of target data on a base."""
        return self.made(f"{name}/{data}", data, f"base={base}", "experiment=dynamics", f"fit.steps={STEPS['skill']}", *overrides)

    # What the rows are. Each returns a model.

    def base(self, shift: str, data: str) -> Model:
        """The source's policy, untouched."""
        return self.load(self.source(shift))

    def unshifted(self, shift: str, data: str) -> Model:
        """The policy of the control without a shift, untouched."""
        return self.load(self.source("unshifted"))

    def scratch(self, shift: str, data: str) -> Model:
        """The same network trained on the target data alone."""
        return self.load(self.policy(f"scratch/{data}", data))

    def joint(self, shift: str, data: str, length: int = STEPS["base"]) -> Model:
        """The same network trained on source and target data, as many steps of each in a batch as their sizes are to each other."""
        files = {each: f"{DATA}/{each}.npz" for each in (shift, data)}
        steps = {each: manifest()["sets"][each]["steps"] for each in files}
        old = f"+task.rehearsal={{demonstrations: {files[shift]}, share: {steps[shift] / sum(steps.values()):.4f}}}"
        name = "joint" if length == STEPS["base"] else f"joint-{length}"
        return self.load(self.made(f"{name}/{shift}/{data}", data, "experiment=dynamics", f"fit.steps={length}", old))

    def lora(self, shift: str, data: str) -> Model:
        """A skill on the source's base, by plain imitation, at the weight that it was trained with."""
        return self.load(self.skill(f"lora/{shift}", data, self.source(shift)))

    def awr(self, shift: str, data: str) -> Model:
        """A skill whose examples are weighted by the advantages of an implicit Q-learning critic of the target data, as in the paper.

        Rewards are scaled to 1000 between the random policy and the expert.
        """
        references = manifest()["references"]
        offline = (
            "task._target_=skillbank.tasks.offline.OfflineTask",
            f"+task.reward_scale={1000 / (references['expert'] - references['random']):.4f}",
        )
        learned = ("model=critic", "fit=critic", f"fit.steps={STEPS['critic']}", "model.beta=10", "model.clip=100")
        critic = self.made(f"critic/{data}", data, *offline, *learned)
        return self.load(self.skill(f"awr/{shift}", data, self.source(shift), f"critic={critic}", *offline))

    def fixed(self, shift: str, data: str) -> Model:
        """The skill at a constant weight, chosen by the diffusion loss on the held-out episode."""
        _, model, skills, _ = skills_on_base(self.bank, [self.skill(f"lora/{shift}", data, self.source(shift))])
        policy: Any = model
        policy.temperature = 1.0
        return tuned(model, skills, self.task(data))

    def gate(self, shift: str, data: str) -> Model:
        """The skill under a gate: 1,001 steps in batches of 512 from the official initialisation, without a regulariser."""
        skill = self.skill(f"lora/{shift}", data, self.source(shift))
        fit = ("gate=official", "standardise=false", "fit.steps=1001", "fit.lr=3e-4", "+fit.schedule=constant", "batch_size=512")
        return self.load(self.made(f"gate/{shift}/{data}", data, f"skills=[{skill}]", *fit, entry=compose_entry.compose))

    def lora_random(self, shift: str, data: str) -> Model:
        """A skill on a network that nothing was trained into."""
        random = self.policy("base/random", data, "fit.steps=1", "fit.lr=0")
        return self.load(self.skill("lora/random", data, random))

    def lora_unshifted(self, shift: str, data: str) -> Model:
        """A skill on a base of data like the target's: as many episodes as a source has, of the *medium* agent in the unchanged environment."""
        return self.load(self.skill("lora/unshifted", data, self.source("unshifted")))


@dataclass(frozen=True)
class Row:
    """What stands in the table.

    Args:
        label: what the table calls it.
        model: makes it.
        shift: whether it depends on the shift.
        data: whether it depends on the target data.

    """

    label: str
    model: Callable[[Study, str, str], Model]
    shift: bool = True
    data: bool = True

    def name(self, row: str, shift: str, data: str) -> str:
        """Of a result."""
        return f"{shift if self.shift else 'any'}/{data if self.data else 'any'}/{row}"


ROWS = {
    "base": Row("source policy, untouched", Study.base, data=False),
    "unshifted": Row("policy of unshifted data, untouched", Study.unshifted, shift=False, data=False),
    "lora": Row("LoRA on the source", Study.lora),
    "scratch": Row("scratch, target data alone", Study.scratch, shift=False),
    "fixed": Row("LoRA on the source, weight tuned on validation loss", Study.fixed),
    "gate": Row("LoRA on the source, gated (PSEC)", Study.gate),
    "lora-random": Row("LoRA without source, on random weights", Study.lora_random, shift=False),
    "lora-unshifted": Row("LoRA on a base of unshifted data", Study.lora_unshifted, shift=False),
    "awr": Row("LoRA on the source, weighted by advantages", Study.awr),
    "joint": Row("joint training on source and target data", Study.joint),
    "joint-long": Row("the same, as many steps as source and LoRA have", partial(Study.joint, length=STEPS["base"] + STEPS["skill"])),
}


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str, str, int]]:
    """(name, row, shift, data, seed) of everything that there is to compute, each once."""
    known = set()
    for seed, data, row, shift in itertools.product(options.seeds, options.targets, options.rows, options.shifts):
        name = ROWS[row].name(row, shift, data)
        if (name, seed) not in known:
            known.add((name, seed))
            yield name, row, shift, data, seed


def read_results() -> list[dict[str, Any]]:
    """Stored result rows."""
    return stored.so_far(RESULTS)


def compute(name: str, row: str, shift: str, data: str, study: Study, episodes: int = 10) -> dict[str, Any]:
    """Train what the cell needs, run its test episodes and return its result row."""
    started = time.time()
    task = study.task(data)
    model = ROWS[row].model(study, shift, data)
    trained = time.time() - started
    returns = task.rollout(model, episodes=episodes).returns
    return {
        "name": name,
        "seed": study.seed,
        "returns": [round(float(each), 1) for each in returns],
        "mean": round(float(returns.mean()), 1),
        "score": round(score(float(returns.mean())), 1),
        "seconds": round(trained, 1),
        "steps": STEPS,
        "made_of": study.used,
        "threads": torch.get_num_threads(),
        **stored.where(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean score of every row, a column per shift and data set; with an interval from three seeds on, before them the number of seeds in brackets."""
    columns = list(itertools.product(SHIFTS, TARGETS))
    lines: list[dict[str, Any]] = []
    for row, about in ROWS.items():
        line: dict[str, Any] = {"": about.label}
        for shift, data in columns:
            found = [each for each in results if each["name"] == about.name(row, shift, data)]
            scores = [[score(value) for value in each["returns"]] for each in found]
            shown = f"{np.mean(scores):.1f}" if found else ""
            if len(found) >= 3:
                shown += " ({:.0f}..{:.0f})".format(*interval(scores))
            line[f"{shift}, {data}"] = f"{shown} ({len(found)})" if 0 < len(found) < 3 else shown
        lines.append(line)
    behaviour = {f"{shift}, {data}": f"{score(manifest()['sets'][data]['mean_return']):.1f}" for shift, data in columns}
    paper = {f"{shift}, {data}": PAPER[data][SHIFTS.index(shift)] for shift, data in columns}
    lines += [{"": "the target data themselves", **behaviour}, {"": "the paper's PSEC, of other data, by D4RL's references", **paper}]
    return markdown(lines)


def said(options: argparse.Namespace) -> str:
    """What gates, trained where they are not yet, say of their skill in test episodes: quantiles over all steps."""
    lines = []
    for data, shift, seed in itertools.product(options.targets, options.shifts, options.seeds):
        study = Study(seed, options.quick)
        lines.append({"shift": shift, "data": data, "seed": seed, **met(study.gate(shift, data), study.task(data), 2)})
    return markdown(lines)


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "one cell of each row with a few steps")
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--weights", action="store_true", help="what the gates say of their skill in two test episodes")
    stored.study_options(parser, ROWS, 3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.chdir(ROOT)
    results = read_results()
    if options.weights:
        print(said(options))
        return
    if options.quick:
        shutil.rmtree("runs/psec_dynamics/quick", ignore_errors=True)
        shift, data = options.shifts[0], options.targets[0]
        results = [compute(ROWS[row].name(row, shift, data), row, shift, data, Study(0, quick=True), 1) for row in options.rows]
    elif not options.from_results:
        wanted = ((name, seed, partial(compute, name, row, shift, data, Study(seed))) for name, row, shift, data, seed in cells(options))
        stored.complete(RESULTS, wanted, lambda row: f"{row['score']:.1f} {row['returns']}")
        results = read_results()
    print(table(results))


if __name__ == "__main__":
    main()
