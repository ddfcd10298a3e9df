"""Matrix products on a CPU by that one of torch's two libraries which is fast on it.

torch leaves products in single precision to MKL. On processors that are not Intel's, MKL runs at less than half of what oneDNN reaches there, which
torch has as well, and which takes some ten microseconds to start: small products stay with MKL.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["add_product", "linear", "product"]

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
    """`x m + bias` for x (..., I), with a gradient where gradients are wanted."""
    if torch.is_grad_enabled() or not _by_onednn(x, m):
        return torch.nn.functional.linear(x, m.mT, bias)
    return _product(x.flatten(0, -2), m, bias).view(*x.shape[:-1], -1)


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
