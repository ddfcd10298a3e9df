"""Transitions and what is learned from them: how episodes end, weights, costs, and a weighted skill made again from its card."""

import re

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from torch import nn

import skillbank as sb
from skillbank import recipe
from skillbank.bank import UnknownRef
from skillbank.models.critics import Critic
from skillbank.tasks.control import ControlTask, summary
from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations
from skillbank.tasks.offline import OfflineTask, effective_sample_size, safety
from skillbank.tasks.rollouts import rollout
from tests.test_configs import SMALL
from tests.test_rebuild import configured
from tests.walkers import Policy, Short

LENGTHS = (4, 1, 7, 3)
ENDS = np.cumsum(LENGTHS) - 1
N = sum(LENGTHS)


def numbered():
    """Every entry of a row is its number; next observations are numbers of their own where an episode ends. The first and the third episode end."""
    number = np.arange(N, dtype=np.float32)
    following = number + 1
    following[ENDS] = 100 + np.arange(4)
    terminals, timeouts = np.zeros(N, bool), np.zeros(N, bool)
    terminals[ENDS[[0, 2]]] = timeouts[ENDS[1:]] = True  # the third is marked as both: it came to its end
    return {
        "observations": np.repeat(number[:, None], 3, 1),
        "actions": np.repeat(number[:, None] / N, 2, 1),
        "next_observations": np.repeat(following[:, None], 3, 1),
        "rewards": number * 2,
        "costs": (number % 2).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def without(*names):
    return {key: value for key, value in numbered().items() if key not in names}


@pytest.fixture
def make(tmp_path):
    def make(arrays=None, **options):
        path = str(tmp_path / "a.npz")
        np.savez(path, **(arrays or numbered()))
        return OfflineTask(**{"name": "a", "demonstrations": path, "environment": "Costly-v0", **options})

    return make


def everything(task, size=2000):
    """One row for every step that is drawn, in the order of the steps."""
    batch = next(task.batches(batch_size=size, seed=0)(0))
    rows, first = np.unique(batch["observation"][:, 0].numpy(), return_index=True)
    return rows.astype(int).tolist(), {key: value[torch.from_numpy(first)] for key, value in batch.items()}


def ends_of(task):
    """Which steps the batches have, and of the last steps of the episodes: mask and next observation."""
    rows, batch = everything(task)
    found = [rows.index(end) for end in ENDS if end in rows]
    inside = [i for i, row in enumerate(rows) if row not in ENDS]
    assert (batch["mask"][inside] == 1).all()
    assert torch.equal(batch["next_observation"][inside], batch["observation"][inside] + 1)
    return rows, batch["mask"][found].tolist(), batch["next_observation"][found, 0].tolist()


def test_batches_hold_what_came_of_each_action(make):
    rows, batch = everything(make(reward_scale=0.5, horizon=2))
    assert rows == list(range(N))
    assert batch["reward"].tolist() == rows
    assert batch["cost"].tolist() == [row % 2 for row in rows]
    assert {key: tuple(value.shape[1:]) for key, value in batch.items()} == {
        "observation": (3,), "action": (2, 2), "reward": (), "next_observation": (3,), "mask": (), "cost": (),
    }  # fmt: skip
    assert "cost" not in everything(make(without("costs")))[1]


def test_only_what_came_to_its_end_has_no_future(make):
    assert ends_of(make()) == (list(range(N)), [0, 1, 0, 1], [100, 101, 102, 103])


def test_a_cut_episode_may_count_as_one_that_came_to_its_end(make):
    assert ends_of(make(timeout_is_terminal=True))[1] == [0, 0, 0, 0]
    rows, masks, _ = ends_of(make(without("next_observations"), timeout_is_terminal=True))
    assert (rows, masks) == (list(range(N)), [0, 0, 0, 0])


def test_a_last_step_that_was_cut_and_has_no_next_observation_is_in_no_batch(make):
    rows, masks, _ = ends_of(make(without("next_observations")))
    assert (rows, masks) == ([row for row in range(N) if row not in (4, 14)], [0, 0])
    task = make(without("next_observations"), episodes=2, held_out=2)
    assert [len(batch["mask"]) for batch in task.validation(batch_size=100)] == [9]


def test_the_grid_layout_says_how_episodes_ended(make):
    arrays = {"observations": np.zeros((2, 3, 3)), "actions": np.zeros((2, 3, 2)), "rewards": np.zeros((2, 3))}
    more = {"costs": np.arange(6).reshape(2, 3), "terminated": np.array([True, False]), "finals": np.full((2, 3), 9)}
    read = make(arrays | more).demonstrations
    assert read.costs.tolist() == [0, 1, 2, 3, 4, 5]
    assert (read.terminated.tolist(), read.finals[:, 0].tolist()) == ([True, False], [9, 9])
    read = make(arrays).demonstrations
    assert (read.costs, read.terminated, read.finals) == (None, None, None)


def test_episodes_keep_their_costs_and_ends(make):
    whole = make().demonstrations
    part = whole.episodes(slice(1, 3))
    assert part.costs.tolist() == [row % 2 for row in range(4, 12)]
    assert (part.terminated.tolist(), part.finals[:, 0].tolist()) == ([False, True], [101, 102])
    assert len({whole.hash, make(without("costs")).demonstrations.hash, make(without("next_observations")).demonstrations.hash}) == 3


def test_hashes_of_what_says_nothing_of_them_are_as_before():
    """As the cards of the shipped bank hold them."""
    bank = sb.Bank("adapters")
    stored = bank.card("walker/walk").data
    assert {source: load_demonstrations(source, episodes=10 if "walk." in source else 95).hash for source in stored} == dict(stored)


def test_the_layout_of_dsrl(make, tmp_path):
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        for name, value in numbered().items():
            file[name] = value.astype(np.float32)  # all of them are, marks as well
        file["metadata/env"] = "none"
    task = OfflineTask(name="b", demonstrations=str(tmp_path / "b.hdf5"), environment="Costly-v0")
    assert task.demonstrations.hash == make().demonstrations.hash
    assert ends_of(task) == ends_of(make())


def test_a_recording_that_stops_in_an_episode_cut_it(make):
    arrays = numbered()
    arrays["timeouts"][-1] = False
    assert ends_of(make(arrays)) == ends_of(make())


def test_examples_in_the_mirror_see_what_comes_in_the_mirror(make):
    arrays = numbered()
    for name in ("observations", "next_observations"):
        arrays[name] = arrays[name] + np.float32([0, 0, 1000])
    batch = next(make(arrays, mirror={"observation": [2, 1, 0], "action": [1, 0]}).batches(batch_size=100, seed=0)(0))
    flipped = batch["observation"][:, 0] >= 1000
    assert 0 < flipped.sum() < 100
    assert torch.equal(flipped, batch["next_observation"][:, 0] >= 1000)


def changed(name, value, where=slice(None)):
    arrays = numbered()
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name][where] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (numbered() | {"costs": np.ones(N - 1)}, r"different numbers of steps: .*'costs': 14"),
        (numbered() | {"costs": np.ones((N, 1))}, r"array 'costs' must have shape \(steps,\), got \(15, 1\)"),
        (changed("costs", np.nan, 5), r"array 'costs' holds nan at episode 2, step 0"),
        (changed("rewards", np.inf, 2), r"array 'rewards' holds inf at episode 0, step 2"),
        (changed("next_observations", np.nan, -1), "array 'finals' is not finite for episode 3: remove this episode"),
        (changed("next_observations", 5, 1), r"'next_observations' is not what the next step saw at row 1 \(1 such rows\): mark where episodes end"),
        (numbered() | {"next_observations": np.ones((N, 2))}, r"have shape \(15, 3\), but array 'next_observations' has \(15, 2\)"),
    ],
)
def test_wrong_arrays(make, arrays, message):
    with pytest.raises(ValueError, match=message):
        make(arrays)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"terminated": np.ones(3)}, r"here: array 'terminated' must have shape \(2,\), a row for each episode, got \(3,\)"),
        ({"finals": np.ones((2, 4))}, r"here: array 'finals' must have shape \(2, 3\), a row for each episode, got \(2, 4\)"),
    ],
)
def test_wrong_ends(more, message):
    with pytest.raises(ValueError, match=message):
        Demonstrations(np.zeros((5, 3)), np.zeros((5, 2)), np.zeros(5), np.array([0, 2, 5]), "here", **more)


