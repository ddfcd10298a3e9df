"""Every file under conf/ is used for real, and the two commands of the README run, resume, and answer mistakes in one line."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import skillbank as sb
from skillbank.load import build
from tests.commands import environment
from tests.tiny import random_skill, tiny_batch, tiny_policy

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
YAMLS = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
CHOICES = [path for path in YAMLS if len(path.parts) > 1]
OPTIONAL_IN = {
    "experiment": ("train", "compose"),
    "gate": ("compose",),
    "merge": ("compose",),
    "model": ("train",),
    "lora": ("train",),
}
TEXT = {"text": "causal", "labels": "classifier"}
"""Tasks whose records are the user's, and models for them."""
MADE = "car/"
"""Tasks whose demonstrations are made, not shipped; test_bullet.py runs them."""
GIVEN = {name: ["task.name=a", "task.data=b"] for name in TEXT} | {"offline": ["task.name=a", "task.demonstrations=b", "task.environment=c"]}
"""What a task needs to be told; test_offline.py runs the one that is not of text."""


def choices(group):
    return [path.relative_to(group).as_posix() for path in CHOICES if path.parts[0] == group]


def composed(name, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, list(overrides))


def test_every_group_is_known():
    assert len(YAMLS) > 10
    assert {path.parts[0] for path in CHOICES} == {"experiment", "fit", "gate", "logger", "lora", "merge", "model", "task"}
    assert {path.as_posix() for path in YAMLS if len(path.parts) == 1} == {"train", "compose"}


@pytest.mark.parametrize("choice", CHOICES, ids=Path.as_posix)
def test_every_choice_composes(choice):
    """In at least one of the two commands, and it resolves."""
    group, name = choice.parts[0], choice.relative_to(choice.parts[0]).as_posix()
    done = []
    for command in OPTIONAL_IN.get(group, ("train", "compose")):
        given = ["skills=[a,b]"] if command == "compose" else []
        given += GIVEN.get(name, []) if group == "task" else []
        try:
            conf = composed(command, f"{group}={name}", *given)
        except HydraException:
            if group != "experiment":
                raise
            continue
        OmegaConf.to_container(conf, resolve=True, throw_on_missing=True)
        done.append(command)
    assert done


