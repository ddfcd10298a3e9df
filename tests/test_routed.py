"""A few of many skills per row: against the loop over rows that says what it is, for both sets of operations and for slots on a net."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from skillbank import Composed, MLPGate, Routes, Skill, Slots, TopK, attach
from skillbank.mixture import Mixture
from skillbank.runtime.routed import prepare, routed

try:
    from skillbank.runtime import kernels
except ImportError:  # no Triton for this platform
    kernels = None

OPERATIONS = [pytest.param(None, id="bags"), pytest.param(kernels, id="kernels", marks=pytest.mark.skipif(kernels is None, reason="no Triton"))]


def by_row(x, a, b, index, weights):
    return torch.stack([sum(w * (b[s].mT @ (a[s] @ row)) for s, w in zip(*pair, strict=True)) for row, *pair in zip(x, index, weights, strict=True)])


def problem(rows, k, slots, rank, width, out, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    index = torch.randint(slots, (rows, k), generator=generator)
    return draw(rows, width), draw(slots, rank, width), draw(slots, rank, out), index, draw(rows, k)


@pytest.mark.parametrize("ops", OPERATIONS)
@pytest.mark.parametrize(
    ("rows", "k", "slots", "rank", "width", "out"),
    [(1, 1, 1, 1, 1, 1), (1, 2, 64, 8, 40, 24), (37, 3, 9, 5, 70, 130), (40, 1, 2, 16, 600, 3), (20, 4, 4, 17, 9, 300), (5, 2, 1000, 3, 8, 8)],
)
def test_values_and_gradients(ops, rows, k, slots, rank, width, out):
    dtype, limit = (torch.float64, 1e-12) if ops is None else (torch.float32, 2e-5)
    x, a, b, index, weights = problem(rows, k, slots, rank, width, out, dtype=dtype)
    expected, found = by_row(x, a, b, index, weights), routed(x, a, b, index, weights, prepared=prepare(index, slots, rank, ops=ops))
    along = torch.randn_like(expected)
    for one, other in [
        (found, expected),
        *zip(*(torch.autograd.grad((y * along).sum(), (x, a, b, weights)) for y in (found, expected)), strict=True),
    ]:
        assert (one - other).norm() <= limit * (1 + other.norm())


@pytest.mark.parametrize(("groups", "each", "k", "slots"), [(1, 7, 2, 3), (4, 2, 1, 1), (3, 5, 4, 9)])
def test_rows_that_share_routes_are_rows_with_the_same_routes(groups, each, k, slots):
    x, a, b, index, weights = problem(groups * each, k, slots, 3, 6, 5)
    index, weights = index[:groups], weights.detach()[:groups].requires_grad_()
    found = routed(x, a, b, index, weights)
    expected = by_row(x, a, b, index.repeat_interleave(each, 0), weights.repeat_interleave(each, 0))
    along = torch.randn_like(expected)
    for one, other in [
        (found, expected),
        *zip(*(torch.autograd.grad((y * along).sum(), (x, a, b, weights)) for y in (found, expected)), strict=True),
    ]:
        assert (one - other).norm() <= 1e-12 * (1 + other.norm())


@pytest.mark.parametrize("ops", OPERATIONS)
def test_only_what_is_asked_for_gets_a_gradient(ops):
    x, a, b, index, weights = problem(6, 2, 5, 3, 4, 7, dtype=torch.float32)
    routed(x.detach(), a.detach(), b.detach(), index, weights, prepared=prepare(index, 5, 3, ops=ops)).sum().backward()
    assert weights.grad is not None
    assert x.grad is a.grad is b.grad is None


@pytest.mark.skipif(kernels is None, reason="no Triton")
def test_kernels_repeat_to_the_bit():
    x, a, b, index, weights = (tensor.detach() for tensor in problem(50, 4, 3, 8, 96, 64, dtype=torch.float32))
    told = prepare(index, 3, 8, ops=kernels)
    assert torch.equal(routed(x, a, b, index, weights, prepared=told), routed(x, a, b, index, weights, prepared=told))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 12), Conv1D(12, 12), nn.Linear(12, 3, bias=False)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


SIZES = {"first": (12, 5), "second": (12, 12), "third": (3, 12)}


def skill(seed, *, leave_out=None, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for i, (name, (out, width)) in enumerate(SIZES.items()):
        r = rank or 1 + (seed + i) % 4
        if name != leave_out:
            factors[name] = tuple(torch.randn(*shape, generator=generator, dtype=dtype) / 3 for shape in ((r, width), (out, r)))
    return Skill(factors)


def filled(count=6, *, slots=8):
    """A net with slots, some of them filled, and the same skills as a mixture on a copy of the net."""
    torch.manual_seed(0)
    net = Net().double()
    other = copy.deepcopy(net)
    skills = [skill(seed, leave_out=[None, "second", "third"][seed % 3]) for seed in range(count)]
    made = Slots(net, slots, rank=4)
    for slot, each in enumerate(skills):
        made.put(slot, each)
    return net, made, other, Mixture(other, skills), skills


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4)], ids=str)
def test_slots_are_the_mixture_under_dense_weights_and_under_routes(shape):
    net, slots, other, mixture, skills = filled()
    x = torch.randn(*shape, 5).double().requires_grad_()
    for tokens in [False, True] if len(shape) > 1 else [False]:
        weights = torch.randn(*(shape if tokens else shape[:1]), len(skills)).double().requires_grad_()
        empty = torch.zeros(*weights.shape[:-1], 2).double()
        mixture.cell.mix(weights)
        expected = other(x)
        slots.cell.mix(torch.cat([weights, empty + 1], -1))  # an empty slot is nothing, whatever its weight
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
        every = torch.arange(len(skills)).expand(weights.shape)
        slots.cell.mix(Routes(every, weights))  # k = K is dense
        found = net(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for one, other_one in zip(*(torch.autograd.grad(y.square().sum(), (x, weights)) for y in (found, expected)), strict=True):
            torch.testing.assert_close(one, other_one, rtol=1e-11, atol=1e-11)
        chosen = torch.rand(weights.shape).topk(2).indices
        slots.cell.mix(Routes(chosen, weights.gather(-1, chosen)))
        mixture.cell.mix(torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen)))
        torch.testing.assert_close(net(x), other(x), rtol=1e-12, atol=1e-12)
        mixture.cell.mix(Routes(chosen, weights.gather(-1, chosen)))  # the reference path takes routes as well
        torch.testing.assert_close(other(x), net(x), rtol=1e-12, atol=1e-12)


def test_routes_of_rows_that_share_them():
    net, slots, other, mixture, skills = filled()
    index, weights = torch.tensor([[0, 3], [5, 5]]), torch.tensor([[0.5, -1.0], [0.25, 0.5]]).double()
    x = torch.randn(6, 5).double()
    for cell in (slots.cell, mixture.cell):
        cell.mix(Routes(index, weights), 3)
    torch.testing.assert_close(net(x), other(x), rtol=1e-12, atol=1e-12)
    attach(other, skills[5])
    alone = other(x[3:])
    slots.cell.mix(Routes(index[1:], weights[1:] * 4 / 3))  # named twice, it counts twice: weight 1 in all
    torch.testing.assert_close(net(x[3:4]), alone[:1], rtol=1e-12, atol=1e-12)


def test_a_slot_is_put_replaced_and_cleared_without_touching_the_others():
    net, slots, _, _, skills = filled()
    x, one = torch.randn(4, 5).double(), torch.ones(4, 1).double()
    alone = lambda slot: Routes(torch.full((4, 1), slot), one)  # noqa: E731

    def outputs():
        found = []
        for slot in range(slots.count):
            slots.cell.mix(alone(slot))
            found.append(net(x))
        return found

    before = outputs()
    places = [p.data_ptr() for p in slots.parameters()]
    slots.put(2, skill(77, rank=1, leave_out="first"))
    slots.clear(4)
    after = outputs()
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [slot not in (2, 4) for slot in range(8)]
    assert torch.equal(after[4], after[7])  # empty: the base
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(after[7], plain(x), rtol=1e-12, atol=1e-12)
    attach(plain, skill(77, rank=1, leave_out="first"))
    torch.testing.assert_close(after[2], plain(x), rtol=1e-12, atol=1e-12)
    assert slots.read(0).fingerprint == skills[0].fingerprint
    assert places == [p.data_ptr() for p in slots.parameters()]


def test_what_does_not_go_into_a_slot_leaves_it_as_it_was():
    net, slots, _, _, skills = filled()
    big = skill(1, rank=5)
    with pytest.raises(ValueError, match=r"module 'first' of the skill has rank 5, slots hold 4: make them larger, or truncate it"):
        slots.put(0, big)
    with pytest.raises(ValueError, match=r"module 'third' is \(out, in\) \(3, \(12,\)\), the skill's factor is \(4, \(12,\)\)"):
        slots.put(0, Skill({**dict(skills[0].factors), "third": (torch.zeros(1, 12), torch.zeros(4, 1))}))
    with pytest.raises(ValueError, match="the skill adapts the module 'fourth', which has no slots"):
        slots.put(0, Skill({"fourth": (torch.zeros(1, 12), torch.zeros(4, 1))}))
    with pytest.raises(IndexError, match="there is no slot 8, there are 8: 0 to 7"):
        slots.put(8, skills[0])
    assert slots.read(0).fingerprint == skills[0].fingerprint
    with pytest.raises(ValueError, match="slot 7 is empty"):
        slots.read(7)
    slots.cell.mix(torch.ones(3, 8).double())
    with pytest.raises(ValueError, match="'first' runs on 4 rows, the gate gave weights for 3"):
        net(torch.zeros(4, 5).double())
    slots.cell.mix(Routes(torch.zeros(2, 4, 1).long(), torch.ones(2, 4, 1).double()))
    with pytest.raises(ValueError, match=r"'first' runs on rows and tokens \(2, 3\), the gate gave weights for \(2, 4\)"):
        net(torch.zeros(2, 3, 5).double())


def test_where_slots_cannot_be():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="module '1' is no linear layer of this net"):
        Slots(net, 2, rank=2, modules=["1"])
    attach(net, Skill({"0": (torch.zeros(1, 4), torch.zeros(4, 1))}))
    with pytest.raises(ValueError, match="there is a skill on this net: detach it"):
        Slots(net, 2, rank=2)


class Regressor(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return (self.net(batch["x"]) - batch["y"]).square().mean()

    @torch.no_grad()
    def context(self, batch):
        return batch["x"]

    @torch.no_grad()
    def predict(self, batch):
        return self.net(batch["x"])


def test_a_gate_that_chooses_learns_through_its_choice():
    net, slots, other, mixture, _ = filled()
    gates = [TopK(MLPGate(5, count, hidden=(8,)).double(), 2) for count in (8, 6)]
    torch.manual_seed(3)
    for p in gates[0].parameters():
        nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        gates[0].gate.head.bias[6:] = 0
        gates[0].gate.head.weight[6:] = 0
        for mine, p in zip(gates[1].parameters(), gates[0].parameters(), strict=True):
            mine.copy_(p[: len(mine)])
    batch = {"x": torch.randn(32, 5).double(), "y": torch.randn(32, 3).double()}
    losses = []
    for gate, model in zip(gates, (Composed(Regressor(net), gates[0], slots), Composed(Regressor(other), gates[1], mixture)), strict=True):
        optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-10, atol=1e-12)
    assert losses[0][-1] < losses[0][0]
    assert slots.mark is None
    assert all(not p.requires_grad for p in slots.parameters())


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_routes_and_their_dense_form_name_the_same_weights(k, count, seed):
    generator = torch.Generator().manual_seed(seed)
    routes = Routes(torch.randint(count, (3, k), generator=generator), torch.randn(3, k, generator=generator))
    dense = routes.dense(count)
    for row in range(3):
        for one in range(count):
            torch.testing.assert_close(dense[row, one], routes.weights[row][routes.index[row] == one].sum(), rtol=1e-5, atol=1e-6)


def test_top_k_takes_the_largest_in_magnitude_and_all_of_them_are_the_gate():
    gate = MLPGate(3, 4, hidden=(8,))
    nn.init.normal_(gate.head.weight)
    context = torch.randn(5, 3)
    assert torch.equal(TopK(gate, 4)(context).dense(4), gate(context))
    two = TopK(gate, 2)(context)
    least = two.weights.abs().min(-1).values
    assert torch.equal((gate(context).abs() >= least[:, None]).sum(-1), torch.full((5,), 2))
    with pytest.raises(ValueError, match="the gate has 4 skills to choose from, k is 5"):
        TopK(gate, 5)(context)
    with pytest.raises(ValueError, match="at least one skill, got k=0"):
        TopK(gate, 0)
