"""The laws of composition, on the product B @ A and on a model's outputs, for merges and gates alike."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Composed, ConstantGate, MLPGate, attach, fit, fresh, grow, merge, read
from skillbank.skill import digest
from tests.tiny import close, net_inputs, random_skill, tiny_batch, tiny_policy

POLICY = tiny_policy()
MODULES = [None, ["enter", "blocks.0.expand", "blocks.1.reduce"], ["time.1", "leave.1", "blocks.0.expand"]]
SKILLS = [random_skill(POLICY.net, rank=rank, modules=names, seed=i) for i, (rank, names) in enumerate(zip([4, 2, 5], MODULES, strict=True))]


def output(skill=None):
    net = copy.deepcopy(POLICY.net)
    if skill is not None:
        attach(net, skill)
    with torch.no_grad():
        return net(*net_inputs())


def gated(weights, skills=SKILLS):
    """Output of the stack under constant weights per sample (B, K)."""
    composed = Composed(copy.deepcopy(POLICY), ConstantGate(5, len(skills)), skills)
    composed.mixture.cell.mix(torch.as_tensor(weights, dtype=torch.float32).expand(6, len(skills)))
    with torch.no_grad():
        return composed.net(*net_inputs())


numbers = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)


@given(numbers)
@settings(max_examples=25, deadline=None)
def test_gate_of_a_constant_is_the_merge(weights):
    close(gated(weights), output(merge(SKILLS, weights)))


@pytest.mark.parametrize("method", ["stack", "svd"])
@given(numbers, st.permutations(range(3)))
@settings(max_examples=15, deadline=None)
def test_order_does_not_matter(method, weights, order):
    options = {"error": 0.0} if method == "svd" else {}
    shuffled = merge([SKILLS[i] for i in order], [weights[i] for i in order], method=method, **options)
    close(output(shuffled), output(merge(SKILLS, weights, method=method, **options)))


@pytest.mark.parametrize("method", ["stack", "svd"])
@pytest.mark.parametrize("which", range(3))
def test_one_skill_at_weight_one_is_itself_and_weight_zero_is_absent(method, which):
    alone = output(SKILLS[which])
    close(output(merge([SKILLS[which]], [1.0], method=method)), alone)
    one_hot = [float(k == which) for k in range(3)]
    close(output(merge(SKILLS, one_hot, method=method, rank=20) if method == "svd" else merge(SKILLS, one_hot)), alone)
    close(gated(one_hot), alone)


def test_all_weights_zero_is_the_base():
    close(gated([0.0, 0.0, 0.0]), output())


def test_every_sample_has_its_own_weights():
    weights = torch.randn(6, 3)
    together = gated(weights)
    for row in range(6):
        close(together[row], output(merge(SKILLS, weights[row]))[row])


def test_the_stack_equals_a_loop_over_skills_in_values_and_gradients():
    """Oracle: every layer computes W x + b + sum_k w_k B_k A_k x, one skill after the other, in float64."""
    policy = tiny_policy().double()
    skills = [skill.to(dtype=torch.float64) for skill in SKILLS]
    inputs = [x.double() if x.is_floating_point() else x for x in net_inputs()]
    weights = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    composed = Composed(copy.deepcopy(policy), ConstantGate(5, 3), skills)
    composed.mixture.cell.mix(weights)
    composed.net(*inputs).square().sum().backward()
    looped = weights.detach().clone().requires_grad_()

    def add(name):
        def hook(layer, args, out):
            for k, skill in enumerate(skills):
                if name in skill:
                    a, b = skill[name]
                    out = out + looped[:, k, None] * (args[0] @ a.mT @ b.mT)
            return out

        return hook

    for name, layer in policy.net.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(add(name))
    expected = policy.net(*inputs)
    expected.square().sum().backward()
    close(composed.net(*inputs), expected, 1e-12)
    close(weights.grad, looped.grad, 1e-11)


def test_read_is_the_inverse_of_attach():
    net = copy.deepcopy(POLICY.net)
    for skill in SKILLS:
        attach(net, skill)
        assert read(net).fingerprint == skill.fingerprint


def batches(start):
    while True:
        torch.manual_seed(start)
        yield tiny_batch()
        start += 1


@pytest.mark.parametrize("stage", ["skill", "gate"])
def test_only_the_intended_parameters_change(stage):
    policy = tiny_policy(dropout=0.0)
    if stage == "skill":
        model, params = policy, fresh(policy.net, rank=2)
    else:
        model = Composed(policy, MLPGate(5, 3, hidden=(8,)), SKILLS)
        params = list(model.gate.parameters())
    chosen = {id(p) for p in params}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
    before, moved = digest(frozen), [p.detach().clone() for p in params]
    fit(model, batches, params, steps=4, ema=None, progress=False)
    assert digest(frozen) == before
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(params, moved, strict=True))


def test_adding_a_skill_to_a_gate_changes_nothing_until_it_is_trained():
    gate = MLPGate(5, 2, hidden=(16, 16))
    torch.nn.init.normal_(gate.head.weight)
    gate.standardise(3 * torch.randn(50, 5) + 1)
    bigger, context = grow(gate), torch.randn(32, 5)
    assert torch.equal(bigger(context)[:, :2], gate(context))
    assert torch.equal(bigger(context)[:, 2], torch.zeros(32))
    close(Composed(tiny_policy(), bigger, SKILLS)(tiny_batch()).detach().isfinite().float(), torch.tensor(1.0))


def test_a_grown_gate_composes_to_the_same_actions():
    gate = MLPGate(5, 2, hidden=(16,))
    torch.nn.init.normal_(gate.head.weight)
    old, new = Composed(tiny_policy(temperature=0.0), gate, SKILLS[:2]), Composed(tiny_policy(temperature=0.0), grow(gate), SKILLS)
    close(new.predict(tiny_batch()), old.predict(tiny_batch()))
