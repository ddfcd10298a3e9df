"""Functions of strings as skills of a small language model, composed in parameters, logits, answers and prompts: what each can do, and cannot.

python -m benchmarks.strings [--seeds 3] [--quick] [--from-results]     # computes the seeds that are not stored yet
python -m benchmarks.strings --ship     # base and skills of seed 0 into adapters/, which the rest stands on

See benchmarks/functions.py for what is asked. All numbers are shares of prompts that are answered exactly, mean and standard deviation over seeds
(other skills, other gates, other prompts; the base is one). `alone` are single functions, `depth k` chains of k different ones, each composed
method as it is; nothing is chosen by looking at these. `given the names` are methods that are told which skills a prompt names, which is what their
weights are then; `all` have all twelve. `parts` is the share of functions that the same method answers alone, `gap` the share of chains that are
wrong though the method has every part right, `weakest` the share of right chains over that of the worst of their parts.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import skillbank as sb
import train as train_entry
from benchmarks.functions import SKILLS, alone, by_examples, chain, chains, of_skill, pretraining, save, word
from benchmarks.stored import Row, conf, load, parser, store, where
from skillbank.kshot import best_skills
from skillbank.levels import compose_at
from skillbank.mixture import Composed, Mixed, Mixture, see
from skillbank.model import Batch, Model
from skillbank.report import markdown
from skillbank.routers import Arrow, Prototypes
from skillbank.runtime.fused import fuse
from skillbank.tasks.text import TextTask, rows_of
from skillbank.tasks.tokens import encoded

Records = Sequence[Mapping[str, str]]
Say = Callable[[Records], list[str]]
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/strings.jsonl"
NAMES = "".join(SKILLS)
TRAINED_ON, HELD_OUT = NAMES[:8], NAMES[8:]
"""Functions whose chains the gates are trained on, and those that they never see in a chain."""
BASE = ["task=text", "fit=base", "model=causal", "task.name=strings/base", "task.tokenizer=bytes", "task.length=96", "task.held_out=512"]
BASE += ["fit.steps=4000", "fit.lr=3e-3", "+fit.warmup=200", "batch_size=256", "episodes=512"]
BASE += ["model.net.hidden_size=128", "model.net.intermediate_size=384", "model.net.max_position_embeddings=128"]
SKILL = ["task=text", "base=strings/base", "task.length=96", "fit.steps=500", "fit.lr=2e-3", "lora.rank=8", "lora.scale=2", "batch_size=32"]


def trained(bank: sb.Bank, name: str, records: Sequence[dict[str, str]], *overrides: str, folder: str = "runs/strings") -> str:
    """Reference of what train.py makes of records, which go to a file in a folder; made if it is not in the bank yet."""
    try:
        return str(bank.resolve(name))
    except KeyError:
        pass
    path = save(records, Path(folder) / f"{name.rpartition('/')[2]}.jsonl")
    print(f"-- {name}", flush=True)
    return train_entry.train(conf("train", *overrides, f"task.name={name}", f"task.data={path}", f"bank={bank.root}"))


def skills_of(bank: sb.Bank, seed: int) -> dict[str, str]:
    """References of the skills of a seed."""
    made = {}
    for name in NAMES:
        own = f"strings/{name.lower()}" if seed == 0 else f"strings/{name.lower()}-{seed}"
        folder = "runs/strings" if seed else "demos/strings"
        made[name] = trained(bank, own, of_skill(name, 600, seed), *SKILL, f"seed={seed}", "episodes=0", folder=folder)
    return made


class Told(Mixed):
    """Base and skills under the weights (B, K) that a batch brings with it: the weighted sum of the deltas, another one for every row. A `Model`."""

    def __init__(self, model: nn.Module, skills: Sequence[sb.Skill]) -> None:
        super().__init__()
        self.model = cast("Any", model)
        self.mixture = Mixture(self.model.net, skills)
        fuse(self.model.net, self.mixture)
        self.weights: Tensor = torch.zeros(0)

    def _mix(self, batch: Batch, repeats: int = 1) -> Tensor:
        self.mixture.cell.mix(self.weights, repeats)
        return self.weights


class Bench:
    """One seed."""

    def __init__(self, bank: sb.Bank, seed: int, *, few: bool = False) -> None:
        self.bank, self.seed, self.few = bank, seed, few
        self.refs = skills_of(bank, seed)
        self.skills = [cast("sb.Skill", bank.get(ref)) for ref in self.refs.values()]
        self.count = 6 if few else 100
        self.task = self.text([chain("N", "abcd", "N") or {}])
        self.rows: list[Row] = []

    def some(self, every: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """All of them, or the first."""
        return list(every.items())[: 1 if self.few else None]

    def text(self, records: Sequence[Mapping[str, Any]]) -> TextTask:
        """Records as a task."""
        return TextTask(name="strings", data=records, tokenizer="strings/base", bank=self.bank, length=96)

    def base(self) -> Any:
        """A base of one's own."""
        return sb.load("strings/base", self.bank)

    def under(self, gate: nn.Module, model: Any) -> Composed:
        """All skills on a base under a gate."""
        mixture = Mixture(model.net, self.skills)
        fuse(model.net, mixture)
        return Composed(model, gate, mixture)

    def answers(self, model: Any, records: Records, weights: Tensor | None = None) -> list[str]:
        """What a model says, all rows told their weights if they are given."""
        if weights is None:
            return self.task.answers(cast("Model", model), records, batch_size=120)
        said: list[str] = []
        options = {"tokenizer": self.task.tokenizer, "batch_size": 120}
        for i in range(0, len(records), 120):
            some = sorted(range(i, min(i + 120, len(records))), key=lambda j: len(records[j]["prompt"]))  # the order that they are answered in
            model.weights, longest = weights[some], max(len(records[j]["completion"]) for j in some)
            answers = sb.complete(model, [records[j]["prompt"] for j in some], **options, max_new_tokens=longest + 1)
            part = dict(zip(some, answers, strict=True))
            said += [part[j] for j in range(i, min(i + 120, len(records)))]
        return said

    def batches(self, records: Records) -> list[Batch]:
        """Records as batches, in their order."""
        return [rows_of([encoded(self.task.tokenizer, r) for r in records[i : i + 60]], self.task.tokenizer) for i in range(0, len(records), 60)]

    def measure(self, method: str, say: Say) -> None:
        """Rows of a method: single functions, chains, and what the parts of these come to."""
        started = time.perf_counter()
        parts = {name: _share(say, alone(name, 2 if self.few else 20, 1000 + self.seed)) for name in NAMES}
        row: Row = {"method": method, "seed": self.seed, "alone": statistics.mean(parts.values())}
        for depth in (2, 3, 4):
            records = chains(depth, NAMES, self.count, 1000 + self.seed)
            right = [given == record["completion"] for given, record in zip(say(records), records, strict=True)]
            every = self.parts_right(say, records)
            row |= {f"depth {depth}": statistics.mean(right), f"parts {depth}": statistics.mean(every)}
            row[f"gap {depth}"] = sum(e and not r for e, r in zip(every, right, strict=True)) / max(sum(every), 1)
            worst = statistics.mean(min(parts[name] for name in record["names"]) for record in records)
            row[f"weakest {depth}"] = statistics.mean(right) / worst if worst else math.nan
        self.rows.append(row | {"seconds": time.perf_counter() - started})
        print(markdown([{key: row[key] for key in ("method", "seed", "alone", "depth 2", "depth 3", "depth 4")}]).splitlines()[-1], flush=True)

    def parts_right(self, say: Say, records: Records) -> list[bool]:
        """Whether every function of a chain is answered right when it is asked alone, of the string that it gets there."""
        asked, owner = list[Mapping[str, str]](), list[int]()
        for i, record in enumerate(records):
            s = record["prompt"][len(record["names"]) : -1]
            for name in reversed(record["names"]):
                one = {"prompt": f"{name}{s}=", "completion": SKILLS[name](s), "names": name}
                asked, owner, s = [*asked, one], [*owner, i], one["completion"]
        wrong = {i for i, one, given in zip(owner, asked, say(asked), strict=True) if given != one["completion"]}
        return [i not in wrong for i in range(len(records))]