@pytest.mark.parametrize("name", [name for name in choices("task") if name not in GIVEN and not name.startswith(MADE)])
def test_every_task(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = instantiate(composed("train", f"task={name}").task, _convert_="all")
    assert task.name == name
    batch = next(task.batches(batch_size=4, seed=0)(0))
    assert batch["observation"].shape == (4, task.observation_dim)
    assert len(list(task.validation(batch_size=1024))) > 0
    assert task.environment_seeds()


@pytest.mark.parametrize("name", TEXT)
def test_every_task_of_text_and_its_model(name, tmp_path):
    records = [{"prompt": "a", "completion": "b", "text": "a", "label": label} for label in "cd"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = [f"task={name}", f"model={TEXT[name]}", "task.name=a", f"task.data={tmp_path}/a.jsonl", "task.tokenizer=bytes"]
    conf = composed("train", *given)
    task = instantiate(conf.task, _convert_="all")
    model = instantiate(conf.model, **task.dimensions, _convert_="all").eval()
    sb.check_model(model, next(task.batches(batch_size=2, seed=0)(0)))


@pytest.mark.parametrize("name", [name for name in choices("model") if name not in TEXT.values()])
def test_every_model(name):
    model = instantiate(composed("train", f"model={name}").model, observation_dim=5, action_dim=3, _convert_="all")
    batch = tiny_batch(horizon=getattr(model, "horizon", 1))
    came = {"reward": torch.ones(6), "next_observation": batch["observation"], "mask": torch.ones(6)}
    sb.check_model(model, batch | came if name == "critic" else batch)


@pytest.mark.parametrize("name", choices("lora"))
def test_every_lora(name):
    policy = tiny_policy()
    conf = OmegaConf.to_container(composed("train", f"lora={name}").lora)
    assert len(sb.fresh(policy.net, **conf)) == 2 * len(sb.read(policy.net))


@pytest.mark.parametrize("name", choices("gate"))
def test_every_gate(name):
    gate = OmegaConf.to_container(composed("compose", f"gate={name}", "skills=[a,b]").gate)
    policy = tiny_policy()
    model = sb.Composed(policy, build({**gate, "context_dim": 5, "skills": 2}), [random_skill(policy.net, seed=seed) for seed in (1, 2)])
    assert model.shown(tiny_batch()).shape == (6, 2)


@pytest.mark.parametrize("name", choices("merge"))
def test_every_merge(name):
    merge = OmegaConf.to_container(composed("compose", f"merge={name}", "skills=[a,b]").merge)
    net = tiny_policy().net
    options = {key: value for key, value in merge.items() if value is not None}
    merged = sb.merge([random_skill(net, seed=seed) for seed in (1, 2)], **options)
    assert merged.certificate.method == merge["method"]


@pytest.mark.parametrize("name", choices("fit"))
def test_every_fit(name):
    policy = tiny_policy()
    conf = OmegaConf.to_container(composed("train", f"fit={name}", "fit.steps=2").fit)

    def batches(start):
        while True:
            yield tiny_batch()

    assert sb.fit(policy, batches, sb.fresh(policy.net), progress=False, **conf).steps == 2


SMALL = ["+model.width=16", "+model.blocks=1", "+model.time_dim=8", "+model.time_hidden=[8,8]"]
QUICK = ["fit.steps=12", "fit.precision=no", "+fit.log_every=4", "+fit.checkpoint_every=4", "+fit.device=cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, command):
    """A folder with tiny demonstrations and a bank that holds a base and two skills, all made by the commands."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for name in ("stand", "walk", "run"):
        arrays = {"observations": rng.normal(size=(3, 30, 24)), "actions": rng.uniform(-1, 1, (3, 30, 6)), "rewards": rng.random((3, 30))}
        np.savez(folder / f"{name}.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    code, out, err = command(folder, "train", "task=walker/stand", "fit=base", *SMALL, *common("stand"))
    assert (code, out.split()[:1]) == (0, ["walker/stand@1"]), err
    code, out, err = command(folder, "train", "-m", "base=walker/stand", "seed=0,1", "lora.rank=2", *common("walk"))
    assert code == 0, err
    code, out, err = command(folder, "train", "task=walker/run", "base=walker/stand", "start=[walker/walk]", "lora.rank=2", *common("run"))
    assert (code, out.split()[:1]) == (0, ["walker/run@1"]), err
    return folder


def common(name):
    rehearsal = [] if name == "stand" else ["task.rehearsal.demonstrations=stand.npz", "task.rehearsal.episodes=2"]
    return [*rehearsal, f"task.demonstrations={name}.npz", "++task.episodes=2", "task.held_out=1", "bank=bank", "episodes=0", *QUICK]


def test_train(home):
    bank = sb.Bank(home / "bank")
    assert bank.verify() == []
    assert bank.versions("walker/walk") == [1, 2]
    one, two = bank.get("walker/walk@1"), bank.get("walker/walk@2")
    assert one.fingerprint != two.fingerprint
    card = bank.card("walker/walk@2")
    assert card.conf["seed"] == 1
    assert card.base["ref"] == "walker/stand@1"
    assert list(card.data) == ["stand.npz", "walk.npz"]
    assert card.metrics["step"] == 12
    assert [parent["ref"] for parent in bank.card("walker/run").parents] == ["walker/walk@2"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_sweep_in_processes_is_the_sweep_in_a_row(home, launcher):
    arguments = ["-m", f"hydra/launcher={launcher}", "base=walker/stand", "seed=0,1", "lora.rank=2", f"name=walker/{launcher}", *common("walk")]
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=home, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    bank = sb.Bank(home / "bank")
    made = {bank.card(f"walker/{launcher}@{version}").conf["seed"]: bank.get(f"walker/{launcher}@{version}") for version in (1, 2)}
    assert [made[seed].fingerprint for seed in (0, 1)] == [bank.get(f"walker/walk@{version}").fingerprint for version in (1, 2)]
    assert bank.verify() == []


def test_compose_a_gate_with_its_report(home, command):
    """The command of the README, evaluated for a few steps in the simulator."""
    arguments = ["task=walker/run", "skills=[walker/walk,walker/run]", "gate=mlp", *common("run"), "episodes=1", "+task.max_steps=3"]
    code, out, err = command(home, "compose", *arguments)
    assert code == 0, err
    table = [[cell.strip() for cell in line.split("|")[1:3]] for line in out.splitlines() if line.startswith("|")]
    rows = ["row", "--", "base, untouched", "walker/walk@2, untouched", "walker/run@1, untouched", "walker/run-from-stand-walk@1"]
    assert [row for row, _ in table][0::1][0] == rows[0]
    assert [row for row, _ in table][2:] == rows[2:]
    report = home / re.search(r"report: (.*)", out).group(1)
    assert "walker/run-from-stand-walk@1" in report.read_text()
    bank = sb.Bank(home / "bank")
    card = bank.card("walker/run-from-stand-walk")
    assert float(table[-1][1]) == pytest.approx(card.metrics["return"], rel=0.01)
    assert bank.get("walker/run-from-stand-walk").tensors["deviation"].std() > 0
    assert isinstance(sb.load("walker/run-from-stand-walk", bank), sb.Composed)


def test_compose_a_merge(home, command):
    """Evaluated as the merge that it is, not as the base."""
    arguments = [
        "task=walker/run",
        "skills=[walker/walk@1,walker/run]",
        "merge=svd",
        "merge.rank=1",
        "weights=[40,-30]",
        "name=merged",
        "report=false",
    ]
    code, _, err = command(home, "compose", *arguments, *common("run"), "episodes=1", "+task.max_steps=3")
    assert code == 0, err
    bank = sb.Bank(home / "bank")
    card = bank.card("merged")
    assert 0 < card.metrics["merge_error"] < 1
    conf = OmegaConf.create(card.conf["task"])
    conf.demonstrations, conf.rehearsal.demonstrations = str(home / "run.npz"), str(home / "stand.npz")
    task = instantiate(conf, _convert_="all")
    assert card.metrics["return"] == task.evaluate(sb.load("merged", bank), episodes=1)["return"]
    assert card.metrics["return"] != task.evaluate(sb.load("walker/stand", bank), episodes=1)["return"]


def test_what_the_bank_has_already_is_reported_with_what_this_run_found(home, command):
    bank = sb.Bank(home / "bank")
    merge = {"method": "svd", "rank": 1, "weights": [30, -20]}
    bank.put(sb.Composition("walker/stand", ("walker/walk@1", "walker/run@1"), merge=merge), "known")
    arguments = ["task=walker/run", "skills=[walker/walk@1,walker/run]", "merge=svd", "merge.rank=1", "weights=[30,-20]", "name=known"]
    code, out, err = command(home, "compose", *arguments, *common("run"), "episodes=1", "+task.max_steps=3")
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if line.startswith("| known@1 ")]
    assert bank.card("known").metrics == {}
    text = (home / re.search(r"report: (.*)", out).group(1)).read_text()
    assert row.split("|")[2].strip() in text
    assert text.count("<td>known@1</td>") == 1


def test_a_killed_command_resumes(home, command):
    arguments = ["task=walker/walk", "base=walker/stand", "fit.steps=150", "lora.rank=3", *common("walk")[:-5], *QUICK[1:]]
    whole = home / "whole"
    for folder in (whole, home / "killed"):
        folder.mkdir()
        (folder / "bank").symlink_to(home / "bank")
        for name in ("stand.npz", "walk.npz"):
            (folder / name).symlink_to(home / name)
    process = start(home / "killed", "train", *arguments, "name=killed/walk")
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if any((home / "killed/runs").rglob("checkpoint.safetensors")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    bank = sb.Bank(home / "bank")
    assert "killed/walk" not in {entry.ref.name for entry in bank.list()}
    assert len(metrics(home / "killed")) < 100
    assert command(home / "killed", "train", *arguments, "name=killed/walk")[0] == 0
    assert command(whole, "train", *arguments, "name=whole/walk")[0] == 0
    assert metrics(home / "killed") == metrics(whole)
    assert bank.get("killed/walk").fingerprint == bank.get("whole/walk").fingerprint
    assert bank.verify() == []


def metrics(folder):
    (path,) = (folder / "runs").rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train",
            ["task=walker/wlak"],
            r"skillbank: no task 'walker/wlak': did you mean 'walker/walk'\? There is .*labels, offline, text, walker/run, ",
        ),
        ("train", ["fit.step=3"], r"Key 'step' is not in struct"),
        ("compose", ["skills=[a]", "merge=tiez"], r"Could not find 'merge/tiez'(.|\n)*Available options in 'merge':(.|\n)*\s+ties"),
        ("train", ["task.environment=dm_control/walker-wlak", "episodes=1", "fit.steps=1"], "did you mean 'dm_control/walker-walk'"),
        ("train", ["task.demonstrations=nowhere.npz"], "skillbank: no demonstration file 'nowhere.npz'"),
        ("train", ["base=walker/satnd"], "skillbank: no 'walker/satnd' .* did you mean 'walker/stand'"),
        ("train", ["base=walker/walk@1"], "skillbank: 'walker/walk@1' is a skill, a base is needed: give base=walker/stand@1"),
        ("train", ["base=walker/stand", "start=[walker/stand]"], "skillbank: 'walker/stand@1' is a base, a skill is needed here"),
        ("train", ["start=[walker/walk]"], "skillbank: the skills to stand on belong to base 'walker/stand@1'"),
        ("train", ["base=walker/stand", "+fit.device=cuda"], "skillbank: device=cuda was asked for, but torch sees no GPU"),
        ("train", ["name=../../x"], "skillbank: '../../x' is not a name: use lower-case segments"),
        ("train", ["bank=file:///nowhere"], r"skillbank: Bank\('file:///nowhere'\) is elsewhere, where it is only read"),
        ("train", ["base=walker/stand", "fit.steps=0"], "skillbank: steps=0 trains nothing: give at least 1"),
        ("compose", ["skills=[walker/walk]", "merge=svd", "name=../../x"], "skillbank: '../../x' is not a name: use lower-case segments"),
        ("compose", ["skills=[walker/walk]", "gate=mlp", "bank=memory://nowhere"], "skillbank: Bank.* is elsewhere, where it is only read"),
        ("compose", ["skills=[walker/walk]"], "skillbank: give either a merge"),
        ("compose", ["skills=[walker/stand]", "gate=mlp"], "skillbank: .*is a base, a skill is needed here"),
        ("compose", ["gate=mlp"], "skillbank: Missing mandatory value: skills"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_are_answered_without_a_traceback(home, command, script, arguments, message):
    if "device=cuda" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before, trained = sorted((home / "bank").rglob("*")), sorted(home.rglob("metrics.jsonl"))
    given = {each.split("=")[0].lstrip("+") for each in arguments}
    others = [each for each in common("walk") if each.split("=")[0].lstrip("+") not in given]
    code, _, err = command(home, script, *arguments, *others)
    assert code == 1, err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert sorted((home / "bank").rglob("*")) == before
    if "task.environment" not in given:  # which is looked for when the model is evaluated
        assert sorted(home.rglob("metrics.jsonl")) == trained


def start(folder, script, *arguments):
    line = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_mistake_in_a_terminal(home):
    process = start(home, "train", "base=walker/satnd", *common("walk"))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert "did you mean 'walker/stand'" in err