def test_a_task_without_a_known_transition(make):
    arrays = without("next_observations") | {"terminals": np.zeros(N), "timeouts": np.ones(N)}
    with pytest.raises(ValueError, match=r"a\.npz: no step's next observation is known: give 'next_observations', 'finals' or longer episodes"):
        make(arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_scale": 0.0}, "task 'a': reward_scale must be above 0 and cost_limit at least 0, got reward_scale=0.0"),
        ({"cost_limit": -1.0}, "cost_limit at least 0, got .*cost_limit=-1.0"),
        ({"return_range": [3, 3]}, r"return_range is the least and the greatest return, got \[3, 3\]"),
        ({"rehearsal": {"share": 0.1}}, "is not this task's reward: leave out rehearsal"),
    ],
)
def test_wrong_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


class ByNumber(nn.Module):
    """A critic that thinks the more of a step the later it is."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.factor = factor

    def advantages(self, observation, action):
        assert not self.training
        assert torch.allclose(action[:, 0], observation[:, 0] / N, atol=1e-4)
        return observation[:, 0]

    def weights(self, observation, action):
        return self.factor * self.advantages(observation, action)


def test_weights_are_of_the_step_that_is_imitated(make):
    task = make(without("next_observations"), horizon=3)
    size = task.weigh(ByNumber())
    rows, batch = everything(task)
    assert batch["weight"].tolist() == rows
    assert size == pytest.approx(sum(rows) ** 2 / sum(row**2 for row in rows) / len(rows))
    assert task.evaluate(ByNumber()) == {"effective_sample_size": size}


def test_effective_sample_size():
    assert effective_sample_size(torch.full((7,), 0.3)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.0, 5, 0, 0])) == pytest.approx(0.25)
    assert effective_sample_size(torch.tensor([1.0, 2, 3])) == pytest.approx(36 / 14 / 3)


@pytest.mark.parametrize(("critic", "message"), [(ByNumber(0.0), "are all 0: train it for longer"), (ByNumber(np.nan), "are not finite: train")])
def test_useless_weights(make, critic, message):
    with pytest.raises(ValueError, match=f"task 'a': the weights that the critic gives {message}"):
        make().weigh(critic)


def test_a_critic_of_another_task(make):
    with pytest.raises(ValueError, match=r"this critic is of \(observation, action\) sizes \(7, 2\), got \(3, 2\): train one on this task"):
        make().weigh(Critic(7, 2))


class Costly(Short):
    """A step costs 1 if its action is above 0; observations have three entries, a short episode's steps are all alike."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed % 5 + 1, options=options)
        return np.ones(3), {"cost": 50.0}

    def step(self, action):
        _, reward, terminated, truncated, _ = super().step(action)
        return np.ones(3), reward, terminated, truncated, {"cost": float(action[0] > 0)}


