"""Compiled predictions are the model's, and nothing but a new shape compiles anew. Most tests trace only; one goes through the compiler."""

import copy
import warnings

import pytest
import torch
from torch import nn

from skillbank import Composed, MLPGate, Slots, TopK
from skillbank.mixture import Mixture
from skillbank.runtime.compiled import Compiled
from skillbank.runtime.plan import carry_out, plan_gated
from tests.tiny import close, random_skill, tiny_batch, tiny_policy


def composed(*, plan=None, samples=1, count=3):
    policy = tiny_policy(temperature=0.0)
    mixture = Mixture(policy.net, [random_skill(policy.net, rank=1 + seed, seed=seed) for seed in range(count)])
    if plan is not None:
        carry_out(plan_gated(policy.net, mixture, wanted=plan), policy.net, mixture)
    gate = MLPGate(5, count, hidden=(8,))
    torch.manual_seed(1)
    nn.init.normal_(gate.head.weight)
    return Composed(policy, gate, mixture).eval()


class Counter:
    """A backend that runs what was traced as it is, and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("plan", [None, "reference", "factors", "per row"])
def test_traced_is_eager_and_nothing_but_a_shape_traces_again(plan, samples):
    model, count = composed(plan=plan), Counter()
    fast = Compiled(copy.deepcopy(model), backend=count)
    options = {} if samples is None else {"samples": samples}
    for seed in range(3):
        batch = {"observation": torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))}
        close(fast.predict(batch, **options), model.predict(batch, **options))
    with torch.no_grad():
        for one in (model, fast.model):
            torch.manual_seed(5)
            for p in one.parameters():  # other base, skills and gate
                p.add_(0.05 * torch.randn_like(p))
    close(fast.predict(batch, **options), model.predict(batch, **options))
    assert count.graphs == 1
    fast.predict({"observation": batch["observation"][:2]}, **options)
    assert count.graphs == 2


def test_slots_can_be_filled_without_tracing_again():
    policy, count = tiny_policy(temperature=0.0), Counter()
    slots = Slots(policy.net, 5, rank=2)
    gate = TopK(MLPGate(5, 5, hidden=(8,)), 4)
    nn.init.normal_(gate.gate.head.weight)
    model = Composed(policy, gate, slots)
    fast = Compiled(model, backend=count)
    batch, before = tiny_batch(), None
    for slot in range(5):
        slots.put(slot, random_skill(tiny_policy().net, rank=1 + slot % 2, seed=slot))
        found = fast.predict(batch)
        close(found, model.predict(batch))
        assert before is None or not torch.equal(found, before)
        before = found
    slots.clear(0)
    close(fast.predict(batch), model.predict(batch))
    assert count.graphs == 1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 5)

    def predict(self, batch):
        return self.net(batch["observation"])


def test_more_models_than_torch_would_compile_one_function_for():
    counts = [Counter() for _ in range(10)]
    for count in counts:
        Compiled(Plain(), backend=count).predict(tiny_batch())
    assert [count.graphs for count in counts] == [1] * 10


def test_it_is_a_model_and_a_copy_is_one_of_its_own():
    model = Compiled(composed(), backend="eager")
    batch = tiny_batch()
    expected = model.predict(batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other.predict(batch), expected)
    assert not torch.equal(model.predict(batch), expected)
    assert model.net is model.model.net
    assert torch.equal(other.context(batch), batch["observation"])
    assert other(batch).shape == ()


def test_through_the_compiler():
    with warnings.catch_warnings(action="ignore"):  # of torch about itself
        model = composed(plan="factors")
        fast = Compiled(copy.deepcopy(model))
        for seed in range(2):
            batch = {"observation": torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))}
            torch.testing.assert_close(fast.predict(batch), model.predict(batch), rtol=1e-4, atol=1e-4)
