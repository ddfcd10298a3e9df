import copy

import pytest
import torch
from torch import nn

from skillbank import Composed, ConstantGate, Growing, MLPGate, Skill, TopK, attach, check_model, fit, grow, merge
from tests.tiny import close, random_skill, tiny_batch, tiny_policy


def skills_of(policy, count):
    return [random_skill(policy.net, rank=2 + i, seed=i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_one_code_path_for_any_number_of_skills(count):
    policy = tiny_policy()
    composed = Composed(policy, MLPGate(5, count), skills_of(policy, count))
    check_model(composed, tiny_batch())
    assert composed.weights(tiny_batch()).shape == (6, count)


@pytest.mark.parametrize(("init", "expected"), [("newest", [0.0, 0.0, 1.0]), ("uniform", [1 / 3, 1 / 3, 1 / 3]), ("zero", [0.0, 0.0, 0.0])])
def test_initialisation(init, expected):
    weights = MLPGate(4, 3, init=init)(torch.randn(9, 4))
    torch.testing.assert_close(weights, torch.tensor(expected).expand(9, 3))


def test_official_initialisation_is_raw_and_divided_by_the_scale():
    torch.manual_seed(0)
    raw = MLPGate(4, 2, init="official", scale=1.0)
    torch.manual_seed(0)
    scaled = MLPGate(4, 2, init="official", scale=16.0)
    x = torch.randn(9, 4)
    close(16 * scaled(x), raw(x))
    assert raw(x).std() > 0.01


@pytest.mark.parametrize(("skills", "parameters"), [(2, 72_706), (1, 72_449)])
def test_parameter_count_of_the_paper(skills, parameters):
    assert sum(p.numel() for p in MLPGate(24, skills).parameters()) == parameters


def test_a_gate_that_chooses_is_topk_of_one_that_does_not():
    torch.manual_seed(0)
    plain, few = MLPGate(5, 4, hidden=(8,)), MLPGate(5, 4, hidden=(8,), k=2)
    assert torch.equal(few.constant, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    torch.nn.init.normal_(plain.head.weight)
    few.load_state_dict(plain.state_dict())
    context = torch.randn(3, 7, 5)
    expected, found = TopK(plain, 2)(context), few(context)
    assert torch.equal(found.dense(4), expected.dense(4))
    assert few.constant is None
    assert torch.equal(grow(few, 2)(context).dense(6)[..., :4], found.dense(4))
    with pytest.raises(ValueError, match="a gate over 4 skills chooses 1 to 4 of them, got k=5"):
        MLPGate(5, 4, k=5)


def test_a_standardised_gate_sees_every_feature_in_its_deviations():
    torch.manual_seed(0)
    gate, plain = MLPGate(3, 2), MLPGate(3, 2)
    nn.init.normal_(gate.head.weight)
    plain.load_state_dict(gate.state_dict())
    units, shift = torch.tensor([1e-3, 1.0, 1e3]), torch.tensor([5.0, -1.0, 0.0])
    x = torch.randn(1000, 3)
    gate.standardise((x * units + shift).view(10, 100, 3))
    seen = (x - x.mean(0)) / x.std(0)
    torch.testing.assert_close(gate(x * units + shift), plain(seen), rtol=1e-3, atol=1e-3)


def test_standardising_keeps_the_initialisation_and_travels_with_the_state():
    gate, other = MLPGate(3, 2), MLPGate(3, 2)
    gate.standardise(torch.randn(50, 3) * 7)
    torch.testing.assert_close(gate(torch.randn(9, 3)), torch.tensor([0.0, 1.0]).expand(9, 2))
    nn.init.normal_(gate.head.weight)
    other.load_state_dict(gate.state_dict())
    x = torch.randn(9, 3)
    assert torch.equal(gate(x), other(x))


def test_a_feature_that_never_changes_stays_finite():
    gate = MLPGate(2, 1)
    gate.standardise(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    nn.init.normal_(gate.head.weight)
    assert gate(torch.tensor([[1.0, 1.0]])).isfinite().all()


def test_one_context_cannot_standardise():
    with pytest.raises(ValueError, match="at least 2 contexts to standardise its input, got 1"):
        MLPGate(2, 1).standardise(torch.zeros(1, 2))


def test_copies_of_a_state_get_equal_weights():
    gate = MLPGate(5, 2)
    nn.init.normal_(gate.head.weight)
    rows = gate(torch.randn(1, 5).expand(8, 5))
    assert torch.equal(rows, rows[:1].expand(8, 2))


@pytest.mark.parametrize(
    ("regulariser", "penalty"), [("none", 0.0), ("mean", 256 * (0.6 - 0.5) ** 2), ("code", 256 * ((0.6 - 0.5) ** 2 + (0.9 - 1) ** 2))]
)
def test_regularisers_on_hand_computed_numbers(regulariser, penalty):
    policy = tiny_policy()
    composed = Composed(policy, ConstantGate(5, 2, weights=[0.3, 0.9]), skills_of(policy, 2), regulariser=regulariser)
    torch.manual_seed(0)
    loss = composed(tiny_batch())
    torch.manual_seed(0)
    assert float((loss - policy(tiny_batch())).detach()) == pytest.approx(penalty, rel=1e-3, abs=1e-4)


def test_the_gate_gets_a_gradient_and_nothing_else_does():
    policy = tiny_policy()
    composed = Composed(policy, MLPGate(5, 2), skills_of(policy, 2))
    composed(tiny_batch()).backward()
    with_gradient = {name for name, p in composed.named_parameters() if p.grad is not None}
    assert with_gradient == {f"gate.{name}" for name, _ in composed.gate.named_parameters()}


def test_skills_and_base_stay_in_eval_mode():
    policy = tiny_policy()
    composed = Composed(policy, MLPGate(5, 1), skills_of(policy, 1)).train()
    assert composed.gate.training
    assert not any(module.training for module in composed.model.modules())


class Sequence(nn.Module):
    """Reads (B, T, D); its context has one row per token."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, batch):
        return self.net(batch["x"]).square().mean()

    @torch.no_grad()
    def context(self, batch):
        return batch["x"]

    @torch.no_grad()
    def predict(self, batch):
        return self.net(batch["x"])


def test_weights_per_token():
    model = Sequence()
    parts, x = skills_of(model, 2), torch.randn(3, 5, 4)
    composed = Composed(copy.deepcopy(model), MLPGate(4, 2), parts)
    nn.init.normal_(composed.gate.head.weight)
    check_model(composed, {"x": x})
    weights, out = composed.weights({"x": x}), composed.predict({"x": x})
    assert weights.shape == (3, 5, 2)
    for row, token in [(0, 0), (1, 4), (2, 2)]:
        single = copy.deepcopy(model)
        attach(single.net, merge(parts, weights[row, token].detach()))
        close(out[row, token], single.predict({"x": x})[row, token])


class Picture(nn.Module):
    """Convolution: its rank channels are dimension 1."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv1d(3, 4, 3)

    forward = predict = lambda self, batch: self.net(batch["x"])

    def context(self, batch):
        return batch["x"].mean(-1)


def test_weights_per_sample_on_a_convolution():
    model, x = Picture(), torch.randn(2, 3, 8)
    parts = [Skill({"net": (torch.randn(2, 3, 3), torch.randn(4, 2))}) for _ in range(2)]
    parts = [Skill({"inner": part["net"]}) for part in parts]
    model.net = nn.Sequential()
    model.net.add_module("inner", nn.Conv1d(3, 4, 3))
    composed = Composed(copy.deepcopy(model), MLPGate(3, 2), parts)
    nn.init.normal_(composed.gate.head.weight)
    weights, out = composed.weights({"x": x}), composed.predict({"x": x})
    for row in range(2):
        single = copy.deepcopy(model)
        attach(single.net, merge(parts, weights[row].detach()))
        close(out[row], single.predict({"x": x})[row])


def test_errors_name_the_module_and_the_sizes():
    policy = tiny_policy()
    parts = skills_of(policy, 2)
    composed = Composed(policy, MLPGate(5, 2), parts)
    with pytest.raises(RuntimeError, match="the mixture has no weights yet"):
        policy(tiny_batch())
    composed.mixture.cell.mix(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"module 'time.1' runs on 6 rows, the gate gave weights for 1"):
        policy(tiny_batch())
    composed.mixture.cell.mix(torch.ones(6, 4, 2))
    with pytest.raises(ValueError, match=r"module 'time.1' runs on rows and tokens \(6,\), the gate gave weights for \(6, 4\)"):
        policy(tiny_batch())
    composed.gate = MLPGate(5, 3)
    with pytest.raises(ValueError, match="the gate gives 3 weights for 2 skills"):
        composed.predict(tiny_batch())
    attach(policy.net, parts[0])
    with pytest.raises(RuntimeError, match="another skill was attached to this net"):
        composed.predict(tiny_batch())


def test_bad_arguments():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="unknown init 'last'"):
        MLPGate(4, 2, init="last")
    with pytest.raises(ValueError, match="3 weights for 2 skills"):
        ConstantGate(4, 2, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="unknown regulariser 'l2'"):
        Composed(policy, MLPGate(5, 1), skills_of(policy, 1), regulariser="l2")
    embedding = Sequence()
    embedding.net = nn.Sequential(nn.Embedding(4, 3))
    words = Skill({"0": (torch.ones(1, 4), torch.ones(3, 1))}, frozenset({"0"}))
    with pytest.raises(ValueError, match="a gate cannot weight the embedding layer '0'"):
        Composed(embedding, MLPGate(4, 1), [words])


def test_a_copy_has_weights_of_its_own():
    policy = tiny_policy(temperature=0.0)
    composed = Composed(policy, ConstantGate(5, 2, weights=[0.3, 0.9]), skills_of(policy, 2))
    other = copy.deepcopy(composed)
    with torch.no_grad():
        other.gate.weights.zero_()
    expected = composed.predict(tiny_batch())
    assert not torch.equal(other.predict(tiny_batch()), expected)
    assert torch.equal(other.predict(tiny_batch()), tiny_policy(temperature=0.0).predict(tiny_batch()))
    assert torch.equal(composed.predict(tiny_batch()), expected)


def test_a_gate_that_grows_by_training_its_new_output_only():
    policy = tiny_policy(temperature=0.0)
    parts = skills_of(policy, 3)
    gate = MLPGate(5, 2, hidden=(8,))
    torch.nn.init.normal_(gate.head.weight)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    growing = Growing(gate)
    batch, context = tiny_batch(), torch.randn(7, 5)
    old = Composed(tiny_policy(temperature=0.0), gate, parts[:2]).predict(batch)
    composed = Composed(policy, growing, parts)
    close(composed.predict(batch), old)
    assert torch.equal(growing(context)[:, :2], gate(context))
    fit(composed, lambda start: iter(lambda: batch, None), growing.head.parameters(), steps=20, lr=0.05, weight_decay=0.1, ema=None, progress=False)
    grown = growing.grown()
    close(grown(context), growing(context))
    close(grown(context)[:, :2], gate(context))
    assert grown(context)[:, 2].abs().min() > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in gate.state_dict().items())
    assert [name for name, p in growing.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
