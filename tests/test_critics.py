"""Critics: hand-computed numbers, the formulas once more in double precision, known values of small problems, resuming, and what they choose."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from skillbank import check_model, fit
from skillbank.models.critics import BestOf, Critic
from tests.tiny import tiny_policy
from tests.walkers import Policy

D, A = 3, 2
OBJECTIVES = ["reward", "hj", "qc"]


def example(rows=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation": torch.randn(rows, D, generator=generator, dtype=dtype),
        "action": torch.rand(rows, 2, A, generator=generator, dtype=dtype) * 2 - 1,
        "next_observation": torch.randn(rows, D, generator=generator, dtype=dtype),
        "reward": torch.randn(rows, generator=generator, dtype=dtype),
        "cost": (torch.rand(rows, generator=generator) < 0.4).to(dtype),
        "mask": (torch.rand(rows, generator=generator) < 0.7).to(dtype),
    }


def batches(start):
    while True:
        yield example(seed=start)
        start += 1


def small(objective="reward", **options):
    torch.manual_seed(3)
    return Critic(D, A, objective=objective, **{"hidden": [8, 8], **options})


@torch.no_grad()
def constant(critic, q, v):
    """Let the two Q of the copy, and both Q of the net, and V say these, whatever they see."""
    heads = [*critic.target.heads, *critic.net["q"].heads, critic.net["v"]]
    for head, value in zip(heads, [*q, *q, v], strict=True):
        for parameter in head.parameters():
            parameter.zero_()
        head[-1].bias.fill_(value)
    return critic


def one(**values):
    row = {"observation": torch.zeros(1, D), "action": torch.zeros(1, 1, A), "next_observation": torch.zeros(1, D)}
    return row | {name: torch.tensor([float(value)]) for name, value in values.items()}


@pytest.mark.parametrize(
    ("objective", "v", "batch", "expected"),
    [
        ("reward", 0.5, one(reward=2, mask=1), 0.7 * 0.5**2 + ((2.45 - 1) ** 2 + (2.45 - 3) ** 2) / 2),
        ("reward", 2.0, one(reward=2, mask=0), 0.3 * 1.0**2 + (1**2 + 1**2) / 2),
        ("hj", 4.0, one(cost=0, mask=0), 0.9 * 1.0**2 + (2**2 + 4**2) / 2),
        ("hj", 1.0, one(cost=3, mask=0), 0.1 * 2.0**2 + (24**2 + 22**2) / 2),
        ("hj", 2.0, one(cost=0, mask=1), 0.1 * 1.0**2 + ((1 - 1.7) ** 2 + (3 - 1.7) ** 2) / 2),
        ("hj", -3.0, one(cost=0, mask=1), 0.1 * 6.0**2 + (2**2 + 4**2) / 2),
        ("hj", 2.0, one(cost=1, mask=1), 0.1 * 1.0**2 + (24**2 + 22**2) / 2),
        ("qc", 2.0, one(cost=3, mask=1), 0.1 * 1.0**2 + ((1 - 4.8) ** 2 + (3 - 4.8) ** 2) / 2),
        ("qc", 5.0, one(cost=3, mask=0), 0.9 * 2.0**2 + (2**2 + 0**2) / 2),
    ],
)
def test_losses_by_hand(objective, v, batch, expected):
    """Q says 1 and 3: rewards take the lesser, costs the greater; the discount is 0.9."""
    critic = constant(small(objective, discount=0.9), (1.0, 3.0), v).eval()
    assert critic(batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "v", "advantage", "weight"),
    [
        ("reward", 0.5, 0.5, math.exp(0.5)),
        ("reward", 2.0, -1.0, math.exp(-1)),
        ("reward", -9.0, 10.0, 100.0),
        ("hj", 2.0, -1.0, 0.0),
        ("hj", 3.0, 0.0, 0.0),
        ("hj", 3.5, 0.5, math.exp(0.5)),
        ("qc", 99.0, 96.0, 100.0),
    ],
)
def test_weights_by_hand(objective, v, advantage, weight):
    critic = constant(small(objective), (1.0, 3.0), v)
    batch = one()
    observation, action = batch["observation"], batch["action"][:, 0]
    assert critic.advantages(observation, action).tolist() == pytest.approx([advantage])
    assert critic.predict(batch).tolist() == pytest.approx([advantage])
    assert critic.weights(observation, action).tolist() == pytest.approx([weight])


def test_beta_and_clip():
    critic = constant(small(beta=3.0, clip=10.0), (1.0, 3.0), 0.5)
    assert critic.weights(torch.zeros(1, D), torch.zeros(1, A)).tolist() == pytest.approx([math.exp(1.5)])
    assert constant(critic, (1e4, 1e4), 0.0).weights(torch.zeros(1, D), torch.zeros(1, A)).tolist() == [10.0]


def test_sizes_are_those_of_the_paper():
    critic = Critic(24, 6)
    counts = [sum(p.numel() for p in part.parameters()) for part in (critic.net["q"], critic.net["v"], critic.target)]
    assert counts == [147_970, 72_449, 147_970]


def mlp(x, layers):
    """By the weights of a Sequential, in double precision."""
    *hidden, last = layers
    for weight, bias in hidden:
        x = torch.relu(x @ weight.T + bias)
    return (x @ last[0].T + last[1]).squeeze(-1)


def weights_of(module):
    flat = [p.detach().double().requires_grad_() for p in module.parameters()]
    return list(zip(flat[::2], flat[1::2], strict=True))


def expected_losses(critic, batch):
    """(loss of V, loss of Q) as functions of their own weights alone, and these weights."""
    batch = {key: value.double() for key, value in batch.items()}
    s, a, after, m = batch["observation"], batch["action"][:, 0], batch["next_observation"], batch["mask"]
    v, (q1, q2) = weights_of(critic.net["v"]), [weights_of(head) for head in critic.net["q"].heads]
    old = torch.stack([mlp(torch.cat([s, a], 1), weights_of(head)) for head in critic.target.heads]).detach()
    following, gamma = mlp(after, v).detach(), critic.discount
    if critic.objective == "reward":
        u = old.min(0).values - mlp(s, v)
        side = torch.where(u > 0, critic.expectile, 1 - critic.expectile)
        aim = batch["reward"] + gamma * m * following
    else:
        u = old.max(0).values - mlp(s, v)
        side = torch.where(u < 0, critic.expectile, 1 - critic.expectile)
        h = 26 * (batch["cost"] > 0).double() - 1
        safest = (1 - gamma) * h + gamma * torch.stack([h, following]).max(0).values
        aim = batch["cost"] + gamma * m * following if critic.objective == "qc" else m * safest + (1 - m) * h
    loss_v = (side * u**2).mean()
    loss_q = sum(((mlp(torch.cat([s, a], 1), head) - aim) ** 2).mean() for head in (q1, q2)) / 2
    return loss_v, loss_q, [p for layer in v for p in layer], [p for head in (q1, q2) for layer in head for p in layer]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_the_formulas(objective):
    critic = small(objective).double()
    with torch.no_grad():
        for p in critic.target.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    batch = example(64, dtype=torch.float64)
    loss_v, loss_q, v, q = expected_losses(critic, batch)
    loss = critic.eval()(batch)
    torch.testing.assert_close(loss, loss_v + loss_q, rtol=1e-12, atol=0)
    loss.backward()
    for module, expected in ((critic.net["v"], torch.autograd.grad(loss_v, v)), (critic.net["q"], torch.autograd.grad(loss_q, q))):
        for p, gradient in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in critic.target.parameters())


def trained(folder=None, data=batches, objective="hj", **options):
    critic = small(objective)
    options = {"steps": 20, "lr": 1e-2, "ema": None, "weight_decay": 0.1, "schedule": "constant", "log_every": 2, "checkpoint_every": 4, **options}
    return critic, fit(critic, data, list(critic.parameters()), folder=folder, progress=False, **options)


def test_training_is_the_textbook_loop():
    """Another optimiser of the net alone, which decays its weights, and a copy that is moved by hand."""
    critic, _ = trained(objective="reward", steps=7)
    other = small("reward").eval()
    optimizer = torch.optim.AdamW(other.net.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(7):
        with torch.no_grad():
            for old, new in zip(other.target.parameters(), other.net["q"].parameters(), strict=True):
                old.copy_(0.995 * old + 0.005 * new)
        optimizer.zero_grad()
        other(next(batches(step))).backward()
        optimizer.step()
    for name, tensor in critic.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(critic.target.heads[0][0].weight, small("reward").target.heads[0][0].weight)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("step", [3, 4, 11, 19])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path, step):
    def killed(start):
        for i, batch in enumerate(batches(start), start):
            if i == step:
                raise KilledError
            yield batch

    whole, rows = trained()
    with pytest.raises(KilledError):
        trained(tmp_path, killed)
    resumed, found = trained(tmp_path)
    assert found.rows == rows.rows
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_processes_do_not_wait_for_gradients_of_the_copy():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        alone, wrapped = small(), nn.parallel.DistributedDataParallel(small())
        for step in range(3):
            alone(example(seed=step)).backward()
            wrapped(example(seed=step)).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(wrapped.module.net["v"][0].weight.grad, alone.net["v"][0].weight.grad)


def test_evaluation_moves_nothing():
    critic = small().eval()
    with torch.no_grad():
        critic.net["q"].heads[0][0].weight.add_(1)
    before = critic.target.heads[0][0].weight.clone()
    critic(example())
    assert torch.equal(critic.target.heads[0][0].weight, before)
    critic.train()(example())
    torch.testing.assert_close(critic.target.heads[0][0].weight, before + 0.005)


def walks(table):
    """Batches of a small problem: rows (state, action, next state, mask, reward, cost), each as likely as the others; states are one-hot."""
    number = torch.tensor(table, dtype=torch.float32)
    states = torch.eye(4)
    batch = {
        "observation": states[number[:, 0].long()],
        "action": number[:, 1, None, None],
        "next_observation": states[number[:, 2].long()],
        "mask": number[:, 3],
        "reward": number[:, 4],
        "cost": number[:, 5],
    }

    def stream(_start):
        while True:
            yield batch

    return batch, stream


def values(table, steps=700, **options):
    """V of the states, and Q of the rows, after training on them."""
    batch, stream = walks(table)
    torch.manual_seed(0)
    critic = Critic(4, 1, hidden=[32, 32], tau=0.2, **options)
    fit(critic, stream, list(critic.parameters()), steps=steps, lr=1e-2, ema=None, weight_decay=0.0, progress=False, log_every=steps)
    with torch.no_grad():
        return critic.net["v"](torch.eye(4)).squeeze(-1), critic.net["q"](batch["observation"], batch["action"][:, 0]).mean(0), critic


def test_values_of_a_chain():
    """Onwards to the prize of 1, or out for 0.3: V is 0.7 of the better and 0.3 of the worse, as both are as likely."""
    table = [row for s in range(4) for row in ((s, 1, min(s + 1, 3), s < 3, s == 3, 0), (s, -1, s, 0, 0.3, 0))]
    v, q, critic = values(table, discount=0.9)
    expected, ahead = [], 1.0
    for _ in range(4):
        expected.append(0.7 * max(ahead, 0.3) + 0.3 * min(ahead, 0.3))
        ahead = 0.9 * expected[-1]
    np.testing.assert_allclose(v, expected[::-1], atol=0.03)
    np.testing.assert_allclose(q[::2], [0.9 * expected[2], 0.9 * expected[1], 0.9 * expected[0], 1.0], atol=0.03)
    np.testing.assert_allclose(q[1::2], 0.3, atol=0.03)
    advantages = critic.advantages(torch.eye(4).repeat_interleave(2, 0), torch.tensor([1.0, -1.0]).repeat(4)[:, None])
    assert (advantages[::2] > 0).tolist() == [True] * 4
    assert (advantages[1::2] < 0).tolist() == [True] * 4


def test_safety_of_a_chain():
    """State 0 can stay or go to 1, from where every way leads over 2 into a cost; 3 stays where it is.

    V(0) = 0.99 Q(stay) + 0.01 Q(go), and Q(stay) = -0.3 + 0.7 V(0).
    """
    table = [(0, -1, 0, 1, 0, 0), (0, 1, 1, 1, 0, 0), (1, -1, 2, 1, 0, 0), (1, 1, 2, 1, 0, 0), (2, 0, 2, 0, 0, 1), (3, 0, 3, 1, 0, 0)]
    gamma, expectile = 0.7, 0.99
    doomed = -(1 - gamma) + gamma * 25
    left = -(1 - gamma) + gamma * doomed
    home = (expectile * -(1 - gamma) + (1 - expectile) * left) / (1 - expectile * gamma)
    v, q, critic = values(table, objective="hj", discount=gamma, expectile=expectile)
    np.testing.assert_allclose(v, [home, doomed, 25, -1], atol=0.3)
    np.testing.assert_allclose(q, [-(1 - gamma) + gamma * home, left, doomed, doomed, 25, -1], atol=0.3)
    assert (v > 0).tolist() == [False, True, True, False]
    weights = critic.weights(torch.eye(4)[[0, 0]], torch.tensor([[-1.0], [1.0]]))
    assert weights[0] > 0 == weights[1]


def test_costs_of_a_chain():
    """Each step costs 1 until the third, which ends it; there is one action."""
    table = [(s, 0, s + 1, s < 2, 0, 1) for s in range(3)]
    v, q, _ = values(table, objective="qc", discount=0.5)
    np.testing.assert_allclose(v[:3], [1.75, 1.5, 1.0], atol=0.03)
    np.testing.assert_allclose(q, [1.75, 1.5, 1.0], atol=0.03)


class Choices(Policy):
    """Draws the same actions for every observation."""

    def predict(self, batch, samples=None):
        generator = torch.Generator().manual_seed(1)
        actions = torch.rand(samples or 1, 2, A, generator=generator) * 2 - 1
        rows = actions.expand(len(batch["observation"]), -1, -1, -1)
        return rows[:, 0] if samples is None else rows


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_of_several_actions(objective):
    critic, batch = small(objective), example()
    actions = Choices().predict(batch, 5)
    q = torch.stack([torch.stack([critic.target(row[None], each[:1]) for each in actions[0]]) for row in batch["observation"]]).squeeze(-1)
    best = q.min(2).values.argmax(1) if objective == "reward" else q.max(2).values.argmin(1)
    assert len(best.unique()) > 1
    assert torch.equal(BestOf(Choices(), critic, 5).predict(batch), actions[torch.arange(16), best])
    assert torch.equal(BestOf(Choices(), critic, 1).predict(batch), Choices().predict(batch))


def test_the_best_action_of_a_policy_is_a_model():
    policy = tiny_policy()
    batch = {"observation": torch.randn(4, 5), "action": torch.zeros(4, 1, 3)}
    best = BestOf(policy, Critic(5, 3), 4)
    check_model(best, batch)
    assert best.net is policy.net
    with pytest.raises(ValueError, match="the best of at least 1 action can be taken, got samples=0"):
        BestOf(policy, Critic(5, 3), 0)


def test_layer_norm_hides_the_size_of_observations_from_v():
    critic = small(layer_norm=True)
    batch = example()
    torch.testing.assert_close(critic.net["v"](batch["observation"]), critic.net["v"](3 * batch["observation"]), rtol=1e-3, atol=1e-4)
    assert isinstance(critic.net["v"][0], nn.LayerNorm)
    check_model(critic, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cost"}, "unknown objective 'cost': choose reward, hj or qc"),
        ({"discount": 1.0}, r"discount in \[0, 1\), .* got discount=1.0"),
        ({"expectile": 0.3}, r"expectile in \[0.5, 1\), .*got .*expectile=0.3"),
        ({"tau": 0.0}, r"tau in \(0, 1\], .* got .*tau=0.0"),
        ({"beta": -1.0}, "beta and clip above 0, got .*beta=-1.0"),
        ({"clip": 0.0}, "beta and clip above 0, got .*clip=0.0"),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Critic(D, A, **options)


def without(name):
    return {key: value for key, value in example().items() if key != name}


@pytest.mark.parametrize(
    ("objective", "batch", "message"),
    [
        (
            "reward",
            without("next_observation"),
            r"objective 'reward' learns from .* have no \['next_observation'\]: train it on a task of transitions",
        ),
        ("reward", without("reward"), r"these batches have no \['reward'\]"),
        ("hj", without("cost"), r"have no \['cost'\]: train it on a task of transitions \(task=offline\), of demonstrations with costs"),
        ("reward", example() | {"weight": torch.ones(16)}, "learns from all transitions alike, these are weighted: leave out critic="),
        ("qc", example() | {"observation": torch.ones(16, 4)}, r"this critic is of \(observation, action\) sizes \(3, 2\), got \(4, 2\)"),
        ("reward", example() | {"action": torch.ones(16, 1, 1)}, r"sizes \(3, 2\), got \(3, 1\): train one on this task"),
    ],
)
def test_wrong_batches(objective, batch, message):
    with pytest.raises(ValueError, match=message):
        small(objective)(batch)


def test_a_skill_on_a_critic_is_refused():
    from skillbank import fresh

    critic = small()
    params = fresh(critic.net, rank=1)
    with pytest.raises(ValueError, match="a critic is trained as a whole, and there is a skill on this one: train another, with model=critic"):
        fit(critic, batches, params, steps=1, progress=False)
