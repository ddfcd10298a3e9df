"""The whole road in the Python interface, on the real walker: demonstrations, base, skills, bank, merge, gate, evaluation."""

from pathlib import Path

import pytest
import torch

import skillbank as sb
from skillbank.attach import base_weights
from skillbank.bank import base_fingerprint
from skillbank.load import build
from skillbank.tasks.control import ControlTask

ROOT = Path(__file__).parents[1]
NET = {"width": 32, "blocks": 2, "time_dim": 16, "time_hidden": [16, 16]}


def task(name):
    return ControlTask(
        name=f"walker/{name}",
        demonstrations=str(ROOT / "demos/walker" / ("stand.npz" if name == "stand" else f"{name}_deterministic.npz")),
        environment=f"dm_control/walker-{name}",
        episodes=2,
        held_out=1,
        max_steps=20,
        evaluation_episodes=2,
    )


@pytest.fixture(scope="module")
def tasks():
    return {name: task(name) for name in ("stand", "walk", "run")}


def train(model, task, params, steps=30):
    batches = task.batches(batch_size=32, seed=1)
    options = {"steps": steps, "lr": 3e-3, "log_every": 10, "progress": False}
    return sb.fit(model, batches, params, validate=lambda: sb.validation_loss(model, task.validation(batch_size=2000)), **options)


def road(tasks, bank):
    """Everything once; the metrics of every station."""
    torch.manual_seed(1)
    conf = {"_target_": "skillbank.models.diffusion.DiffusionPolicy", "temperature": 0.0, **NET, **tasks["stand"].dimensions}
    model = build(conf)
    losses = [train(model, tasks["stand"], model.parameters()).rows]
    base = bank.put(sb.Base(conf, model.state_dict()), "walker/stand")
    for name in ("walk", "run"):
        model = sb.load(str(base), bank)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        losses.append(train(model, tasks[name], sb.fresh(model.net, rank=4)).rows)
        skill = sb.read(model.net)
        sb.attach(model.net, skill)
        kept = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[key], before[key]) for key in before)
        card = {"base": {"ref": str(base), "fingerprint": base_fingerprint(base_weights(model.net, skill), skill)}}
        bank.put(skill, f"walker/{name}", card={**card, "metrics": {"loss": losses[-1][-1]["loss"]}})
    names = ("walker/walk@1", "walker/run@1")
    skills = [bank.get(name) for name in names]
    bank.put(sb.merge(skills, [0.6, 0.4], "svd", rank=4), "walker/merged", card={"base": str(base)})
    conf = {"_target_": "skillbank.gate.MLPGate", "context_dim": 24, "skills": 2, "hidden": [16]}
    gate = build(conf)
    composed = sb.Composed(sb.load(str(base), bank), gate, skills)
    losses.append(train(composed, tasks["run"], gate.parameters()).rows)
    bank.put(sb.Composition(str(base), names, gate=conf, tensors=gate.state_dict()), "walker/run-from-stand-walk")
    assert bank.verify() == []
    refs = ("walker/stand", *names, "walker/merged", "walker/run-from-stand-walk")
    return losses, {ref: tasks["run"].evaluate(sb.load(ref, bank)) for ref in refs}


def test_the_road_and_its_repetition(tasks, tmp_path):
    losses, results = road(tasks, sb.Bank(tmp_path / "one"))
    for rows in losses:
        assert [row["step"] for row in rows] == [10, 20, 30]
        assert rows[-1]["validation"] > 0
    assert losses[0][-1]["loss"] < losses[0][0]["loss"]
    for ref, metrics in results.items():
        assert metrics["episodes"] == 2, ref
        assert 0 < metrics["return_min"] <= metrics["return"] <= metrics["return_max"] <= 20, ref
    assert len({metrics["return"] for metrics in results.values()}) == len(results)
    assert (losses, results) == road(tasks, sb.Bank(tmp_path / "two"))
