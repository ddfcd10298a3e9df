"""The paper's claims, one by one, against what is stored here: effect, interval, seeds and verdict (arXiv 2502.05932).

python -m benchmarks.claims                     the verdicts
python -m benchmarks.claims --page > docs/results.md      the page: verdicts, and every table that they rest on

A claim is a few comparisons of two rows. The effect of one is the difference of their means over all training seeds and episodes, with Welch's 95 %
interval of a difference of means over seeds (benchmarks/intervals.py). A comparison holds where the interval lies above 0 and fails where it lies
below; with three to five seeds only large differences do either. A claim is reproduced where all of its comparisons hold, not reproduced where one
fails, inconclusive where none fails and some are neither, and open where rows are missing. Fewer than three seeds decide nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import psec_ablations, psec_continual, psec_dynamics, psec_safe, psec_safe_bullet
from benchmarks.intervals import Seeds, difference
from skillbank.report import markdown

LEAST = 3
"""Seeds that a verdict takes."""
LIMIT = 10
"""Of costs per episode, DSRL's."""
GATES = {
    "gate": ("PSEC", "C5"),
    "gate-mean": ("PSEC with *mean*", "C5, regulariser *mean*"),
    "gate-code": ("PSEC with *code*", "C5, regulariser *code*"),
    "gate-action": ("PSEC on the sampled action", "C5, the other levels' loss"),
}
"""Rows of `psec_safe`: what its comparisons and its claims are called."""


