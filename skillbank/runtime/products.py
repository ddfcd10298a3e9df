"""Matrix products on a CPU by that one of torch's two libraries which is fast on it.

torch leaves products in single precision to MKL. On processors that are not Intel's, MKL runs at less than half of what oneDNN reaches there, which
torch has as well, and which takes some ten microseconds to start: small products stay with MKL.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["add_product", "best_as_stored", "linear", "product", "quicken"]

_CPUINFO = Path("/proc/cpuinfo")
_LARGE = 2**20
"""Multiplications from which oneDNN's start is paid for."""


def _mkl_is_slow() -> bool:
    """Whether the processor is one that MKL is not made for."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return "AuthenticAMD" in (_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())


_BY_ONEDNN = _mkl_is_slow()


def product(rows: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows m + bias`, (N, I), (I, O), (O,) -> (N, O), without a gradient of its own."""
    if _by_onednn(rows, m):
        return _product(rows, m, bias)
    return rows @ m if bias is None else torch.addmm(bias, rows, m)


def add_product(y: Tensor, rows: Tensor, m: Tensor, *, keep: bool = False) -> Tensor:
    """`y + rows m`, (N, O), (N, I), (I, O) -> (N, O), without a gradient of its own; y may be written over unless it is to be kept."""
    if _by_onednn(rows, m):
        return _add_product(y, rows, m)
    return torch.addmm(y, rows, m) if keep else y.addmm_(rows, m)


def linear(x: Tensor, m: Tensor, bias: Tensor | None) -> Tensor:
    """`x m + bias` for x (..., I), with its gradient."""
    if torch.is_autocast_enabled(x.device.type) or not _by_onednn(x, m):
        return nn.functional.linear(x, m.mT, bias)
    if not torch.is_grad_enabled():
        return _product(x.flatten(0, -2), m, bias).view(*x.shape[:-1], -1)
    result: Tensor = _Linear.apply(x, m, bias)  # type: ignore[no-untyped-call]
    return result


def quicken(net: nn.Module) -> None:
    """Let the linear layers of a net compute by `linear`, where that is another than their own function; `unfuse` takes it off."""
    for layer in net.modules():
        if _BY_ONEDNN and type(layer) is nn.Linear:
            layer.__dict__.setdefault("forward", partial(_forward, layer))


def best_as_stored(weight: Tensor) -> bool:
    """Whether products with a weight (O, I) are fastest as it is stored, output first: with oneDNN, if it has to come from memory."""
    return _BY_ONEDNN and weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _LARGE


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight.mT, layer.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, m)
        return product(x.flatten(0, -2), m, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, m = ctx.saved_tensors
        need_x, need_m, need_bias = ctx.needs_input_grad
        dy, rows = gradients[0].flatten(0, -2), x.flatten(0, -2)
        dx = product(dy, m.mT).view_as(x) if need_x else None
        return dx, product(rows.mT, dy) if need_m else None, dy.sum(0) if need_bias else None


def _by_onednn(rows: Tensor, m: Tensor) -> bool:
    if not (_BY_ONEDNN and rows.dtype == torch.float32 == m.dtype and rows.device.type == "cpu" and rows.numel() * m.shape[1] >= _LARGE):
        return False
    return m.is_contiguous() or m.mT.is_contiguous()  # for parts of a matrix oneDNN has only its reference implementation, 1000 times as slow


def _product(rows: Tensor, m: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.skillbank.product(rows, m, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, m.mT, bias, "none", [], "")


def _add_product(y: Tensor, rows: Tensor, m: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.skillbank.add_product(y, rows, m)
    return torch.ops.mkldnn._linear_pointwise.binary(rows, y, m.mT, None, "add")


# inductor compiles oneDNN's operations for weights that are constants only, but calls any that it does not know
_library = torch.library.Library("skillbank", "DEF")
_library.define("product(Tensor rows, Tensor m, Tensor? bias) -> Tensor")
_library.define("add_product(Tensor y, Tensor rows, Tensor m) -> Tensor")
_library.impl("product", _product, "CPU")
_library.impl("add_product", _add_product, "CPU")
_library.impl("product", lambda rows, m, bias: rows.new_empty(len(rows), m.shape[1]), "Meta")
_library.impl("add_product", lambda y, rows, m: torch.empty_like(y), "Meta")
