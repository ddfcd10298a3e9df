"""What in the paper's recipe matters, on S->W from ten demonstrations of the deterministic expert (arXiv 2502.05932, figures 13 and 14).

python -m benchmarks.psec_ablations --from-results     the table from benchmarks/results/psec_ablations.jsonl
python -m benchmarks.psec_ablations                    what is missing there is trained and evaluated, row by row; stop and start it at will
python -m benchmarks.psec_ablations --quick            one tiny cell of each row, to see that it runs
python -m benchmarks.psec_ablations --weights psec nsec     what their gates say of the newest skill in the test episodes; stores nothing

`rank-R`: skill and gate as in `psec_continual`, of another rank (8 is its `psec`); `rank-R-alone` without the gate. `mlp`: a dense delta per layer
instead of factors, PSEC(MLP), started at random as the paper's curve suggests, or at 0 (`mlp-zero`: nothing but fine-tuning the weights, gated); the
raw output of its gate is the weight itself and starts sixteen times farther from 0 than over factors. `mlp-alone` is without the gate. `reg-mean`,
`reg-code`: the gate's two regularisers. `swish`: the official code's skill, which runs a base that was trained with Mish with SiLU instead.

The levels with other starts: the gates of `nsec` and `asec` start at 1 for the newest member. That of `psec` starts within some hundredths of 0, as
in the official code, where its output is the multiplier and the skills' own is sixteen; `psec-newest` starts at 1 as well. `nsec-official` and
`asec-official` start as in the official code, where the output is the weight: at random, about half to four fifths, of either sign.

The levels with equal losses: `nsec` and `asec` are those of `psec_continual`, on the squared error of the sampled action; `psec-action` is a gate
over the parameters with that loss, `nsec-noise` one over the noise with PSEC's. `nsec-each` and `asec-each` have a weight for every dimension of the
action (arXiv 2506.09366), which parameters cannot have. `nsec-search` and `psec-search` have no gate but constant weights, searched by the return
of episodes of other environment seeds (arXiv 2510.01068): that is, with the task's reward, which no other row is given.

A second table has rows by the number of demonstrations: `psec-of-30` is PSEC with thirty of the stochastic expert, `psec-of-det30` of the
deterministic one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import skillbank as sb
from benchmarks import psec_continual, stored
from benchmarks.intervals import interval
from benchmarks.levels import ActionLevel, NoiseLevel, ParameterLevel
from benchmarks.psec_continual import BASE, MORE, ROOT, SCENARIOS, Level, Study, compute
from skillbank.model import Model, ModelModule
from skillbank.models.diffusion import Mish
from skillbank.report import markdown
from skillbank.tasks.control import ControlTask

RESULTS = ROOT / "benchmarks" / "results" / "psec_ablations.jsonl"
SCENARIO, SETTING = "S->W", "det10"
PLAIN = ("task.observation_noise=0.0", "task.balance=0.0", "task.rehearsal=null", "batch_size=512")
GATE = (*PLAIN, "fit.steps=1001", "fit.lr=3e-4", "+fit.schedule=constant", "gate=official", "standardise=false")
SEARCH_SEED = 20
"""Of environment seeds from 20,000 on."""


def ranked(study: Study, scenario: str, rank: int, *, gated: bool = True) -> Model:
    """The paper's recipe with another rank."""
    task = SCENARIOS[scenario][0]
    skill = study.train(task, f"paper-rank-{rank}", "experiment=paper", f"lora.rank={rank}")
    return study.load(study.compose(scenario, f"psec-rank-{rank}", [skill], *GATE) if gated else skill)


def dense(study: Study, scenario: str, *, zero: bool, gated: bool = True) -> Model:
    """PSEC(MLP): a delta of full rank for every layer, trained at scale 1, with the steps and the batches of a skill."""
    name = f"{'dense-zero' if zero else 'dense'}/{study.setting}/seed-{study.seed}/{SCENARIOS[scenario][0]}"
    try:
        study.bank.resolve(name)
    except KeyError:
        print(f"-- {name}", flush=True)
        study.bank.put(_dense_skill(study, scenario, zero=zero), name, card={"base": BASE})
    if not gated:
        return study.load(name)
    recipe = "psec-mlp-zero" if zero else "psec-mlp"
    return study.load(study.compose(scenario, recipe, [name], *GATE, "gate.scale=1.0"))


def _dense_skill(study: Study, scenario: str, *, zero: bool) -> sb.Skill:
    model: ModelModule = sb.load(BASE, study.bank, plan="reference")
    torch.manual_seed(study.seed)
    layers = {name: layer for name, layer in model.net.named_modules() if isinstance(layer, nn.Linear)}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for layer in () if zero else layers.values():
        with torch.no_grad():
            layer.weight += torch.randn_like(layer.weight) / layer.in_features**0.5
    _train(study, scenario, model, [cast("nn.Parameter", layer.weight) for layer in layers.values()])
    found = {}
    for name, layer in layers.items():
        delta = layer.weight.detach() - before[name]
        out, width = delta.shape
        found[name] = (delta, torch.eye(out)) if out < width else (torch.eye(width), delta)
    return sb.Skill(found)


