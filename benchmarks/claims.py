"""The paper's claims, one by one, against what is stored here: effect, interval, seeds and verdict (arXiv 2502.05932).

python -m benchmarks.claims                     the verdicts
python -m benchmarks.claims --page > docs/results.md      the page: verdicts, and every table that they rest on

What an effect, an interval and a verdict are, benchmarks/comparisons.py says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

from benchmarks import psec_ablations, psec_continual, psec_dynamics, psec_safe, psec_safe_bullet
from benchmarks.comparisons import Claim, Comparison, Row, by_name
from skillbank.report import markdown

WALK = "S->W/det10"
LIMIT = 10
"""Of costs per episode, DSRL's."""
GATES = {
    "gate": ("PSEC", "C5"),
    "gate-mean": ("PSEC with *mean*", "C5, regulariser *mean*"),
    "gate-code": ("PSEC with *code*", "C5, regulariser *code*"),
    "gate-action": ("PSEC on the sampled action", "C5, the other levels' loss"),
}
"""Rows of `psec_safe`: what its comparisons and its claims are called."""


def levels() -> list[Claim]:
    """C1: parameters, noise and actions from ten demonstrations."""
    of, ablation = by_name(psec_continual.read_results()), by_name(psec_ablations.read_results())
    mlp, noise, action = (ablation(f"{WALK}/{row}") for row in ("mlp", "nsec-official", "asec-official"))
    psec = of(f"{WALK}/psec")
    orders = [("PSEC > PSEC(MLP)", psec, mlp), ("PSEC(MLP) > NSEC", mlp, noise), ("PSEC > NSEC", psec, noise), ("NSEC > ASEC", noise, action)]
    orders += [("NSEC > scratch", noise, of(f"{WALK}/scratch"))]
    starts = [("ASEC from 1 > ASEC", of(f"{WALK}/asec"), action), ("NSEC from 1 > NSEC", of(f"{WALK}/nsec"), noise)]
    starts.append(("PSEC from 1 > PSEC", ablation(f"{WALK}/psec-newest"), psec))
    newest = [("PSEC > NSEC", ablation(f"{WALK}/psec-newest"), of(f"{WALK}/nsec")), ("NSEC > ASEC", of(f"{WALK}/nsec"), of(f"{WALK}/asec"))]
    return [
        Claim(
            "C1",
            "From ten demonstrations, stand to walk: PSEC > PSEC(MLP) > NSEC > ASEC and scratch, gates started as in the official code",
            [Comparison(*each) for each in orders],
            "the official code starts PSEC's gate within some hundredths of 0, those of noise and actions, whose output nothing divides, at random "
            "weights of about half to four fifths. With a hundred stochastic demonstrations scratch has caught up (table by their number, below).",
        ),
        Claim("C1, another start", "The same of the levels, all gates started at 1 for the newest skill", [Comparison(*each) for each in newest]),
        Claim(
            "the start",
            "Gates that start at 1 for the newest skill are better than those that start as in the official code",
            [Comparison(*each) for each in starts],
            "for composed actions the start decides; for noise and parameters the seeds do not tell.",
            ours=True,
        ),
    ]


def growth() -> list[Claim]:
    """C2 and C3, and what is left out: a library that grows, a gate beside what is simpler, from ten demonstrations."""
    of = by_name(psec_continual.read_results())
    cells = [f"{scenario}/{setting}" for setting in ("det10", "sto10") for scenario in psec_continual.SCENARIOS]

    def psec(than: str, row: str, among: Sequence[str], *, untrained: bool = False) -> list[Comparison]:
        return [Comparison(f"{cell}: PSEC > {than}", of(f"{cell}/psec"), of(f"{cell}/{row}"), untrained) for cell in among]

    grown = [cell for cell in cells if cell.startswith("S+W->R")]
    few = [f"{scenario}/sto3" for scenario in psec_continual.SCENARIOS]
    return [
        Claim(
            "C2",
            "A library that has grown helps: a walk skill beside the run skill is better than the run skill alone",
            [
                Comparison(f"{setting}: S+W->R > S->R, both PSEC", of(f"S+W->R/{setting}/psec"), of(f"S->R/{setting}/psec"))
                for setting in ("det10", "sto10")
            ],
        ),
        Claim("C3", "A gate on the context is better than fixed weights that were tuned", psec("fixed", "fixed", cells)),
        Claim(
            "trivial rows",
            "PSEC is better than what is there before",
            [*psec("base, untouched", "base", [*cells, *few], untrained=True), *psec("its walk skill, untouched", "old-skill", grown)],
            ours=True,
        ),
        Claim("the gate", "PSEC is better than its new skill alone", psec("its LoRA", "lora", cells), ours=True),
    ]


