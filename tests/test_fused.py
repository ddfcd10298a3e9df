import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skillbank.attach import attach, fresh, read
from skillbank.mixture import Mixture
from skillbank.runtime.fused import fuse, gated_linear, lay_out, unfuse
from skillbank.skill import Skill


class Net(nn.Module):
    """Linear and Conv1D layers with and without bias."""

    def __init__(self, width=12):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, width), Conv1D(width, width), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


SIZES = {"first": (12, 5), "second": (12, 12), "third": (3, 12)}


def skills_of(count, *, dtype=torch.float64, seed=0):
    """Skills of different ranks on different sets of modules, each on two of three at least; the last module of an odd one has rank 1."""
    generator = torch.Generator().manual_seed(seed)
    skills = []
    for k in range(count):
        factors = {}
        for i, (name, (out, width)) in enumerate(SIZES.items()):
            if count > 1 and k % 4 == i:
                continue
            rank = 1 + (k + i) % 4
            factors[name] = tuple(torch.randn(*shape, generator=generator, dtype=dtype) / 3 for shape in ((rank, width), (out, rank)))
        skills.append(Skill(factors))
    return skills


def gradients(net, x, weights, mixture, trainable):
    mixture.cell.mix(weights)
    output = net(x)
    wanted = [x, weights, *trainable]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 64])
@pytest.mark.parametrize("frozen", [True, False])
def test_fused_and_reference_path_agree_in_values_and_gradients(shape, count, frozen):
    torch.manual_seed(0)
    net = Net().double().requires_grad_(not frozen)
    mixture = Mixture(net, skills_of(count))
    trainable = []
    if not frozen:
        trainable = list(net.parameters())
        for p in trainable:
            p.requires_grad_(True)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    for tokens in [False, True] if len(shape) > 1 else [False]:
        weights = torch.randn(*(shape if tokens else shape[:1]), count, dtype=torch.float64, requires_grad=True)
        reference = gradients(net, x, weights, mixture, trainable)
        assert fuse(net, mixture) == {}
        fused = gradients(net, x, weights, mixture, trainable)
        unfuse(net)
        for expected, found in zip(reference, fused, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        again = gradients(net, x, weights, mixture, trainable)
        assert all(torch.equal(one, other) for one, other in zip(reference, again, strict=True))


def test_weights_by_module_reach_their_module():
    net = Net()
    mixture = Mixture(net, skills_of(3, dtype=torch.float32))
    mixture.cell.mix({name: torch.randn(4, 3) for name in SIZES})
    x = torch.randn(4, 5)
    expected = net(x)
    fuse(net, mixture)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    net = Net(64).to(dtype)
    sizes = {"first": (64, 5), "second": (64, 64), "third": (3, 64)}
    skill = Skill({name: (torch.randn(8, width) / 8, torch.randn(out, 8) / 8) for name, (out, width) in sizes.items()})
    attach(net, skill)
    x = torch.randn(32, 5).to(dtype)
    exact = copy.deepcopy(net).double()(x.double())
    reference = net(x)
    fuse(net)
    fused = net(x)
    assert fused.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (fused - exact).norm() / exact.norm() < limit
    assert (fused - exact).norm() <= 1.5 * (reference - exact).norm()


def test_a_fresh_skill_trains_to_the_same_values():
    torch.manual_seed(0)
    nets = [Net().double(), Net().double()]
    nets[1].load_state_dict(nets[0].state_dict())
    x, target = torch.randn(16, 5).double(), torch.randn(16, 3).double()
    for i, net in enumerate(nets):
        torch.manual_seed(1)
        params = fresh(net, rank=4)
        before = net(x)
        if i:
            assert fuse(net) == {}
            assert torch.equal(net(x), before)  # B is 0: the base exactly
        optimizer = torch.optim.AdamW(params, lr=0.01)
        for _ in range(5):
            (net(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    one, other = map(read, nets)
    for name in SIZES:
        torch.testing.assert_close(other.delta(name), one.delta(name), rtol=1e-10, atol=1e-12)


def test_autocast_is_honoured():
    net = Net(64)
    params = fresh(net, rank=4)
    for p in params:
        nn.init.normal_(p, std=0.3)
    x = torch.randn(32, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = net(x)
        fuse(net)
        fused = net(x)
    assert fused.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(fused, reference, rtol=0.05, atol=0.3)
    fused.float().sum().backward()
    assert params[0].grad.dtype == torch.float32


def test_what_cannot_be_fused_stays_and_says_why():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    fresh(net, rank=2, targets=["0", "2", "3", "4"])
    net[3].get_base_layer().register_forward_hook(lambda *_: None)
    net[4].lora_A.double()
    net[4].lora_B.double()
    assert fuse(net) == {"0": "more than a linear layer", "3": "weights that only its own class can use", "4": "factors in another dtype"}


def test_a_mixture_cannot_be_forgotten():
    net = Net()
    Mixture(net, skills_of(2, dtype=torch.float32))
    with pytest.raises(ValueError, match="'first' are weighted by a mixture"):
        fuse(net)


def test_a_copy_of_a_fused_net_has_factors_and_weights_of_its_own():
    net = Net()
    mixture = Mixture(net, skills_of(2, dtype=torch.float32))
    fuse(net, mixture)
    mixture.cell.mix(torch.ones(4, 2))
    x = torch.randn(4, 5)
    other = copy.deepcopy(net)
    expected = net(x)
    mixture.cell.mix(torch.zeros(4, 2))
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(other(x), expected)


def test_the_layout_changes_neither_values_nor_shapes():
    net = Net()
    x = torch.randn(6, 5)
    before, state = net(x), {key: value.clone() for key, value in net.state_dict().items()}
    lay_out(net)
    assert net.first.weight.mT.is_contiguous()
    assert {key: value.shape for key, value in net.state_dict().items()} == {key: value.shape for key, value in state.items()}
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    torch.testing.assert_close(net(x), before)


def test_the_function_by_itself_against_autograd():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 5), torch.randn(5, 4), torch.randn(4)
    a, b, channels = torch.randn(3, 5), torch.randn(4, 3), torch.randn(6, 3)
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias, a, b, channels)]
    assert torch.autograd.gradcheck(gated_linear, inputs)
    assert torch.autograd.gradcheck(lambda x, weight, a, b: gated_linear(x, weight, None, a, b, scale=0.5), [*inputs[:2], *inputs[3:5]])


@pytest.mark.parametrize("merged", [(), ("first", "second", "third"), ("second",)], ids=str)
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_share_their_weights(merged, repeats, rows):
    net = Net().double()
    mixture = Mixture(net, skills_of(5))
    weights, x = torch.randn(rows, 5).double().requires_grad_(), torch.randn(rows * repeats, 5).double()
    mixture.cell.mix(weights.repeat_interleave(repeats, 0))
    expected = net(x)
    gradient = torch.autograd.grad(expected.square().sum(), weights)[0]
    mixture.cell.mix(weights, repeats)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    fuse(net, mixture, merged=merged)
    for _ in range(2):
        found = net(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), weights)[0], gradient, rtol=1e-12, atol=1e-12)
    mixture.cell.mix(weights * 0, repeats)
    assert not torch.allclose(net(x), expected)
    assert set(mixture.cell.made) == (set(merged) if rows == 1 else set())
    with pytest.raises(ValueError, match=f"'first' runs on 5 rows, the gate gave weights for {rows}"):
        net(x[:1].expand(5, -1))
