"""Products by either library are products, as they are and compiled."""

import copy

import pytest
import torch
from torch import nn

from skillbank.runtime import products
from skillbank.runtime.fused import gated_linear, lay_out, unfuse
from skillbank.runtime.products import add_product, linear, product

ROWS, WIDTH, OUT = 64, 128, 256

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN"))], ids=["default", "oneDNN"])
def library(request, monkeypatch):
    monkeypatch.setattr(products, "_BY_ONEDNN", request.param)
    assert (products._by_onednn(torch.empty(ROWS, WIDTH), torch.empty(WIDTH, OUT))) is request.param
    return request.param


def close(found, expected):
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("transposed", [False, True])
def test_products(library, transposed):
    rows, m, bias, y = drawn((ROWS, WIDTH), (OUT, WIDTH) if transposed else (WIDTH, OUT), (OUT,), (ROWS, OUT))
    m = m.mT if transposed else m
    expected = rows.double() @ m.double()
    close(product(rows, m), expected)
    close(product(rows, m, bias), expected + bias)
    close(linear(rows.view(4, -1, WIDTH), m, bias), (expected + bias).view(4, -1, OUT))
    close(product(rows.mT.contiguous().mT, m), expected)
    added = y + expected
    close(add_product(y, rows, m), added)


def test_small_or_exact_ones_stay_where_they_are(library):
    rows, m = drawn((ROWS, WIDTH), (WIDTH, OUT))
    for one, other in [(rows[:1], m), (rows.double(), m.double()), (rows, m[:, 1:])]:
        assert not products._by_onednn(one, other)
        assert torch.equal(product(one, other), one @ other)
    y = torch.zeros(1, OUT)
    assert add_product(y, rows[:1], m) is y


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_and_their_gradients(library, compiled):
    rank = 128
    tensors = [tensor.requires_grad_() for tensor in drawn((ROWS, WIDTH), (OUT, WIDTH), (OUT,), (rank, WIDTH), (OUT, rank), (ROWS, rank))]
    torch._dynamo.reset()
    layer = torch.compile(_layer, dynamic=False, fullgraph=True) if compiled else _layer
    found = layer(*tensors)
    gradients = torch.autograd.grad(found.square().sum(), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    x, weight, bias, a, b, channels = exact
    expected = x @ weight.mT + bias + (channels * (x @ a.mT)) @ b.mT
    close(found.detach(), expected.detach())
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    with torch.no_grad():
        close(layer(*tensors), expected.detach())


def _layer(x, weight, bias, a, b, channels):
    return gated_linear(x, weight.mT, bias, a, b, channels)


def test_a_net_that_is_laid_out(library):
    net = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh(), nn.Linear(OUT, WIDTH))
    (x,) = drawn((ROWS, WIDTH))
    expected = net.double()(x.double()).detach()
    lay_out(net.float())
    found = net(x)
    close(found.detach(), expected)
    gradients = torch.autograd.grad(found.square().sum(), list(net.parameters()))
    exact = copy.deepcopy(net).double()
    unfuse(exact)
    for one, other in zip(gradients, torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters())), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert ("forward" in net[0].__dict__) is library
    with torch.no_grad():
        close(net(x), expected)
        close(net(x.view(2, -1, WIDTH)), expected.view(2, -1, WIDTH))
    unfuse(net)
    assert "forward" not in net[0].__dict__