def ranks() -> list[Claim]:
    """C4: how large a skill is, and how it is written."""
    ablation = by_name(psec_ablations.read_results())
    mlp, zero = ablation(f"{WALK}/mlp"), ablation(f"{WALK}/mlp-zero")
    rank = {r: ablation(f"{WALK}/rank-{r}") for r in (4, 8, 16, 32, 64)}
    near = [(r, values.changed(lambda each: 0.9 * each)) for r, values in rank.items() if r != 8]
    return [
        Claim(
            "C4",
            "Rank 8 is best or near it (90 % of the best) of 4 to 64, and every rank is better than the dense delta",
            [
                *(Comparison(f"rank 8 > 90 % of rank {r}", rank[8], values) for r, values in near),
                *(Comparison(f"rank {r} > PSEC(MLP)", values, mlp) for r, values in rank.items()),
            ],
        ),
        Claim(
            "C4, more",
            "Higher ranks are better than 8",
            [Comparison(f"rank {r} > rank 8", rank[r], rank[8]) for r in (16, 32, 64)],
            ours=True,
        ),
        Claim(
            "C4, from 0",
            "Every rank is better than a dense delta that starts at 0, as factors do",
            [Comparison(f"rank {r} > dense from 0", values, zero) for r, values in rank.items()],
            "a dense delta from 0 is plain fine-tuning under a gate: above ranks 4 and 8, not told from 16 to 64. PSEC(MLP) is bad because it "
            "starts at random.",
            ours=True,
        ),
    ]


def safe() -> list[Claim]:
    """C5: rewards and costs, over all tasks, and whether each of them is as this repository set out to show."""
    results = psec_safe.read_results()
    costs, returns = by_name(results, "costs"), by_name(results)
    rivals = {"reward": "reward skill alone", "cost": "cost skill alone", "feasible": "one policy weighted as in FISOR"}
    rivals |= {"scratch": "safe demonstrations alone", "lora": "LoRA of the safe demonstrations"}
    own = [
        Comparison(f"{task}: PSEC earns more than {what}", returns(f"{task}/gate"), returns(f"{task}/{row}"))
        for task in psec_safe.TASKS
        for row, what in rivals.items()
        if not breaks(costs(f"{task}/{row}")) and not breaks(costs(f"{task}/gate"))
    ]
    return [
        keeps_the_limit("C5", "PSEC", ("gate-hot", "asec-hot", "nsec-hot"), costs, returns),
        *(keeps_the_limit(f"{name}, temperature 0.5", about, (row, "asec-two", "nsec-two"), costs, returns) for row, (about, name) in GATES.items()),
        Claim(
            "controls of C5",
            "The gate earns more than FISOR's weights and than the rows which the paper leaves out, where both keep the limit (temperature 0.5)",
            own,
            ours=True,
        ),
        *(safe_and_above(row, task, costs, returns) for row in ("gate", "gate-action") for task in psec_safe.TASKS),
    ]


def breaks(costs: Row) -> bool:
    """Whether the limit is broken on average."""
    return bool(costs.values) and costs.mean > LIMIT


def below(costs: Row) -> Row:
    """How far costs are below the limit."""
    return costs.changed(lambda cost: LIMIT - cost)


def keeps_the_limit(name: str, about: str, rows: tuple[str, str, str], costs: Callable[[str], Row], returns: Callable[[str], Row]) -> Claim:
    """C5 for one of the gates, beside actions and noise, each where the paper's row breaks the limit."""
    comparisons = []
    for i, task in enumerate(psec_safe.TASKS):
        gate, *levels = rows
        comparisons.append(Comparison(f"{task}: {about} costs less than {LIMIT}", below(costs(f"{task}/{gate}")), 0.0))
        for level, row in zip(("asec", "nsec"), levels, strict=True):
            if float(psec_safe.ROWS[f"{level}-two"].paper[i].rpartition(" ")[2]) > 1:
                over = costs(f"{task}/{row}").changed(lambda cost: cost - LIMIT)
                comparisons.append(Comparison(f"{task}: {level.upper()} costs more than {LIMIT}", over, 0.0))
            comparisons.append(Comparison(f"{task}: {level.upper()} earns more than {about}", returns(f"{task}/{row}"), returns(f"{task}/{gate}")))
    return Claim(name, f"With costs: {about} keeps the limit, composed noise and actions do not where the paper's do not, and earn more", comparisons)