def _train(study: Study, scenario: str, model: nn.Module, params: list[nn.Parameter]) -> None:
    """As `experiment=paper` trains a skill."""
    for layer in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        layer.p = 0.1
    batches = study.task(SCENARIOS[scenario][0]).batches(batch_size=8 if study.overrides else 256, seed=study.seed)
    sb.fit(model, batches, params, steps=3 if study.overrides else 10000, lr=3e-4, weight_decay=1e-4, seed=study.seed)


def regularised(study: Study, scenario: str, kind: str) -> Model:
    """PSEC with one of the official code's regularisers."""
    return study.load(study.compose(scenario, f"psec-{kind}", study.paper_skills(scenario), *GATE, f"regulariser={kind}"))


def newest(study: Study, scenario: str) -> Model:
    """PSEC, its gate started at 1 for the newest skill."""
    gate = (*(each for each in GATE if each != "gate=official"), "gate=mlp")
    return study.load(study.compose(scenario, "psec-newest", study.paper_skills(scenario), *gate))


def mismatched(study: Study, scenario: str) -> Model:
    """A skill that runs the base with SiLU, which was trained with Mish."""
    model = study.load(BASE)
    for name, module in list(model.net.named_modules()):
        if isinstance(module, Mish):
            parent, _, child = name.rpartition(".")
            setattr(model.net.get_submodule(parent), child, nn.SiLU())
    torch.manual_seed(study.seed)
    _train(study, scenario, model, sb.fresh(model.net, rank=8, scale=16.0))
    return model.eval()


def searched(study: Study, scenario: str, *, noise: bool) -> Model:
    """Constant weights w of skill and, for noise, 1 - w of the base: the best of eleven by the return of five episodes of other seeds."""
    level = study.untrained(scenario, NoiseLevel if noise else ParameterLevel)
    task = study.task(SCENARIOS[scenario][0])
    task.max_steps = 20 if study.overrides else None
    level.gate = sb.ConstantGate(task.observation_dim, 2 if noise else 1)

    def weigh(weight: float) -> None:
        level.gate.weights.data.copy_(torch.tensor([1 - weight, weight] if noise else [weight]))

    found = {}
    for weight in torch.linspace(0, 1, 3 if study.overrides else 11).tolist():
        weigh(weight)
        found[weight] = float(task.rollout(level, seed=SEARCH_SEED, episodes=1 if study.overrides else 5).returns.mean())
    best = max(found, key=found.__getitem__)
    print(f"   weight {best:.1f} of { ({key: round(value) for key, value in found.items()}) }", flush=True)
    weigh(best)
    return cast("Model", level)


def level(kind: Level, label: str, batch_size: int = 64) -> Callable[[Study, str], Model]:
    """A row of `Study.level`."""
    return partial(Study.level, kind=kind, label=label, batch_size=batch_size)


ROWS: dict[str, Callable[[Study, str], Model]] = {
    **{f"rank-{rank}": partial(ranked, rank=rank) for rank in (4, 16, 32, 64)},
    **{f"rank-{rank}-alone": partial(ranked, rank=rank, gated=False) for rank in (4, 16, 32, 64)},
    "mlp": partial(dense, zero=False),
    "mlp-alone": partial(dense, zero=False, gated=False),
    "mlp-zero": partial(dense, zero=True),
    "mlp-zero-alone": partial(dense, zero=True, gated=False),
    "reg-mean": partial(regularised, kind="mean"),
    "reg-code": partial(regularised, kind="code"),
    "swish": mismatched,
    "psec-newest": newest,
    "nsec-official": level(partial(NoiseLevel, init="official"), "nsec-official"),
    "asec-official": level(partial(ActionLevel, init="official"), "asec-official"),
    "psec-action": level(ParameterLevel, "psec-action"),
    "nsec-noise": level(partial(NoiseLevel, on_noise=True), "nsec-noise", 512),
    "nsec-each": level(partial(NoiseLevel, per_dimension=True), "nsec-each"),
    "asec-each": level(partial(ActionLevel, per_dimension=True), "asec-each"),
    "nsec-search": partial(searched, noise=True),
    "psec-search": partial(searched, noise=False),
}
COUNTED: dict[str, Callable[[Study, str], Model]] = {
    **{row: psec_continual.ROWS[row] for row in ("scratch", "lora", "asec", "nsec", "psec")},
    **{row: ROWS[row] for row in ("asec-official", "nsec-official", "mlp")},
}
"""Rows of the table by the number of demonstrations."""
ROWS |= {f"{row}-of-{setting.removeprefix('sto')}": of for setting in MORE for row, of in COUNTED.items()}
GATED = ("psec", "nsec", "asec", "psec-newest", "nsec-official", "asec-official", "psec-action", "nsec-noise", "reg-mean", "reg-code")
KEPT = {"rank-8": "psec", "rank-8-alone": "lora", "nsec": "nsec", "asec": "asec"}
"""Rows that `psec_continual` has."""


