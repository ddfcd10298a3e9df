"""Weights learned from data."""

import copy

import pytest
import torch

from skillbank import attach, check_model, learn_weights, merge, search_weights
from skillbank.learn import Weighted
from tests.tiny import close, random_skill, tiny_batch, tiny_policy

MODULES = [None, ["enter", "blocks.0.expand", "blocks.1.reduce"], ["time.1", "leave.1", "blocks.0.expand"]]


def family(policy):
    return [random_skill(policy.net, rank=rank, modules=names, seed=rank) for rank, names in zip((2, 3, 4), MODULES, strict=True)]


def batches(start):
    while True:
        torch.manual_seed(start)
        yield tiny_batch()
        start += 1


@pytest.mark.parametrize("per_module", [False, True])
def test_a_model_under_weights_is_the_model_with_the_merge(per_module):
    policy = tiny_policy()
    skills = family(policy)
    weighted = Weighted(copy.deepcopy(policy), skills, start=[0.5, -0.3, 0.9], per_module=per_module)
    with torch.no_grad():
        weighted.weights += 0.1 * torch.randn_like(weighted.weights)
    attach(policy.net, merge(skills, weighted.for_merge()))
    batch = tiny_batch()
    torch.manual_seed(0)
    loss = weighted(batch)
    torch.manual_seed(0)
    close(loss, policy(batch))
    check_model(weighted, batch)
    loss.backward()
    assert [name for name, p in weighted.named_parameters() if p.grad is not None] == ["weights"]


def target(policy, skills, weights):
    """Objective: the distance from what the net computes under known weights."""
    known = copy.deepcopy(policy)
    attach(known.net, merge(skills, weights))

    def objective(model, batch):
        time = torch.zeros(len(batch["observation"]), dtype=torch.long)
        x = batch["action"].flatten(1)
        with torch.no_grad():
            aim = known.net(x, batch["observation"], time)
        return (model.net(x, batch["observation"], time) - aim).square().mean()

    return objective


@pytest.mark.parametrize("per_module", [False, True])
def test_weights_that_explain_the_data_are_found(per_module):
    policy = tiny_policy()
    skills = family(policy)
    true = [0.9, -0.6, 0.4]
    objective = target(policy, skills, true)
    weights, came_to = learn_weights(policy, skills, batches, steps=400, lr=0.05, per_module=per_module, objective=objective, progress=False)
    first = learn_weights(tiny_policy(), skills, batches, steps=1, objective=objective, progress=False)[1]
    assert came_to.loss < 1e-3 * first.loss
    if not per_module:
        assert weights == pytest.approx(true, abs=0.02)
    found = merge(skills, weights)
    wanted = merge(skills, true)
    assert float((found.delta("enter") - wanted.delta("enter")).norm() / wanted.delta("enter").norm()) < 0.2


def test_bad_input():
    policy = tiny_policy()
    skills = family(policy)
    with pytest.raises(ValueError, match="got 2 weights for 3 skills"):
        learn_weights(policy, skills, batches, start=[1.0, 2.0])
    assert Weighted(policy, skills, start=[1, 0, 0]).weights.dtype == torch.float32


def test_weights_are_found_without_gradients():
    policy = tiny_policy()
    skills = family(policy)
    objective = target(policy, skills, [0.8, 0.0, -0.5])
    looked_at = [next(batches(seed)) for seed in range(2)]
    weights, trace = search_weights(copy.deepcopy(policy), skills, looked_at, evaluations=150, penalty=0.0, objective=objective)
    assert len(trace) == 150
    assert trace == sorted(trace, reverse=True)
    assert trace[-1] < 0.05 * trace[0]
    assert weights == pytest.approx([0.8, 0.0, -0.5], abs=0.3)
    again = search_weights(copy.deepcopy(policy), skills, looked_at, evaluations=20, penalty=0.0, objective=objective)
    assert again[1] == search_weights(copy.deepcopy(policy), skills, looked_at, evaluations=20, penalty=0.0, objective=objective)[1]


def test_a_search_that_cannot_be():
    policy = tiny_policy()
    skills = family(policy)
    with pytest.raises(ValueError, match="a search needs batches and evaluations, got 0 and 40"):
        search_weights(policy, skills, [])
    with pytest.raises(ValueError, match=r"a search starts at 0, which is not within=\(0.1, 1.0\)"):
        search_weights(policy, skills, [tiny_batch()], within=(0.1, 1.0))
    with pytest.raises(ValueError, match="the objective is nan where all weights are 0"):
        search_weights(policy, skills, [tiny_batch()], objective=lambda model, batch: torch.tensor(float("nan")))
