"""What a layer is: which ones can carry B @ A, of which size, and how they store and run their weight.

Shapes: I in, O out.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

__all__ = ["CONVOLUTIONS", "SUPPORTED", "check_layer", "is_linear", "is_transposed", "layer_sizes", "matrix", "run_layers", "weight_of"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer, or the base of a layer that a skill is on, is a linear one that runs: `nn.Linear`, or `Conv1D` of transformers."""
    base = getattr(layer, "base_layer", layer)
    return isinstance(base, nn.Linear | Conv1D) and not isinstance(base, NonDynamicallyQuantizableLinear)


def weight_of(layer: nn.Module) -> Tensor:
    """Weight of a layer as it is stored."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight (I, O)."""
    return isinstance(layer, nn.Embedding | Conv1D)


def layer_sizes(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """(O, (I, *kernel)) of a base layer."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, (layer.num_embeddings,)
    shape = tuple(weight_of(layer).shape)
    return (shape[1], (shape[0],)) if isinstance(layer, Conv1D) else (shape[0], shape[1:])


def matrix(layer: nn.Module) -> Tensor | None:
    """Weight (I, O) of a layer that computes `x W + b` with it and nothing else, a view; None for any other, such as a quantised one."""
    weight = getattr(layer, "weight", None)
    known = type(layer).forward in (nn.Linear.forward, Conv1D.forward) and not (layer._forward_hooks or layer._forward_pre_hooks)
    if not known or not is_linear(layer) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return weight if isinstance(layer, Conv1D) else weight.mT


def check_layer(name: str, layer: nn.Module) -> None:
    """Check that a layer can carry B @ A; a ValueError names it."""
    if not isinstance(layer, SUPPORTED):
        kinds = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise ValueError(f"module {name!r} is {type(layer).__name__}, which cannot carry B @ A: choose layers among {kinds}")
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ValueError(f"module {name!r} is the output of nn.MultiheadAttention, which reads its weight and never runs it: leave it out")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise ValueError(f"module {name!r} is an embedding with max_norm, which PEFT applies to A as well: leave it out of the targets")
    if isinstance(layer, CONVOLUTIONS) and (layer.padding_mode != "zeros" or {*layer.dilation} != {1}):
        what = f"padding_mode={layer.padding_mode!r} and dilation={layer.dilation}"
        raise ValueError(f"module {name!r} is a convolution with {what}, which PEFT's A lacks: leave it out of the targets")
    if isinstance(layer, CONVOLUTIONS) and layer.groups != 1:
        raise ValueError(f"module {name!r} is a convolution with groups={layer.groups}, whose change is not B @ A: leave it out of the targets")


def run_layers(net: nn.Module) -> None:
    """Keep torch's transformer encoders off their fast path, which reads the weights of layers instead of running them: a hook does that.

    They do without nested tensors as well, which few operations take: where a row is padding, their output is no longer 0.
    """
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _nothing not in module._forward_hooks.values():
            module.register_forward_hook(_nothing)
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _nothing(*_: object) -> None:
    pass
