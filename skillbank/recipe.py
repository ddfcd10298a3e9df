"""From a configuration to a version: what `train.py` and `compose.py` do.

A configuration is the resolved content of conf/train.yaml or conf/compose.yaml; it is kept in the card of what was made from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from skillbank.attach import attach, fresh, read
from skillbank.bank import Bank, Base, Composition, Ref
from skillbank.bank.records import plain_weights
from skillbank.bank.refs import check_name
from skillbank.exchange import adapter_options
from skillbank.fit import Fit, fit, validation_loss
from skillbank.folding import fold
from skillbank.gate import MLPGate
from skillbank.kshot import best_skills
from skillbank.learn import search_weights
from skillbank.load import build, load, skills_on_base
from skillbank.merge import merge
from skillbank.mixture import Composed, Mixture, see
from skillbank.model import ModelModule, Task, contexts
from skillbank.routers import Prototypes
from skillbank.runtime.fused import fuse
from skillbank.runtime.products import quicken
from skillbank.skill import Skill, stack
from skillbank.statistics import start_from_inputs

__all__ = ["Made", "compose", "composition_name", "exact_conf", "merge_versions", "run_key", "task_of", "train"]

Conf = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Made:
    """What a configuration came to.

    Args:
        thing: for the bank.
        name: the name that it gets there.
        card: its card's fields.
        model: the model that it is, evaluated or not.
        task: what it was made on.
        folder: of the run's files.

    """

    thing: Base | Skill | Composition
    name: str
    card: dict[str, Any]
    model: ModelModule
    task: Task
    folder: Path


def train(conf: Conf, bank: Bank, *, resume: bool = True) -> Made:
    """Train a base, or a skill on a base.

    Args:
        conf: as in conf/train.yaml.
        bank: where the base and the skills to stand on are; nothing is put into it.
        resume: keep checkpoints under runs/ and go on from what is there.

    Raises:
        ValueError: references that do not go together, a bad name, or no steps.

    """
    check_name(conf["name"])
    conf, task, critics, metrics = _weighted(conf, bank)
    base = None if conf["base"] is None else str(bank.resolve(conf["base"]))
    if base is not None and (kind := bank.card(base).kind) != "base":
        raise ValueError(f"{base!r} is a {kind}, a base is needed: give base={bank.base_of([base])}, and start=[...] to stand on skills")
    start_base, _, foundation, start = skills_on_base(bank, conf["start"]) if conf["start"] else (base, None, [], [])
    if start_base != base:
        raise ValueError(f"the skills to stand on belong to base {start_base!r}, the new one is to have {base!r}: give base={start_base}")
    torch.manual_seed(conf["seed"])
    if base is None:
        model = cast("ModelModule", _instantiate(conf["model"], **task.dimensions))
        params: Sequence[nn.Parameter] = list(model.parameters())
        quicken(model.net)
    else:
        model = load(base, bank)
        for skill in foundation:
            fold(model.net, skill)
        seen = conf["lora"].get("init") == "eva"
        params = fresh(model.net, **{**conf["lora"], **({"init": None} if seen else {})})
        if seen:
            start_from_inputs(model, task.batches(batch_size=conf["batch_size"], seed=conf["seed"])(0), steps=16)
        fuse(model.net)
        for layer in (module for module in model.net.modules() if isinstance(module, nn.Dropout)):
            layer.p = conf["dropout"]
    keys = ("task", "model", "lora", "dropout", "fit", "seed", "batch_size")
    folder = _folder("train", conf["name"], conf, keys, bank, [ref for ref in (base, *start, *critics) if ref is not None], task)
    metrics |= _fit(model, params, conf, conf["name"], task, folder if resume else None)
    card = {"conf": conf, "data": task.data, "metrics": metrics, "parents": start, "base": base}
    thing = Base({**conf["model"], **task.dimensions}, model.state_dict()) if base is None else stack([*foundation, read(model.net)])
    return Made(thing, conf["name"], card, model, task, folder)


def compose(conf: Conf, bank: Bank, *, resume: bool = True) -> Made:
    """Merge skills, or train a gate over them.

    Args:
        conf: as in conf/compose.yaml.
        bank: where the skills are; nothing is put into it.
        resume: as in `train`.

    Raises:
        ValueError: both or neither of merge and gate, a critic or online steps for a merge, skills that do not go together, a search without base or
            examples, or a gate or a task that online training cannot take; a bad name.
        ImportError: online training needs a package that is not installed.

    """
    chosen, gate, online = conf.get("merge"), conf.get("gate"), dict(conf.get("online") or {"steps": 0})
    if (chosen is None) == (gate is None):
        raise ValueError("give either a merge (merge=stack, merge=svd) or a gate (gate=mlp, gate=constant)")
    if chosen is not None and conf.get("critic") is not None:
        raise ValueError(f"a merge learns from no examples that critic={conf['critic']} could weight: leave it out, or train a gate")
    if chosen is not None and online["steps"]:
        raise ValueError(f"a merge has no gate that online.steps={online['steps']} could train: leave it out, or give gate=mlp")
    if conf["skills"] == "search":
        conf = {**conf, "skills": _searched(conf, bank)}
    conf, task, critics, metrics = _weighted(conf, bank)
    base, model, skills, refs = skills_on_base(bank, conf["skills"])
    name = check_name(conf["name"] or composition_name(task.name, base, refs))
    keys = ("task", "gate", "merge", "weights", "regulariser", "standardise", "fit", "online", "seed", "batch_size")
    folder = _folder("compose", name, conf, keys, bank, [base, *refs, *critics], task)
    torch.manual_seed(conf["seed"])
    if chosen is not None:
        data = {}
        if conf["weights"] == "search":
            looked_at = islice(task.batches(batch_size=conf["batch_size"], seed=conf["seed"])(0), 4)
            conf, data = {**conf, "weights": search_weights(model, skills, looked_at, seed=conf["seed"])[0]}, task.data
        options = {key: value for key, value in {**chosen, "weights": conf["weights"]}.items() if value is not None}
        merged = merge(skills, **options)
        assert merged.certificate is not None
        attach(model.net, merged)
        composition = Composition(base, refs, merge=options)
        metrics = {"merge_error": merged.certificate.error, "merge_energy": merged.certificate.energy}
        return Made(composition, name, {"conf": conf, "data": data, "metrics": metrics}, model, task, folder)
    assert gate is not None
    see(model.eval(), gate.get("view") or {})
    gate = {**gate, "context_dim": model.context(next(task.batches(batch_size=1, seed=0)(0))).shape[-1], "skills": len(skills)}
    network, batches = build(gate), task.batches(batch_size=conf["batch_size"], seed=conf["seed"])
    if conf["standardise"] and isinstance(network, MLPGate):
        network.standardise(torch.cat([contexts(model, batch) for batch in islice(batches(0), 40)]))
    if online["steps"]:
        _online().check_online(network, task)
    data = task.data
    if isinstance(network, Prototypes):
        data = _place(network, model, [task_of(ref, bank) for ref in refs], conf)
    mixture = Mixture(model.net, skills)
    fuse(model.net, mixture)
    composed = cast("ModelModule", Composed(model, network, mixture, regulariser=conf["regulariser"]))
    if (params := list(network.parameters())) and conf["fit"]["steps"]:
        metrics |= _fit(composed, params, conf, name, task, folder if resume else None)
    if online["steps"]:
        metrics |= _online().reinforce(composed, task, seed=conf["seed"], progress=conf["fit"].get("progress", True), **online).metrics
    composition = Composition(base, refs, gate=gate, tensors=network.state_dict())
    return Made(composition, name, {"conf": conf, "data": data, "metrics": metrics}, composed, task, folder)


def _online() -> Any:
    """`skillbank.online`, whose package is optional."""
    try:
        return import_module("skillbank.online")
    except ImportError as error:
        raise ImportError(f"online training needs {error.name}: pip install 'skillbank[online]'") from None


def _weighted(conf: Conf, bank: Bank) -> tuple[Conf, Task, list[str], dict[str, float]]:
    """The task, its examples weighted if the configuration names a critic: (configuration with exact references, task, references, metrics)."""
    conf = exact_conf(conf, bank)
    task = _task(conf, bank)
    if conf.get("critic") is None:
        return conf, task, [], {}
    ref = str(bank.resolve(conf["critic"]))
    critic, weigh = load(ref, bank), getattr(task, "weigh", None)
    if not hasattr(critic, "advantages"):
        raise ValueError(f"{ref!r} is a {type(critic).__name__}, a critic is needed to weight examples: train one with model=critic fit=critic")
    if weigh is None:
        raise ValueError(f"examples of a {type(task).__name__}, as task {task.name!r}, cannot be weighted: use a task of transitions (task=offline)")
    return {**conf, "critic": ref}, task, [ref], {"effective_sample_size": weigh(critic)}


def _place(network: Prototypes, model: ModelModule, tasks: Sequence[Task], conf: Conf) -> dict[str, str]:
    """Put prototypes where the data of every skill are; the hashes of what was looked at."""
    samples = [islice(task.batches(batch_size=conf["batch_size"], seed=conf["seed"])(0), 8) for task in tasks]
    network.place([torch.cat([contexts(model, batch) for batch in batches]) for batches in samples])
    return {source: digest for task in tasks for source, digest in task.data.items()}


def _searched(conf: Conf, bank: Bank) -> list[str]:
    """Skills that do best on a few examples, the best one last: there a gate starts."""
    if conf["base"] is None or conf["search"]["examples"] is None:
        given = f"base={conf['base']} and search.examples={conf['search']['examples']}"
        raise ValueError(f"skills=search looks for skills of a base by examples: give base=... and search.examples=..., got {given}")
    return [str(each.ref) for each in reversed(best_skills(bank, conf["base"], **conf["search"]))]


def composition_name(task: str, base: str, skills: Sequence[str]) -> str:
    """`walker/run`, base `walker/stand@1`, skills walk and run -> `walker/run-from-stand-walk`."""
    own = [ref.split("@")[0] for ref in (base, *skills)]
    return "-".join([f"{task}-from", *(name.rpartition("/")[2] for name in own if name != task)])


def merge_versions(
    refs: Sequence[str | Ref], bank: Bank, *, weights: Sequence[Any] | None = None, method: str = "stack", **options: Any
) -> tuple[Skill, dict[str, Any], dict[str, Any]]:
    """Merge skills of a bank; the base is not loaded.

    Args:
        refs: skills.
        bank: where they are; nothing is put into it.
        weights: as in `merge`.
        method: a name in `METHODS`.
        options: what the method takes, plain values.

    Returns:
        The skill, the fields of its card (base, parents with weights, `conf` with the recipe and the certificate, metrics) and the options of its
        adapter: `card` and `adapter` of `Bank.put`.

    Raises:
        UnknownRef: no such version.
        ValueError: one is no skill, or the skills belong to different bases; otherwise as `merge`.

    """
    weights, exact = plain_weights(weights), [bank.resolve(ref) for ref in refs]
    cards, things = [bank.card(ref) for ref in exact], [bank.get(ref) for ref in exact]
    skills = [thing for thing in things if isinstance(thing, Skill)]
    if len(skills) < len(things):
        other = next(f"{ref} is a {card.kind}" for ref, card in zip(exact, cards, strict=True) if card.kind != "skill")
        raise ValueError(f"only skills can be merged, {other}")
    bases = {str(ref): card.base_name for ref, card in zip(exact, cards, strict=True)}
    if len(set(bases.values())) > 1:
        raise ValueError(f"skills of different bases do not go together: {bases}")
    skill = merge(skills, weights, method, **options)
    assert skill.certificate is not None
    recipe = {key: value for key, value in {"method": method, "weights": weights, **options}.items() if value is not None}
    each = [None] * len(exact) if weights is None else [w if isinstance(w, int | float) else None for w in weights]
    parents = [{"ref": str(ref), "weight": w, "hash": card.hash} for ref, w, card in zip(exact, each, cards, strict=True)]
    certificate = skill.certificate.to_dict()
    metrics = {"merge_error": certificate["error"], "merge_energy": certificate["energy"]}
    measured = {key: value for key, value in metrics.items() if value is not None}
    fields = {"parents": parents, "conf": {"merge": recipe, "certificate": certificate}, "metrics": measured}
    base = cards[0].base
    return skill, fields if base is None else {**fields, "base": base["ref"] or {"name": base["name"]}}, adapter_options(exact, bank)


def _fit(model: ModelModule, params: Any, conf: Conf, name: str, task: Task, folder: Path | None) -> dict[str, float]:
    """Train, and return the last row of the metrics."""
    result: Fit = fit(
        model,
        task.batches(batch_size=conf["batch_size"], seed=conf["seed"]),
        params,
        seed=conf["seed"],
        folder=folder,
        validate=(lambda: validation_loss(model, task.validation(batch_size=1024))) if getattr(task, "held_out", True) else None,
        **conf["fit"],
        **conf["logger"],
        run={"name": name, "conf": conf},
    )
    return {key: value for key, value in result.rows[-1].items() if key != "lr"} | {"seconds": result.seconds}


def _folder(kind: str, name: str, conf: Conf, keys: Sequence[str], bank: Bank, made_from: Sequence[str], task: Task) -> Path:
    """Folder of a run under runs/: the same command finds the same folder again and resumes, any other gets a new one."""
    chosen = {key: conf.get(key) for key in keys} | {"fit": {key: value for key, value in conf["fit"].items() if key != "compile"}}  # same losses
    return Path("runs") / kind / name / run_key(chosen, [bank.card(ref).hash for ref in made_from], task.data)


def run_key(*made_from: object) -> str:
    """Short name of what a run is made of, plain values such as hashes of skills and data: a run of another makes another folder."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:10]