@pytest.fixture
def costly():
    Short.seen = []
    gymnasium.register("Costly-v0", entry_point=Costly, max_episode_steps=50, order_enforce=False)
    yield
    del gymnasium.registry["Costly-v0"]


class Always(Policy):
    def __init__(self, action):
        super().__init__(3, 2)
        self.action = action

    def predict(self, batch):
        return torch.full((len(batch["observation"]), 1, 2), self.action)


@pytest.mark.usefixtures("costly", "registered")
def test_costs_of_a_rollout():
    result = rollout(Always(1.0), "Costly-v0", [0, 3, 1])
    assert (result.lengths.tolist(), result.costs.tolist()) == ([1, 4, 2], [1.0, 4.0, 2.0])
    assert rollout(Always(-1.0), "Costly-v0", [0, 3]).costs.tolist() == [0.0, 0.0]
    assert rollout(Policy(2, 2), "Short-v0", [3]).costs is None


@pytest.mark.usefixtures("costly")
def test_evaluation_tells_costs(make):
    task = make(cost_limit=3.0, return_range=[1.0, 15.0], evaluation_episodes=5)
    returns = np.array([1.0, 3, 6, 10, 15])
    expected = {"normalised_return": 6 / 14, "cost": 3.0, "normalised_cost": 1.0, "safe": 0.6}
    assert task.evaluate(Always(1.0)) == pytest.approx(summary(returns) | expected)
    assert make(evaluation_episodes=5).evaluate(Always(-1.0)) == pytest.approx(summary(returns) | {"cost": 0.0})