def _share(say: Say, records: Records) -> float:
    named = [{**record, "names": record["prompt"][0]} for record in records]
    return statistics.mean(given == record["completion"] for given, record in zip(say(named), named, strict=True))


def told(records: Records, weight: Callable[[int], float]) -> Tensor:
    """Weights (B, K) of the skills that prompts name, 0 for the others."""
    return torch.tensor([[weight(len(r["names"])) if name in r["names"] else 0.0 for name in NAMES] for r in records])


def stepwise(bench: Bench, model: Told, records: Records) -> list[str]:
    """What a program says that runs the skills one after another, each on what the one before it wrote: the right parts in the right order."""
    said: list[list[str]] = [[] for _ in records]
    left = [(i, record["names"], record["prompt"][len(record["names"]) : -1]) for i, record in enumerate(records)]
    while left:
        asked = [{"prompt": f"{names}{s}=", "completion": "x" * 12, "names": names[-1]} for _, names, s in left]
        answers = [given.split("=")[0] for given in bench.answers(model, asked, told(asked, lambda count: 1.0))]
        after = []
        for (i, names, _), given in zip(left, answers, strict=True):
            said[i].append(given)
            rest = given[len(names) - 1 :]
            if names[:-1] and given.startswith(names[:-1]) and rest:
                after.append((i, names[:-1], rest))
        left = after
    return ["=".join(steps) for steps in said]


