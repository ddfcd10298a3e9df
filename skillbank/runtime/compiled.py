"""Predictions and losses of a model as one compiled function; on a GPU it is replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from skillbank.model import Batch, ModelModule

__all__ = ["Compiled", "compiled_loss"]


class Compiled(nn.Module):
    """A `Model` that predicts as the one inside, by a function that is compiled anew for every shape of batch and for nothing else.

    Weights, factors and gates are tensors that the function reads: change them in place, or give the gate other parameters, and it stays.
    Everything else (`forward`, `context`, `net`) is the model's own.

    Args:
        model: any `Model` whose `predict` torch can compile as one graph.
        options: of `torch.compile`. Default: inductor, with CUDA graphs on a GPU.

    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = cast("ModelModule", model), options
        self._function: Callable[..., Tensor] | None = None

    @property
    def net(self) -> nn.Module:
        """Net of the model."""
        return self.model.net

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the model."""
        return self.model(batch)

    def context(self, batch: Batch) -> Tensor:
        """Context of the model."""
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """Prediction of the model; the first of its shape takes as long as compiling does."""
        if self._function is None:
            cuda = next(self.model.parameters()).is_cuda
            chosen = {"fullgraph": True, "dynamic": False, **({"mode": "reduce-overhead"} if cuda else {}), **self.options}
            self._function = torch.compile(_own(_predict), **chosen)
        prediction = self._function(self.model, batch, **options)
        return prediction.clone() if prediction.is_cuda else prediction  # a graph's next replay writes over its output

    def __getstate__(self) -> dict[str, Any]:
        """State without the function: a copy compiles its own."""
        return {**self.__dict__, "_function": None}


def compiled_loss(model: nn.Module) -> Callable[[Batch], Tensor]:
    """`model(batch)`, compiled, and so is its gradient; what it draws at random is what it would draw if it were not compiled.

    Args:
        model: any; where torch cannot compile a part of it, that part runs as it is. On a GPU it becomes a CUDA graph, but not if one of its modules
            says that it is not `replayable`.

    """
    graph = next(model.parameters()).is_cuda and all(getattr(module, "replayable", True) for module in model.modules())
    return partial(torch.compile(_own(_loss), dynamic=False, options={"fallback_random": True, "triton.cudagraphs": graph}), model)


def _own(function: Any) -> Any:
    """The function with a code object of its own, since torch counts compilations, and gives up after eight, by code object."""
    return FunctionType(function.__code__.replace(), function.__globals__)


def _predict(model: ModelModule, batch: Batch, **options: Any) -> Tensor:
    return model.predict(batch, **options)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch)