def read_results() -> list[dict[str, Any]]:
    """Stored rows, with those of `psec_continual` that belong to them."""
    own = stored.so_far(RESULTS)
    others = {f"{SCENARIO}/{SETTING}/{row}": name for name, row in KEPT.items()}
    return own + [each | {"name": f"{SCENARIO}/{SETTING}/{others[each['name']]}"} for each in psec_continual.read_results() if each["name"] in others]


def table(results: list[dict[str, Any]]) -> str:
    """Mean over seeds and episodes, from three seeds on its interval, and the mean of every seed."""
    lines = []
    own = [each for each in results if each["name"].startswith(f"{SCENARIO}/{SETTING}/")]
    names = {each["name"].rpartition("/")[2] for each in own}
    for row in sorted(names, key=lambda name: [part.zfill(2) for part in name.split("-")]):
        found = sorted((each for each in own if each["name"].endswith(f"/{row}")), key=lambda each: each["seed"])
        sure = "{:.0f}..{:.0f}".format(*interval([each["returns"] for each in found])) if len(found) >= 3 else ""
        mean = sum(each["mean"] for each in found) / len(found)
        per_seed = " ".join(f"{each['mean']:.0f}" for each in found)
        lines.append({"row": row, "mean": f"{mean:.0f}", "95 %": sure, "per seed": per_seed})
    return markdown(lines) if lines else "no results yet"


def counted() -> str:
    """Stored means over seeds and episodes by the number of demonstrations; in brackets how many seeds, where there are fewer than three."""
    lines, results = [], stored.so_far(RESULTS) + psec_continual.read_results()
    for row in COUNTED:
        line: dict[str, Any] = {"": row}
        for setting in ("det10", "det30", "sto3", "sto10", "sto30", "sto50", "sto100"):
            means = [each["mean"] for each in results if each["name"] == f"{SCENARIO}/{setting}/{row}"]
            few = f" ({len(means)})" if len(means) < 3 else ""
            line[setting] = f"{sum(means) / len(means):.0f}{few}" if means else ""
        lines.append(line)
    return markdown(lines)


def said(row: str, seeds: Sequence[int], overrides: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What the gate of a row, trained where it is not yet, says of the newest skill in ten test episodes: quantiles over all steps, by seed."""
    lines = []
    for seed in seeds:
        study = Study(SETTING, seed, overrides)
        task = study.task(SCENARIOS[SCENARIO][0])
        task.max_steps = 20 if overrides else None
        model = (ROWS | psec_continual.ROWS)[row](study, SCENARIO)
        lines.append({"row": row, "seed": seed, **met(model, task, 1 if overrides else 10)})
    return lines


def met(model: Any, task: ControlTask, episodes: int) -> dict[str, str]:
    """Quantiles of what a gate says of the newest skill in the states that its policy meets, as cells of a table."""
    weights: list[Tensor] = []
    handle = model.gate.register_forward_hook(lambda gate, inputs, said: weights.append(said[..., -1].flatten()))
    task.rollout(model, episodes=episodes)
    handle.remove()
    low, middle, high = torch.cat(weights).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"5 %": f"{low:.2f}", "median": f"{middle:.2f}", "95 %": f"{high:.2f}"}


def cell(row: str) -> tuple[str, str, str]:
    """Setting and row that a row of the command line is in `psec_continual`, and the name of its results."""
    row, _, setting = row.partition("-of-")
    setting = setting if setting.startswith("det") else f"sto{setting}" if setting else SETTING
    return setting, row, f"{SCENARIO}/{setting}/{row}"


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "every row with a few steps")
    parser.add_argument("--weights", nargs="+", metavar="ROW", choices=GATED, help=f"what gates say in the test episodes, of {', '.join(GATED)}")
    stored.study_options(parser, ROWS, 3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.chdir(ROOT)
    if options.weights:
        print(markdown([line for row in options.weights for line in said(row, options.seeds, stored.QUICK if options.quick else ())]))
        return
    computed = {row: partial(compute, SCENARIO, cell(row)[0], cell(row)[1], rows=ROWS | COUNTED) for row in options.rows}
    if options.quick:
        shutil.rmtree(Path("runs/psec_continual/quick"), ignore_errors=True)
        quick = partial(partial, seed=0, overrides=stored.QUICK, episodes=1)
        results = [quick(each)() | {"name": f"{SCENARIO}/{SETTING}/{row}"} for row, each in computed.items()]
    elif not options.from_results:
        wanted = ((cell(row)[2], seed, partial(each, seed=seed)) for seed in options.seeds for row, each in computed.items())
        stored.complete(RESULTS, wanted, lambda row: f"{row['mean']:.0f}")
    print(table(results) if options.quick else f"{table(read_results())}\n\n{counted()}")


if __name__ == "__main__":
    main()