def gated(bench: Bench, records: Records, view: Mapping[str, Any], *, steps: int = 500) -> Composed:
    """Gate over all skills, trained on records with the skills frozen."""
    task, model = bench.text(records), bench.base()
    see(model, view)
    batches = task.batches(batch_size=64, seed=bench.seed)
    context = torch.cat([model.context(next(batches(i))).flatten(0, -2) for i in range(8)])
    torch.manual_seed(bench.seed)
    gate = sb.MLPGate(context.shape[-1], len(NAMES), hidden=(128,), init="uniform", view=view)
    gate.standardise(context)
    composed = bench.under(gate, model)
    sb.fit(
        composed, batches, gate.parameters(), steps=10 if bench.few else steps, lr=2e-3, ema=None, weight_decay=0.0, seed=bench.seed, progress=False
    )
    return composed.eval()


def prototypes(bench: Bench, records: Mapping[str, Records], view: Mapping[str, Any], **options: Any) -> Composed:
    """Gate by the nearest prototype of the prompts that the skills were trained on."""
    model = bench.base()
    see(model, view)
    samples = [model.context(next(bench.text(part).batches(batch_size=len(part), seed=0)(0))) for part in records.values()]
    gate = Prototypes(samples[0].shape[-1], len(NAMES), view=view, **options)
    gate.place(samples)
    return bench.under(gate, model)


def arrow(bench: Bench, k: int) -> Composed:
    """Arrow over all skills."""
    return bench.under(Arrow(0, len(NAMES), k=k), bench.base())


def shown(bench: Bench, records: Records) -> list[str]:
    """What the base says where an example of every function that is asked for comes first."""
    rng, model = random.Random(bench.seed), bench.base()
    asked = []
    for record in records:
        examples = [chain(name, word(rng, 4, 5), name) for name in record["names"]]
        before = ",".join(f"{e['prompt']}{e['completion']}" for e in examples if e is not None)
        asked.append({**record, "prompt": f"{before},{record['prompt']}"})
    return bench.answers(model, asked)