def test_safety():
    returns, costs = np.array([10.0, 20.0]), np.array([0.0, 5.0])
    assert safety(returns, costs, [5, 25], 10) == {"normalised_return": 0.5, "cost": 2.5, "normalised_cost": 0.25, "safe": 1.0}
    assert safety(returns, costs, None, 0) == {"cost": 2.5, "normalised_cost": 3.5, "safe": 0.5}
    assert safety(returns, None, None, None) == {}


@pytest.mark.usefixtures("registered")
def test_a_limit_of_what_the_environment_does_not_tell(make):
    arrays = numbered()
    for name in ("observations", "next_observations"):
        arrays[name] = arrays[name][:, :2]
    with pytest.raises(ValueError, match=r"task 'a' has cost_limit=1.0, but 'Short-v0' gives no 'cost' in info: leave it out"):
        make(arrays, environment="Short-v0", cost_limit=1.0, max_steps=1, seed=1).evaluate(Policy(2, 2))


TASK = ["task=offline", "task.demonstrations=a.npz", "task.environment=Pendulum-v1", "task.held_out=1", "bank=bank"]
QUICK = ["fit.steps=12", "+fit.device=cpu", "+fit.progress=false"]
CRITIC = ["model=critic", "fit=critic", "model.hidden=[16,16]"]
SKILL = ["base=base", "lora.rank=2", "episodes=0"]
GATE = ["skills=[plain,weighted]", "gate=mlp", "gate.hidden=[8]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, command):
    """A bank with two critics, a base, a skill as it is and a weighted one, and a gate that is weighted: some made by the command."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    steps = {"observations": rng.normal(size=(3, 20, 3)), "actions": rng.uniform(-1, 1, (3, 20, 1)), "rewards": rng.normal(size=(3, 20))}
    more = {"costs": rng.random((3, 20)) < 0.3, "finals": rng.normal(size=(3, 3))}
    np.savez(folder / "a.npz", **{key: value.astype(np.float32) for key, value in (steps | more).items()})
    np.savez(folder / "b.npz", **{key: value.astype(np.float32) for key, value in steps.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bank = sb.Bank("bank")
        for name, line in {"base": ["fit=base", *SMALL], "qh": [*CRITIC, "model.objective=hj"], "plain": SKILL}.items():
            made = recipe.train(configured("train", *TASK, *QUICK, f"task.name={name}", *line), bank)
            bank.put(made.thing, made.name, card=made.card)
        for name, line in {"q": CRITIC, "weighted": [*SKILL, "critic=q"]}.items():
            code, out, err = command(folder, "train", *TASK, *QUICK, f"task.name={name}", *line)
            assert code == 0, err
            assert re.match(rf"{name}@1 .*effective_sample_size [0-9.]+", out)
        made = recipe.compose(configured("compose", *TASK, *QUICK, "task.name=gated", "name=gated", *GATE, "critic=qh"), bank)
        bank.put(made.thing, made.name, card=made.card)
    return folder


@pytest.fixture
def bank(home, monkeypatch):
    monkeypatch.chdir(home)
    return sb.Bank("bank")


def test_a_critic_is_a_base_of_the_bank(bank):
    critic = sb.load("q", bank)
    assert isinstance(critic, Critic)
    assert bank.card("q").kind == "base"
    assert 0 < bank.card("q").metrics["effective_sample_size"] <= 1
    assert "validation" in bank.card("q").metrics
    assert bank.verify() == []


def test_a_critic_weights_what_is_learned(bank):
    plain, weighted, gated = (bank.card(name) for name in ("plain", "weighted", "gated"))
    assert bank.get("plain").fingerprint != bank.get("weighted").fingerprint
    assert [card.conf["critic"] for card in (plain, weighted, gated)] == [None, "q@1", "qh@1"]
    assert "effective_sample_size" not in plain.metrics
    observations, actions = (torch.from_numpy(np.load("a.npz")[name][:2].reshape(40, -1)) for name in ("observations", "actions"))
    for card, ref in ((weighted, "q"), (gated, "qh")):
        weights = sb.load(ref, bank).weights(observations, actions.clamp(-1 + 1e-5, 1 - 1e-5))
        assert card.metrics["effective_sample_size"] == pytest.approx(effective_sample_size(weights), rel=1e-5)
    assert plain.metrics["loss"] != weighted.metrics["loss"]


@pytest.mark.parametrize("name", ["q", "qh", "weighted", "gated"])
def test_made_again_it_is_the_same_to_the_last_bit(bank, name):
    found = sb.rebuild(name, bank)
    assert (found.equal, found.changed) == (True, {})


def test_another_critic_is_another_run(bank):
    folders = []
    for line in (["critic=q@1"], ["critic=q"], ["critic=qh"], []):
        made = recipe.train(configured("train", *TASK, *QUICK, "task.name=weighted", *SKILL, *line), bank)
        folders.append(made.folder)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train",
            [*SKILL, "critic=base"],
            "'base@1' is a DiffusionPolicy, a critic is needed to weight examples: train one with model=critic",
        ),
        ("train", [*SKILL, "critic=qq"], "no 'qq' .* did you mean"),
        (
            "train",
            ["task=walker/stand", "task.mirror=null", "critic=q"],
            "examples of a ControlTask, as task 'x', cannot be weighted: use a",
        ),
        ("train", [*CRITIC, "critic=q"], "a critic learns from all transitions alike, these are weighted"),
        ("train", [*CRITIC, "model.objective=hj", "task.demonstrations=b.npz"], r"have no \['cost'\]: train it on a task of transitions"),
        ("compose", ["skills=[plain,weighted]", "merge=stack", "critic=q"], "a merge learns from no examples that critic=q could weight"),
    ],
)
def test_mistakes(bank, script, arguments, message):
    conf = configured(script, *TASK, *QUICK, "task.name=x", "task.environment=Pendulum-v1", *arguments)
    with pytest.raises((ValueError, UnknownRef), match=message):
        getattr(recipe, script)(conf, bank)


def test_a_critic_learns_from_transitions_only(tmp_path):
    np.savez(tmp_path / "a.npz", **numbered())
    task = ControlTask(name="a", demonstrations=str(tmp_path / "a.npz"), environment="Costly-v0")
    with pytest.raises(ValueError, match=r"these batches have no \['mask', 'next_observation', 'reward'\]: train it on a task of transitions"):
        Critic(3, 2)(next(task.batches(batch_size=2, seed=0)(0)))
