"""A gate trained by reward: it beats any constant weights, is what PPO would do, and goes from the command line to the bank and back."""

import re
import sys
import tempfile

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn

import skillbank as sb
from skillbank import recipe
from skillbank.fit import fit
from skillbank.gate import ConstantGate, MLPGate
from skillbank.mixture import Composed
from skillbank.models.critics import Critic
from skillbank.online import check_online, reinforce
from skillbank.routers import Prototypes
from skillbank.skill import Skill
from skillbank.tasks.control import ControlTask
from skillbank.tasks.labels import LabelTask
from skillbank.tasks.offline import OfflineTask
from tests.test_configs import SMALL
from tests.test_offline import configured


class Halves(gymnasium.Env):
    """A place, drawn anew in every step; the reward is 1 for action 1 on the right half and for -1 on the left, and 0 for the opposite."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.draw(), {}

    def draw(self):
        self.place = self.np_random.uniform(-1, 1)
        return np.array([self.place, 1], np.float32)

    def step(self, action):
        reward = 1 - abs(action.item() - np.sign(self.place)) / 2
        return self.draw(), reward, False, False, {}


class Line(nn.Module):
    """A policy that is one linear layer: action (B, H, 1)."""

    def __init__(self, horizon=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, horizon, bias=False))
        nn.init.zeros_(self.net[0].weight)

    def forward(self, batch):
        return (batch.get("weight", 1) * (self.predict(batch) - batch["action"]).square().flatten(1).mean(1)).mean()

    def context(self, batch):
        return batch["observation"]

    def predict(self, batch):
        return self.net(batch["observation"])[..., None]


@pytest.fixture
def task(tmp_path):
    """Halves, in episodes of 20 steps; the demonstrations show its places only."""
    rng = np.random.default_rng(0)
    observations = np.stack([rng.uniform(-1, 1, (3, 20)), np.ones((3, 20))], -1)
    arrays = {"observations": observations, "actions": np.zeros((3, 20, 1)), "rewards": np.zeros((3, 20))}
    np.savez(tmp_path / "a.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    gymnasium.register("Halves-v0", entry_point=Halves, max_episode_steps=20)
    yield lambda **options: ControlTask(name="halves", demonstrations=str(tmp_path / "a.npz"), environment="Halves-v0", **options)
    del gymnasium.registry["Halves-v0"]


def always(action, horizon=1):
    """A skill that does the same everywhere."""
    return Skill({"0": (torch.tensor([[0.0, 1.0]]), torch.full((horizon, 1), float(action)))})


def halves(horizon=1, **options):
    """Two skills of which each is right on its half, under a gate with contexts in standard deviations."""
    gate = MLPGate(2, 2, **{"hidden": (16,), "init": "uniform", **options})
    gate.standardise(torch.stack([torch.linspace(-1, 1, 50), torch.linspace(0.9, 1.1, 50)], 1))
    return Composed(Line(horizon), gate, [always(-1, horizon), always(1, horizon)])


FAST = {"environments": 8, "lr": 3e-3, "progress": False}


def test_it_beats_the_best_constant_weights_and_leaves_the_rest_alone(task):
    composed = halves()
    before = {name: value.clone() for name, value in composed.model.state_dict().items()}
    done = reinforce(composed, task(), steps=8000, discount=0.0, **FAST)
    assert all(torch.equal(value, before[name]) for name, value in composed.model.state_dict().items())
    assert done.metrics["online_steps"] == 16 * 512
    constants = [task().evaluate(Composed(Line(), ConstantGate(2, 2, weights=(0, w)), [always(-1), always(1)]))["return"] for w in (-1, 0, 0.3, 1)]
    best, reached = max(constants), task().evaluate(composed)["return"]
    assert best < 14  # of 20; 10 is what constant weights can expect
    assert reached > 17
    assert done.metrics["online_return"] == pytest.approx(reached, rel=0.2)


@pytest.mark.parametrize("init", ["uniform", "official"])
def test_the_gate_is_the_mean_of_ppo_which_leaves_no_files(task, init, tmp_path, monkeypatch):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    composed = halves(init=init)
    start = composed.gate.body[0].weight.clone()
    done = reinforce(composed, task(), steps=512, **FAST)
    contexts = torch.randn(100, 2)
    actions, _ = done.algorithm.predict(composed.gate.standardised(contexts).numpy(), deterministic=True)
    assert not torch.equal(composed.gate.body[0].weight, start)
    torch.testing.assert_close(composed.gate(contexts).detach(), torch.from_numpy(actions), rtol=0, atol=1e-6)
    assert not [*temporary.iterdir()]


def test_it_starts_where_the_gate_is(task):
    composed = halves()
    with torch.no_grad():
        composed.gate.head.weight.normal_()
    contexts = torch.randn(100, 2)
    before = composed.gate(contexts).detach()
    reinforce(composed, task(), steps=1, **{**FAST, "lr": 1e-9})
    torch.testing.assert_close(composed.gate(contexts).detach(), before, rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_gate(task):
    gates = []
    for seed in (0, 0, 1):
        composed, state = halves(), torch.get_rng_state()
        torch.manual_seed(5)
        composed.gate.body[0].weight.data.normal_()
        torch.set_rng_state(state)
        reinforce(composed, task(), steps=1000, seed=seed, **FAST)
        assert torch.equal(torch.get_rng_state(), state)
        gates.append(composed.gate.head.weight)
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_several_actions_a_decision_until_the_episode_ends(task):
    composed = halves(horizon=4)
    done = reinforce(composed, task(horizon=4, execute=3, max_steps=10), steps=8 * 8 * 3, **{**FAST, "rollout": 8})
    assert done.algorithm.num_timesteps == 8 * 8
    assert done.metrics["online_steps"] == 8 * 2 * (3 + 3 + 3 + 1)
    assert 0 < done.metrics["online_return"] < 10


@pytest.mark.usefixtures("task")
def test_offline_a_critic_tells_a_gate_the_same(tmp_path):
    """Demonstrations that are right as often as wrong teach nothing; weighted by the advantages of a critic that learned from them, they do."""
    rng = np.random.default_rng(0)
    observations, actions = np.stack([rng.uniform(-1, 1, (4, 500)), np.ones((4, 500))], -1), rng.choice([-1.0, 1.0], (4, 500, 1))
    arrays = {"observations": observations, "actions": actions, "rewards": 1 - abs(actions[..., 0] - np.sign(observations[..., 0])) / 2}
    np.savez(tmp_path / "b.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    task = OfflineTask(name="halves", demonstrations=str(tmp_path / "b.npz"), environment="Halves-v0")
    batches, returns = task.batches(batch_size=128, seed=0), []
    for weighted in (False, True):
        if weighted:
            critic = Critic(2, 1, hidden=(32,), discount=0.0, tau=0.1, beta=5.0)
            fit(critic, batches, critic.parameters(), steps=400, lr=1e-2, device="cpu", progress=False)
            task.weigh(critic)
        composed = halves()
        fit(composed, batches, composed.gate.parameters(), steps=300, lr=1e-2, device="cpu", progress=False)
        returns.append(task.evaluate(composed)["return"])
    assert returns[0] < 13
    assert returns[1] > 17


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (ConstantGate(2, 2), "which ConstantGate does not give: use gate=mlp"),
        (Prototypes(2, 2), "which Prototypes does not give"),
        (MLPGate(2, 2, k=1), r"which MLPGate with k=1 does not give: use gate=mlp without gate\.k"),
    ],
)
def test_gates_without_weights_of_all_skills(task, gate, message):
    with pytest.raises(ValueError, match=message):
        check_online(gate, task())


def test_tasks_without_environment(task, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n')
    labels = LabelTask(name="letters", data=str(tmp_path / "a.jsonl"), tokenizer="bytes")
    with pytest.raises(ValueError, match=r"task 'letters' is a LabelTask, which has no environment to give a reward: leave out online\.steps"):
        check_online(MLPGate(2, 2), labels)
    other = task()
    other.environment = "Pendulum-v1"
    with pytest.raises(ValueError, match=r"'Pendulum-v1' has 3 observations and 1 actions, but .* has 2 and 1"):
        check_online(MLPGate(2, 2), other)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"noise": -1.0}, {"discount": 2.0}, {"rollout": 0}, {"environments": 1, "rollout": 9}])
def test_numbers_out_of_range(task, wrong):
    with pytest.raises(ValueError, match=r"online training takes at least 1 step, .* a multiple of 4; got steps="):
        reinforce(halves(), task(), **{"steps": 100, **wrong})


QUICK = ["+fit.device=cpu", "+fit.progress=false"]
TASK = ["task=offline", "task.demonstrations=a.npz", "task.environment=Pendulum-v1", "task.held_out=1", "bank=bank"]
GATE = ["skills=[one,two]", "gate=mlp", "gate.hidden=[8]", "online.environments=8", "online.rollout=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, command):
    """A bank with a base and two skills, and what a command made of them: a gate from reward alone, after one that learned from demonstrations."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    steps = {"observations": rng.normal(size=(3, 20, 3)), "actions": rng.uniform(-1, 1, (3, 20, 1)), "rewards": rng.normal(size=(3, 20))}
    np.savez(folder / "a.npz", **{key: value.astype(np.float32) for key, value in steps.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bank = sb.Bank("bank")
        for name, line in {"base": ["fit=base", *SMALL], "one": ["base=base", "lora.rank=2"], "two": ["base=base", "lora.rank=2", "seed=1"]}.items():
            made = recipe.train(configured("train", *TASK, *QUICK, "fit.steps=12", f"task.name={name}", *line), bank)
            bank.put(made.thing, made.name, card=made.card)
        made = recipe.compose(configured("compose", *TASK, *QUICK, *GATE, "fit.steps=12", "task.name=cloned", "name=cloned"), bank)
        bank.put(made.thing, made.name, card=made.card)
        line = [*QUICK, "fit.steps=0", "online.steps=250", "task.name=rewarded", "name=rewarded", "episodes=1", "report=false"]
        done = command(folder, "compose", *TASK, *GATE, *line)
    assert done[0] == 0, done[2]
    return folder


@pytest.fixture
def bank(home, monkeypatch):
    monkeypatch.chdir(home)
    return sb.Bank("bank")


def test_from_the_command_to_the_bank(bank):
    card = bank.card("rewarded")
    assert card.metrics["online_steps"] == 256  # eight rollouts of four decisions in eight environments
    assert -2000 < card.metrics["return"] < 0
    assert "loss" not in card.metrics
    assert card.conf["online"]["steps"] == 250
    assert "online_steps" not in bank.card("cloned").metrics
    model = sb.load("rewarded", bank)
    weights = model.shown({"observation": torch.randn(5, 3)})
    assert weights.shape == (5, 2)
    assert not np.allclose(weights, [[0, 1]], atol=1e-6)
    found = sb.rebuild("rewarded", bank)
    assert (found.equal, found.changed) == (True, {})


def test_demonstrations_first(bank):
    conf = configured("compose", *TASK, *QUICK, *GATE, "fit.steps=12", "online.steps=8", "online.lr=1e-9", "task.name=cloned")
    made = recipe.compose(conf, bank, resume=False)
    assert {"loss", "online_steps"} <= set(made.card["metrics"])
    for name, value in bank.get("cloned").tensors.items():
        torch.testing.assert_close(made.thing.tensors[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["gate=constant"], "which ConstantGate does not give: use gate=mlp"),
        (["gate=mlp", "gate.k=1"], "which MLPGate with k=1 does not give"),
        (["gate=arrow"], "which Arrow with k=2 does not give"),
        (["merge=stack"], "a merge has no gate that online.steps=8 could train: leave it out, or give gate=mlp"),
    ],
)
def test_mistakes(bank, line, message):
    conf = configured("compose", *TASK, *QUICK, "skills=[one,two]", "online.steps=8", "task.name=a", *line)
    with pytest.raises(ValueError, match=message):
        recipe.compose(conf, bank)


def test_without_its_package(bank, monkeypatch):
    monkeypatch.delitem(sys.modules, "skillbank.online")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    conf = configured("compose", *TASK, *QUICK, *GATE, "online.steps=8", "task.name=a")
    with pytest.raises(ImportError, match=re.escape("online training needs stable_baselines3: pip install 'skillbank[online]'")):
        recipe.compose(conf, bank)