def composition(bench: Bench) -> None:
    """Every level on the same prompts."""
    per = {name: of_skill(name, 200, bench.seed) for name in NAMES}
    model = Told(bench.base(), bench.skills)
    plain = bench.base()
    bench.measure("base alone", partial(bench.answers, plain))
    bench.measure("base, an example of each function before", partial(shown, bench))
    bench.measure("given the names: sum", lambda r: bench.answers(model, r, told(r, lambda count: 1.0)))
    bench.measure("given the names: mean", lambda r: bench.answers(model, r, told(r, lambda count: 1 / count)))
    bench.measure("given the names: one after another", partial(stepwise, bench, model))
    merges: dict[str, tuple[list[float] | None, dict[str, Any]]] = {
        "merge, sum": ([1.0] * 12, {}),
        "merge, mean": (None, {}),
        "merge, ties": ([1.0] * 12, {"method": "ties"}),
        "merge, tsv_m": ([1.0] * 12, {"method": "tsv_m"}),
    }
    for name, (weights, options) in bench.some(merges):
        merged = compose_at("merge", bench.base(), bench.skills, weights, **options)
        bench.measure(f"all: {name}", partial(bench.answers, merged))
    levels: dict[str, dict[str, Any]] = {"logits": {}, "vote": {}, "rerank": {"judge": "base"}}
    for level, options in bench.some(levels):
        made = compose_at(level, bench.base(), bench.skills, **options)
        bench.measure(f"all: {level}", partial(bench.answers, made))
    learned = [record for part in per.values() for record in part]
    taught = [*learned, *(r for depth in (2, 3) for r in chains(depth, TRAINED_ON, 40 if bench.few else 1000, bench.seed))]
    ways: dict[str, Callable[[], Composed]] = {
        "all: Arrow, 3 per layer and token": lambda: arrow(bench, 3),
        "all: nearest prototype of the prompt": lambda: prototypes(bench, per, {}, k=1),
        "gate per prompt, of what the skills learned": lambda: gated(bench, learned, {}),
        "gate per token, of what the skills learned": lambda: gated(bench, learned, {"tokens": True}),
        "gate per token after a block, of the same": lambda: gated(bench, learned, {"tokens": True, "layer": 1}),
        "gate per prompt, of chains of 2 and 3, too": lambda: gated(bench, taught, {}),
        "gate per token, of chains of 2 and 3, too": lambda: gated(bench, taught, {"tokens": True}),
        "gate per token after a block, of chains, too": lambda: gated(bench, taught, {"tokens": True, "layer": 1}),
    }
    for name, make in bench.some(ways):
        router = make()
        bench.measure(name, partial(bench.answers, router))
        for group, names in (("trained on", TRAINED_ON), ("held out", HELD_OUT)):
            records = chains(4, names, bench.count, 2000 + bench.seed)
            right = [given == record["completion"] for given, record in zip(bench.answers(router, records), records, strict=True)]
            bench.rows[-1][f"depth 4 of those {group}"] = statistics.mean(right)


def routing(bench: Bench) -> Iterator[Row]:
    """Which skill is meant where the prompt shows examples and names nothing."""
    rng = random.Random(3000 + bench.seed)
    asked = {name: [by_examples(name, rng) for _ in range(4 if bench.few else 20)] for name in NAMES}
    records = [{**record, "names": name} for name, part in asked.items() for record in part]
    target = torch.tensor([NAMES.index(record["names"]) for record in records])
    per = {name: [r for r in of_skill(name, 400, bench.seed) if "," in r["prompt"]] for name in NAMES}
    ways: dict[str, Composed] = {}
    views: dict[str, dict[str, Any]] = {"embeddings": {}, "2 blocks": {"layer": 2}, "3 blocks": {"layer": 3}}
    for name, view in bench.some(views):
        ways[f"nearest prototype, {name}"] = prototypes(bench, per, view, k=1)
        ways[f"gate per prompt, {name}"] = gated(bench, [r for part in per.values() for r in part], view)
    model = Told(bench.base(), bench.skills)
    for way, router in ways.items():
        chosen = torch.cat([torch.from_numpy(router.shown(batch)) for batch in bench.batches(records)]).argmax(1)
        yield _routed(bench, way, model, records, chosen, target)
    losses = _losses_of_shown(bench, model, records)
    yield _routed(bench, "least loss on the examples in the prompt", model, records, losses.argmin(1), target)
    pattern = "strings/?" if bench.seed == 0 else f"strings/?-{bench.seed}"
    found = [best_skills(bench.bank, "strings/base", bench.batches(part[:16]), top=1, pattern=pattern)[0].ref for part in asked.values()]
    right = [str(ref) == bench.refs[name] for ref, name in zip(found, NAMES, strict=True)]
    yield {"way": "search of the bank with 16 examples", "seed": bench.seed, "right": statistics.mean(right), "answered": None}
    yield _routed(bench, "told which", model, records, target, target)
    yield _routed(bench, "base alone", Told(bench.base(), [bench.skills[0].scaled(0.0)] * 12), records, target, target) | {"right": None}