def task_of(ref: str | Ref, bank: Bank) -> Task:
    """The task that a version was made on, by its card.

    Raises:
        UnknownRef: no such version.
        ValueError: its card names no task, because `train` and `compose` did not make it.

    """
    card = bank.card(ref)
    if "task" not in card.conf:
        raise ValueError(f"the card of {str(ref)!r} names no task: only train.py and compose.py write one there; give another version's, or examples")
    return _task(exact_conf(card.conf, bank, card.base and card.base["ref"]), bank)


def exact_conf(conf: Conf, bank: Bank, base: str | None = None) -> Conf:
    """The configuration, its task with exact references; `base` is that of a card, whose task may name it without number."""
    task, own = dict(conf["task"]), conf["task"].get("bank") == conf.get("bank")
    for key in ("tokenizer", "classes") if "bank" in task else ():
        name = task.get(key)
        if own and base is not None and name == conf.get("base"):
            task[key] = base
        elif isinstance(name, str) and name != "bytes" and not Path(name).exists():
            with suppress(LookupError, ValueError, FileNotFoundError):  # a name on the Hub
                task[key] = str((bank if own else Bank(task["bank"])).resolve(name))
    return {**conf, "task": task}


def _task(conf: Conf, bank: Bank) -> Task:
    """The task of a configuration; what it takes from the configuration's bank, it takes from this one."""
    own = {"bank": str(bank.place)} if "bank" in conf["task"] and conf["task"]["bank"] == conf.get("bank") else {}
    return cast("Task", _instantiate(conf["task"], **own))


def _instantiate(conf: Conf, **more: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(dict(conf), **more, _convert_="all")