def safe_and_above(row: str, task: str, costs: Callable[[str], Row], returns: Callable[[str], Row]) -> Claim:
    """Whether a gate keeps the limit and earns more than FISOR's weights and than each single skill that keeps it as well."""
    gate, rivals = returns(f"{task}/{row}"), {"feasible": "one policy weighted as in FISOR"}
    singles = {"reward": "reward skill alone", "cost": "cost skill alone"}
    rivals |= {single: what for single, what in singles.items() if not breaks(costs(f"{task}/{single}"))}
    about, name = GATES[row]
    return Claim(
        f"{name}, {task}",
        f"{about} keeps the limit and earns more than FISOR's weights and than each single skill that keeps it (temperature 0.5)",
        [
            Comparison(f"{task}: {about} costs less than {LIMIT}", below(costs(f"{task}/{row}")), 0.0),
            *(Comparison(f"{task}: {about} earns more than {what}", gate, returns(f"{task}/{rival}")) for rival, what in rivals.items()),
        ],
        ours=True,
    )


def dynamics() -> list[Claim]:
    """C6: other dynamics."""
    of = by_name(psec_dynamics.read_results(), "returns")

    def row(row: str, shift: str) -> Row:
        return of(psec_dynamics.ROWS[row].name(row, shift, "medium"))

    def against(own: tuple[str, str], rivals: Mapping[str, str]) -> list[Comparison]:
        return [
            Comparison(f"{shift}: {own[1]} > {what}", row(own[0], shift), row(rival, shift))
            for shift in psec_dynamics.SHIFTS
            for rival, what in rivals.items()
        ]

    rivals = {"joint": "joint", "joint-long": "joint, as many steps", "scratch": "scratch"}
    without = {"lora-random": "LoRA on random weights", "lora-unshifted": "LoRA on unshifted data"}
    says = "{} on a base of shifted dynamics is better than joint training and than scratch (HalfCheetah, medium data)"
    return [
        Claim("C6", says.format("A LoRA weighted by advantages"), against(("awr", "weighted LoRA"), rivals)),
        Claim(
            "C6, by imitation",
            says.format("A LoRA that imitates"),
            against(("lora", "LoRA"), rivals),
            "with as many steps as source and LoRA have together, joint training is below the LoRA with friction only. A network of the target data "
            "alone does as well as the LoRA, and both are as good as these data; the policy of the source with other thighs, untouched, is better.",
        ),
        Claim(
            "C6, gated",
            says.format("A LoRA that imitates, under a gate,"),
            against(("gate", "gated LoRA"), rivals),
            "the gate starts near 0, as in the official code, and in the states that its policy meets it says 0.79 to 0.89 at the median "
            "(`python -m benchmarks.psec_dynamics --weights --targets medium`): it takes back a part of a skill that is right at 1.",
        ),
        Claim(
            "the gate, other dynamics",
            "The gate helps: it is better than its LoRA alone",
            against(("gate", "gated LoRA"), {"lora": "LoRA"}),
            ours=True,
        ),
        Claim(
            "controls of C6",
            "It is the source that helps: better than a LoRA without one, and than one on unshifted data",
            against(("lora", "LoRA"), without),
            ours=True,
        ),
    ]


def claims() -> list[Claim]:
    """All of them."""
    return [*levels(), *growth(), *ranks(), *safe(), *dynamics()]


def verdicts(found: Sequence[Claim]) -> str:
    """A line per claim, those of the paper and in its other settings first."""

    def lines(ours: bool) -> str:
        return markdown([{"claim": each.name, "in words": each.says, "verdict": each.verdict} for each in found if each.ours == ours])

    return f"The paper's, in its setting as far as it is known and in others:\n\n{lines(False)}\n\nOurs, which it does not make:\n\n{lines(True)}"


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

The claims of the paper (arXiv 2502.05932) and some of ours, each with a verdict, and the tables that the verdicts rest on.
`python -m benchmarks.claims --page` makes this page of what is stored in benchmarks/results; benchmarks/comparisons.py says what an effect, an
interval and a verdict are. The data are ours ([demos/README.md](../demos/README.md)), so that orders of rows can be compared with the paper's, not
numbers.

Pictures with numbers beside them, of weights along an episode and of skills at three levels, are in
[walker.md](walker.md#figures-weights-along-an-episode-skills-at-three-levels). The gates of the shipped walker skills come to about 1 for the
newest one (the car's on the straight does not: [safe.md](safe.md)); at the same states the features of a hidden layer tell skills apart better than
actions do, and two trainings of one task as well."""
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