def _losses_of_shown(bench: Bench, model: Told, records: Records) -> Tensor:
    """Loss of every skill (B, K) on the last of the examples that a prompt shows, after the others."""
    before = [record["prompt"].rpartition(",")[0].rpartition(">") for record in records]
    batches = bench.batches([{"prompt": f"{prompt}>", "completion": answer} for prompt, _, answer in before])
    found = []
    for one in torch.eye(len(NAMES)):
        each = []
        for batch in batches:
            model.mixture.cell.mix(one.expand(len(batch["input_ids"]), -1))
            with torch.no_grad():
                each.append(cast("Any", model.model).losses(batch))
        found.append(torch.cat(each))
    return torch.stack(found, 1)


def _routed(bench: Bench, way: str, model: Told, records: Records, chosen: Tensor, target: Tensor) -> Row:
    said = bench.answers(model, records, nn.functional.one_hot(chosen, len(NAMES)).float())
    answered = statistics.mean(given == record["completion"] for given, record in zip(said, records, strict=True))
    return {"way": way, "seed": bench.seed, "right": float((chosen == target).float().mean()), "answered": answered}


def table(rows: Sequence[Row], key: str) -> str:
    """Mean and standard deviation over the seeds of every number, by method."""
    names = list(dict.fromkeys(row[key] for row in rows if key in row))
    columns = [c for c in dict.fromkeys(c for row in rows if key in row for c in row) if c not in (key, "seed", "seconds")]
    found = []
    for name in names:
        own = [row for row in rows if row.get(key) == name]
        found.append({key: name} | {column: _spread([row.get(column) for row in own]) for column in columns})
    return markdown(found)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


def show(rows: Sequence[Row]) -> None:
    """The tables."""
    methods = [row for row in rows if "method" in row]
    print(table([{k: v for k, v in row.items() if not k.startswith(("parts", "gap", "weakest"))} for row in methods], "method") + "\n")
    print(
        table([{k: v for k, v in row.items() if k in ("method", "seed") or k.startswith(("parts", "gap", "weakest"))} for row in methods], "method"),
        "\n",
    )
    print(table([row for row in rows if "way" in row], "way") + "\n")
    for row in rows:
        if "device" in row:
            print(f"seed {row['seed']}: {row['device']}, torch {row['torch']}, commit {row['commit']}, {row['seconds']:.0f} s")


def main() -> None:
    """Run it."""
    options = parser(__doc__, "few prompts, short gates, one seed")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--ship", action="store_true", help="make base and skills in adapters/, if they are not there")
    arguments = options.parse_args()
    if arguments.from_results:
        return show(load(RESULTS))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    os.chdir(ROOT)
    shipped = sb.Bank("adapters")
    if arguments.ship:
        trained(shipped, "strings/base", pretraining(200_512), *BASE)
        skills_of(shipped, 0)
        return None
    rows = load(RESULTS) if RESULTS.exists() and not arguments.quick else []
    done = {row["seed"] for row in rows}
    for seed in [each for each in range(1 if arguments.quick else arguments.seeds) if each not in done]:
        bank, started = shipped, time.perf_counter()
        if seed:
            bank = sb.Bank("runs/strings/bank")
            bank.put(cast("sb.Base", shipped.get("strings/base")), "strings/base")
        bench = Bench(bank, seed, few=arguments.quick)
        composition(bench)
        rows += [*bench.rows, *routing(bench), {"seed": seed, **where(), "seconds": time.perf_counter() - started}]
        if not arguments.quick:
            store(RESULTS, rows)
    return show(rows)


if __name__ == "__main__":
    main()
