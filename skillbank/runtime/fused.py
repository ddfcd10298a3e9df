"""Adapted linear layers as one operation, forward and backward: `y = W x + b + B (channels * (A x))`, whatever the number of skills.

The layers stay where they are and keep their parameters; only what they compute with is another function, and taking it off brings back the
reference path. Shapes: B batch, I in, O out, R rank (sum over the skills).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.attach import Adapted, adapted_layers
from skillbank.layers import matrix
from skillbank.mixture import Mixture
from skillbank.runtime.products import add_product, best_as_stored, linear, product, quicken

__all__ = ["fuse", "gated_linear", "lay_out", "unfuse", "why_not"]


class _GatedLinear(torch.autograd.Function):
    """No gradient is formed for what is frozen, no copy of the (N, O) result is made, and of the channels only A x is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, channels: Tensor | None, scale: float) -> Tensor:
        y, hidden = _compute(x, weight, bias, a, b, channels, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, channels, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, channels, hidden = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_channels, _ = ctx.needs_input_grad
        dy = gradients[0].flatten(0, -2)
        rows = x.flatten(0, -2)
        before = _times(dy, b).view_as(hidden)
        after = before * ctx.scale if channels is None else _weigh(before, channels)
        inner = after.flatten(0, -2)
        dx = _add_times(product(dy, weight.mT), inner, a).view_as(x) if need_x else None
        dweight = product(rows.mT, dy) if need_weight else None
        dbias = dy.sum(0) if need_bias else None
        da = _outer(inner, rows, a) if need_a else None
        db = _outer(dy, (hidden * ctx.scale if channels is None else _weigh(hidden, channels)).flatten(0, -2), b) if need_b else None
        dchannels = None
        if need_channels:
            each = before * hidden
            each = each if channels.shape[-1] == each.shape[-1] else each.unflatten(-1, (channels.shape[-1], -1)).sum(-1)
            dchannels = each.sum_to_size(channels.shape)
        return dx, dweight, dbias, da, db, dchannels, None


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, channels: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Result, and A x."""
    flat = x.dim() == 2
    rows = x if flat else x.flatten(0, -2)
    hidden = _times(rows, a.mT)
    hidden = hidden if flat else hidden.view(*x.shape[:-1], -1)
    weighted = hidden * scale if channels is None else _weigh(hidden, channels)
    y = _add_times(product(rows, weight, bias), weighted if flat else weighted.flatten(0, -2), b.mT)
    return y if flat else y.view(*x.shape[:-1], -1), hidden


def _weigh(hidden: Tensor, channels: Tensor) -> Tensor:
    """Hidden (B, ..., R) times weights of R channels, or of C times R / C channels next to each other, which are not copied for that."""
    count = channels.shape[-1]
    return hidden * channels if count in (1, hidden.shape[-1]) else (hidden.unflatten(-1, (count, -1)) * channels[..., None]).flatten(-2)


def _times(rows: Tensor, m: Tensor) -> Tensor:
    """Rows times a matrix, or times one of G matrices for each G-th of them."""
    return product(rows, m) if m.dim() == 2 else _by_group(rows.view(len(m), -1, rows.shape[-1]), m).flatten(0, 1)


def _add_times(y: Tensor, rows: Tensor, m: Tensor) -> Tensor:
    """Add `_times` to y, in place where that is possible."""
    if m.dim() == 2:
        return add_product(y, rows, m)
    y.view(len(m), -1, y.shape[-1]).baddbmm_(rows.view(len(m), -1, rows.shape[-1]), m)
    return y


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Left transposed times right, by groups where what it is the gradient of has groups; the narrower one is turned over, which may cost a copy."""
    if left.shape[1] > right.shape[1]:
        return _outer(right, left, like).mT
    if like.dim() == 2:
        return product(left.mT, right)
    return _by_group(left.view(len(like), -1, left.shape[-1]).mT, right.view(len(like), -1, right.shape[-1]))


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """`left right` for (G, N, I) and (G, I, O): one product on a GPU, a few large ones on a CPU."""
    return torch.bmm(left, right) if left.is_cuda else torch.stack([product(*pair) for pair in zip(left, right, strict=True)])


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, channels: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`x weight + bias + (channels * scale * (x A^T)) B^T`, (B, ..., O).

    Args:
        x: (B, ..., I).
        weight: (I, O), as `nn.Linear.weight.mT` or the weight of transformers' `Conv1D`.
        bias: (O,).
        a: (R, I), or (G, R, I), one for each G-th of the rows B.
        b: (O, R), or (G, O, R).
        channels: weights (B, ..., C) of the rank channels, C a divisor of R, each for R / C of them, next to each other; other dimensions may be 1.
            None for 1. With channels, `scale` must be 1.
        scale: multiplier of the factors.

    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
        bias = None if bias is None else bias.to(dtype)
    channels = None if channels is None else channels.to(a.dtype)
    if not torch.is_grad_enabled():
        return _compute(x, weight, bias, a, b, channels, scale)[0]
    result: Tensor = _GatedLinear.apply(x, weight, bias, a, b, channels, scale)  # type: ignore[no-untyped-call]
    return result


def fuse(net: nn.Module, mixture: Mixture | None = None, *, merged: Collection[str] = (), leave: Collection[str] = ()) -> dict[str, str]:
    """Let the adapted layers of a net compute by `gated_linear`, with the weights of its mixture, if it has one.

    Parameters, module paths, `read` and `detach` are as before; trainable or not, in training or not.

    Args:
        net: with a skill, or the stack of a mixture, on it.
        mixture: the mixture.
        merged: modules whose weights are merged anew where the gate gives one row of weights, for all rows of the net and all passes that follow.
        leave: modules to leave alone.

    Returns:
        Modules that stay on the reference path, and why.

    Raises:
        ValueError: the net's factors are weighted by a mixture that was not given.

    """
    left: dict[str, str] = {}
    for name, adapted in adapted_layers(net).items():
        reason = "asked for" if name in leave else why_not(adapted)
        if adapted is None or reason:
            left[name] = reason
            continue
        if mixture is None and adapted.up._forward_pre_hooks:
            raise ValueError(f"the factors of {name!r} are weighted by a mixture: pass it to fuse as well")
        adapted.layer.forward = partial(_forward, adapted, mixture, name, name in merged)
    return left


def unfuse(net: nn.Module) -> None:
    """Take off whatever the runtime has put in the place of a layer's own function."""
    for layer in net.modules():
        function = getattr(layer.__dict__.get("forward"), "func", None)
        if getattr(function, "__module__", "").startswith("skillbank.runtime."):
            del layer.__dict__["forward"]


def lay_out(net: nn.Module) -> None:
    """Let the linear layers of a net compute as fast as a CPU can: weights input first, shapes and values as before, and the faster library.

    With few rows, products with weights that lie like this are up to twice as fast; where oneDNN does them, as long as they are in the cache.
    """
    for layer in net.modules():
        if type(layer) is nn.Linear and not best_as_stored(layer.weight):
            layer.weight.data = layer.weight.data.mT.contiguous().mT
    quicken(net)


def why_not(adapted: Adapted | None) -> str:
    """Why a layer has to stay on the reference path; empty if it can be fused."""
    if adapted is None:
        return "more than a linear layer"
    weight = matrix(adapted.base)
    if weight is None:
        return "weights that only its own class can use"
    return "" if weight.dtype == cast("Tensor", adapted.up.weight).dtype else "factors in another dtype"


def _forward(adapted: Adapted, mixture: Mixture | None, name: str, merged: bool, x: Tensor) -> Tensor:
    weight, bias = matrix(adapted.base), cast("Tensor | None", adapted.base.bias)
    a, b = cast("Tensor", adapted.down.weight), cast("Tensor", adapted.up.weight)
    assert weight is not None
    if mixture is None:
        return gated_linear(x, weight, bias, a, b, scale=adapted.scale)
    cell, owner = mixture.cell, cast("Tensor", adapted.up.owner)
    if merged and isinstance(weights := cell.of(name, len(x)), Tensor) and weights.dim() == 2 and len(weights) == 1:
        if name not in cell.made:
            cell.made[name] = _merged(weight, a, b, weights[:, owner].to(a.dtype))
        return linear(x, cell.made[name], bias)
    own = None if name in mixture.even else owner
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or isinstance(cell.weights, Mapping):
        return gated_linear(x, weight, bias, a, b, cell.channels(name, own, x.shape))
    key = ("channels", len(a) if own is None else name, *x.shape[:-1])  # the next passes, and layers with as many channels, have the same
    if key not in cell.made:
        channels = cell.channels(name, own, x.shape).to(a.dtype)
        channels = channels.repeat_interleave(len(a) // channels.shape[-1], -1)
        cell.made[key] = channels.expand(*x.shape[:-1], -1).flatten(0, -2)
    rows = x.flatten(0, -2)
    y = add_product(product(rows, weight, bias), product(rows, a.mT).mul_(cell.made[key]), b.mT)
    return y.view(*x.shape[:-1], -1)


def _merged(weight: Tensor, a: Tensor, b: Tensor, channels: Tensor) -> Tensor:
    """`weight + A^T diag(channels) B^T` for channels (1, R), (I, O), lying as the weight does."""
    left, right = a.mT * channels, b.mT
    turned = not weight.is_contiguous()
    if turned:
        weight, left, right = weight.mT, right.mT, left.mT
    made = torch.addmm(weight, left, right) if torch.is_grad_enabled() else add_product(weight, left, right, keep=True)
    return made.mT if turned else made