@dataclass(frozen=True)
class Comparison:
    """That one row is above another.

    Args:
        says: which.
        higher: values of the row that is to be above.
        lower: of the other, or a number.
        least: the difference that is to be exceeded.
        untrained: of `lower` nothing is trained, so that it is one seed for all.

    """

    says: str
    higher: Seeds
    lower: Seeds | float
    least: float = 0.0
    untrained: bool = False

    @property
    def seeds(self) -> int:
        """Of the row with fewer."""
        if not isinstance(self.lower, list) or (self.untrained and self.lower):
            return len(self.higher)
        return min(len(self.higher), len(self.lower))

    @property
    def effect(self) -> float:
        """Difference of means."""
        return _mean(self.higher) - (_mean(self.lower) if isinstance(self.lower, list) else self.lower)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the effect."""
        return difference(self.higher, self.lower)

    @property
    def verdict(self) -> str:
        """Holds, fails, unclear, or that rows are missing."""
        if self.seeds < LEAST:
            return "missing" if not self.seeds else "too few seeds"
        low, high = self.interval
        return "holds" if low > self.least else "fails" if high < self.least else "unclear"


@dataclass(frozen=True)
class Claim:
    """What the paper says, in comparisons."""

    name: str
    says: str
    comparisons: Sequence[Comparison]
    remark: str = ""

    @property
    def verdict(self) -> str:
        """See the module."""
        found = {each.verdict for each in self.comparisons}
        if "fails" in found:
            return "not reproduced"
        if found & {"missing", "too few seeds"}:
            return "open"
        return "reproduced" if found == {"holds"} else "inconclusive"


def _mean(values: Seeds) -> float:
    return float(np.mean(np.concatenate([np.asarray(each, float) for each in values])))


def by_name(results: Sequence[Mapping[str, Any]], key: str = "returns") -> Callable[[str], Seeds]:
    """Values of a row, by its name; none where it is not stored."""

    def find(name: str) -> Seeds:
        return [list(each[key]) for each in sorted((each for each in results if each["name"] == name), key=lambda each: each["seed"])]

    return find


def continual() -> list[Claim]:
    """C1 to C4: few demonstrations of a new task."""
    of, ablation = by_name(psec_continual.read_results()), by_name(psec_ablations.read_results())
    walk = "S->W/det10"
    mlp, rank = ablation(f"{walk}/mlp"), {r: ablation(f"{walk}/rank-{r}") for r in (4, 8, 16, 32, 64)}
    psec, noise, action = of(f"{walk}/psec"), ablation(f"{walk}/nsec-official"), ablation(f"{walk}/asec-official")
    orders = [("PSEC > PSEC(MLP)", psec, mlp), ("PSEC(MLP) > NSEC", mlp, noise), ("PSEC > NSEC", psec, noise), ("NSEC > ASEC", noise, action)]
    orders += [("NSEC > scratch", noise, of(f"{walk}/scratch"))]
    newest = [("PSEC > NSEC", ablation(f"{walk}/psec-newest"), of(f"{walk}/nsec")), ("NSEC > ASEC", of(f"{walk}/nsec"), of(f"{walk}/asec"))]
    near = [(r, [[0.9 * each for each in seed] for seed in values]) for r, values in rank.items() if r != 8]
    other = [
        Comparison(f"{name}: PSEC > base, untouched", of(f"{name}/det10/psec"), of(f"{name}/det10/base"), untrained=True)
        for name in psec_continual.SCENARIOS
    ]
    other.append(Comparison("S+W->R: PSEC > its walk skill, untouched", of("S+W->R/det10/psec"), of("S+W->R/det10/old-skill")))
    return [
        Claim(
            "C1",
            "From ten demonstrations, stand to walk: PSEC > PSEC(MLP) > NSEC > ASEC and scratch, all gates started near 0 as in the official code",
            [Comparison(*each) for each in orders],
            "with these starts the means of the levels are in the paper's order, with another start they are not, and the seeds decide neither; "
            "PSEC(MLP) is where scratch is. Whether the gap closes by 100 demonstrations is open as long as the table by their number has gaps.",
        ),
        Claim(
            "C1, another start",
            "The same of the levels, all gates started at 1 for the newest skill",
            [Comparison(*each) for each in newest],
        ),
        Claim(
            "C2",
            "A library that has grown helps: a walk skill beside the run skill is better than the run skill alone",
            [Comparison("S+W->R > S->R, both PSEC", of("S+W->R/det10/psec"), of("S->R/det10/psec"))],
        ),
        Claim(
            "C3",
            "A gate on the context is better than fixed weights that were tuned",
            [Comparison(f"{name}: PSEC > fixed", of(f"{name}/det10/psec"), of(f"{name}/det10/fixed")) for name in psec_continual.SCENARIOS],
        ),
        Claim(
            "C4",
            "Rank 8 is best or near it (90 % of the best) of 4 to 64, and every rank is better than the dense delta",
            [
                *(Comparison(f"rank 8 > 90 % of rank {r}", rank[8], values) for r, values in near),
                *(Comparison(f"rank {r} > PSEC(MLP)", values, mlp) for r, values in rank.items()),
            ],
        ),
        Claim(
            "trivial rows",
            "PSEC is better than doing nothing, which the paper does not show",
            other,
        ),
    ]


def safe() -> list[Claim]:
    """C5: rewards and costs, over all tasks, and whether each of them is as this repository set out to show."""
    results = psec_safe.read_results()
    costs, returns = by_name(results, "costs"), by_name(results)
    controls = [("reward", "reward skill alone"), ("cost", "cost skill alone"), ("feasible", "one policy weighted as in FISOR")]
    controls += [("scratch", "safe demonstrations alone"), ("lora", "LoRA of the safe demonstrations")]
    own = [
        Comparison(f"{task}: PSEC earns more than {what}", returns(f"{task}/gate"), returns(f"{task}/{row}"))
        for task in psec_safe.TASKS
        for row, what in controls
        if not breaks(costs(f"{task}/{row}"))
    ]
    return [
        *(keeps_the_limit(row, costs, returns) for row in GATES),
        Claim("controls of C5", "The return of the gate is above that of the rows which the paper leaves out, where they keep the limit", own),
        *(safe_and_above(row, task, costs, returns) for row in ("gate", "gate-action") for task in psec_safe.TASKS),
    ]


def breaks(costs: Seeds) -> bool:
    """Whether the limit is broken on average."""
    return bool(costs) and _mean(costs) > LIMIT


def keeps_the_limit(row: str, costs: Callable[[str], Seeds], returns: Callable[[str], Seeds]) -> Claim:
    """C5 for one of the gates."""
    about, name = GATES[row]
    comparisons = []
    for task in psec_safe.TASKS:
        gate = costs(f"{task}/{row}")
        comparisons.append(Comparison(f"{task}: {about} costs less than {LIMIT}", [[LIMIT - cost for cost in seed] for seed in gate], 0.0))
        for level in ("asec", "nsec"):
            comparisons.append(Comparison(f"{task}: {level.upper()} costs more than {about}", costs(f"{task}/{level}-two"), gate))
        comparisons.append(Comparison(f"{task}: NSEC earns more than {about}", returns(f"{task}/nsec-two"), returns(f"{task}/{row}")))
    return Claim(name, f"With costs: {about} keeps the limit where composed noise and actions do not, at a lower return", comparisons)


def safe_and_above(row: str, task: str, costs: Callable[[str], Seeds], returns: Callable[[str], Seeds]) -> Claim:
    """Whether a gate keeps the limit and earns more than FISOR's weights and than each single skill that keeps it as well."""
    gate, rivals = returns(f"{task}/{row}"), {"feasible": "one policy weighted as in FISOR"}
    singles = {"reward": "reward skill alone", "cost": "cost skill alone"}
    rivals |= {single: what for single, what in singles.items() if not breaks(costs(f"{task}/{single}"))}
    about, name = GATES[row]
    return Claim(
        f"{name}, {task}",
        f"{about} keeps the limit and earns more than FISOR's weights and than each single skill that keeps it",
        [
            Comparison(f"{task}: {about} costs less than {LIMIT}", [[LIMIT - cost for cost in seed] for seed in costs(f"{task}/{row}")], 0.0),
            *(Comparison(f"{task}: {about} earns more than {what}", gate, returns(f"{task}/{rival}")) for rival, what in rivals.items()),
        ],
    )


def dynamics() -> list[Claim]:
    """C6: other dynamics."""
    of = by_name(psec_dynamics.read_results(), "returns")

    def row(row: str, shift: str, data: str) -> Seeds:
        return of(psec_dynamics.ROWS[row].name(row, shift, data))

    def against(rivals: Mapping[str, str], shifts: Sequence[str]) -> list[Comparison]:
        return [
            Comparison(f"{shift}: LoRA > {what}", row("lora", shift, "medium"), row(rival, shift, "medium"))
            for shift in shifts
            for rival, what in rivals.items()
        ]

    return [
        Claim(
            "C6",
            "A LoRA on a base of shifted dynamics is better than joint training and than scratch (HalfCheetah, medium data)",
            against({"joint": "joint", "scratch": "scratch"}, psec_dynamics.SHIFTS),
            "above joint training with two of three shifts (which has 5,000 steps, source and LoRA have 7,500), but a network of the target data "
            "alone does as well, and both are about as good as these data; "
            "the policy of the source with other thighs, untouched, is far better than all of them.",
        ),
        Claim(
            "controls of C6",
            "It is the source that helps: better than a LoRA without one, and than one on unshifted data",
            against({"lora-random": "LoRA on random weights", "lora-unshifted": "LoRA on unshifted data"}, psec_dynamics.SHIFTS),
            "above a LoRA on random weights with every shift; on a base of data like the target's it is as good, and so is that base, untouched.",
        ),
    ]


def claims() -> list[Claim]:
    """All of them."""
    return [*continual(), *safe(), *dynamics()]


def verdicts(found: Sequence[Claim]) -> str:
    """A line per claim."""
    return markdown([{"claim": each.name, "the paper's": each.says, "verdict": each.verdict} for each in found])


def comparisons(found: Sequence[Claim]) -> str:
    """A line per comparison."""
    lines = []
    for claim in found:
        for each in claim.comparisons:
            line = {"claim": claim.name, "comparison": each.says, "effect": "", "95 %": "", "seeds": each.seeds, "": each.verdict}
            if each.seeds:
                low, high = each.interval
                line |= {"effect": f"{each.effect:+.3g}", "95 %": f"{low:.3g}..{high:.3g}"}
            lines.append(line)
    return markdown(lines)


def page() -> str:
    """All of docs/results.md."""
    found = claims()
    remarks = "\n".join(f"- {each.name}: {each.remark}" for each in found if each.remark)
    about = """# Results

The claims of the paper (arXiv 2502.05932), each with a verdict, and the tables that the verdicts rest on. `python -m benchmarks.claims --page` makes
this page of what is stored in benchmarks/results; its text says what an effect, an interval and a verdict are. The data are ours
([demos/README.md](../demos/README.md)), so that orders of rows can be compared with the paper's, not numbers.

Pictures with numbers beside them, of weights along an episode and of skills at three levels, are in
[walker.md](walker.md#figures-weights-along-an-episode-skills-at-three-levels). The walker's gates come to about 1 for the newest skill
(the car's on the straight does not: [safe.md](safe.md)); at the same states the features of a hidden layer tell skills apart better than actions do,
and two trainings of one task as well."""
    tables = {
        "Stand to walk, stand to run, stand and walk to run": psec_continual,
        "What in the recipe matters": psec_ablations,
        "Rewards and costs": psec_safe,
        "The ball's policies in Bullet": psec_safe_bullet,
        "Other dynamics": psec_dynamics,
    }
    parts = [
        about,
        f"## Verdicts\n\n{verdicts(found)}\n\n{remarks}",
        f"## Comparisons\n\nOf returns, and of costs where they say so.\n\n{comparisons(found)}",
    ]
    for title, module in tables.items():
        name = module.__name__.rpartition(".")[2]
        how = f"`python -m benchmarks.{name}` computes what is missing, and says what the rows are."
        parts.append(f"## {title}\n\n{how}\n\n{module.table(module.read_results())}")
        if module is psec_ablations:
            parts.append(
                f"By the number of demonstrations; in brackets how many seeds, where there are fewer than three:\n\n{psec_ablations.counted()}"
            )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print verdicts, or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="the whole page docs/results.md")
    if parser.parse_args().page:
        print(page(), end="")
        return
    found = claims()
    print(verdicts(found), comparisons(found), sep="\n\n")


if __name__ == "__main__":
    main()
