"""What a layer sees and how much its outputs matter, gathered from a model as it runs: for the merges that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn

from skillbank.attach import is_linear
from skillbank.model import Batch, Model, evaluating, on

__all__ = ["fisher_factors", "input_grams"]


def input_grams(model: Model, modules: Iterable[str], batches: Iterable[Batch], *, steps: int | None = None) -> dict[str, Tensor]:
    """Gram matrices of the inputs of a model's layers, for `merge(..., method="regmean", grams=[...])`.

    Args:
        model: the base with the skill of that task attached, or the base alone.
        modules: paths of linear layers in `model.net`, such as those of a skill.
        batches: of the task.
        steps: how many of them; None for all.

    Returns:
        `{module: sum over examples and tokens of x x^T (I, I)}`, float64, on the CPU.

    Raises:
        ValueError: a module that is no linear layer, no batches, or a module that never ran.

    """
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).double()
        found[name] = found.get(name, 0) + (flat.mT @ flat).cpu()

    with _hooked(model.net, modules, look) as names, torch.no_grad():
        _run(model, batches, steps, lambda _: None)
    return _all_of(names, found)


def fisher_factors(model: Model, modules: Iterable[str], batches: Iterable[Batch], *, steps: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """How much the entries of a model's layers matter to its loss, for `merge(..., method="fisher", fishers=[...])`.

    The mean squared gradient of entry (o, i) is taken for the product of those of output o and of input i, over examples and tokens:
    a layer takes O + I numbers instead of O x I. The model's parameters are as before when this returns.

    Args:
        model: the base with the skill of that task attached, or the base alone.
        modules: paths of linear layers in `model.net`, such as those of a skill.
        batches: of the task, with what its loss needs.
        steps: how many of them; None for all.

    Returns:
        `{module: (mean g^2 (O), mean x^2 (I))}`, float64, on the CPU; g is the gradient of an example's loss.

    Raises:
        ValueError: a module that is no linear layer, no batches, or a module that never ran.

    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).double()
        inputs[name] = inputs.get(name, 0) + flat.square().sum(0).cpu()
        counts[name] = counts.get(name, 0) + len(flat)

    def look_back(name: str, gradient: Tensor) -> None:
        rows = gradient.shape[0]  # the loss is a mean over them
        outputs[name] = outputs.get(name, 0) + (rows * gradient.detach().flatten(0, -2).double()).square().sum(0).cpu()

    with _hooked(model.net, modules, look, look_back) as names, torch.enable_grad():
        _run(model, batches, steps, lambda loss: torch.autograd.backward(loss))
    return {name: (outputs[name] / counts[name], each / counts[name]) for name, each in _all_of(names, inputs).items()}


@contextmanager
def _hooked(
    net: nn.Module, modules: Iterable[str], look: Callable[[str, Tensor], None], look_back: Callable[[str, Tensor], None] | None = None
) -> Iterator[list[str]]:
    """Show the inputs of layers to `look` and the gradients of their outputs to `look_back`, and leave no trace on the net."""
    names, hooks = sorted(modules), []
    asked = {parameter: parameter.requires_grad for parameter in net.parameters()}
    kept = {parameter: parameter.grad for parameter in asked}
    for parameter in asked:
        parameter.grad = None
    try:
        for name in names:
            layer = net.get_submodule(name)
            if not is_linear(layer):
                raise ValueError(f"module {name!r} is {type(layer).__name__}: statistics are gathered of linear layers only")
            hooks.append(layer.register_forward_hook(partial(_shown, name, look, look_back)))
            for parameter in layer.parameters() if look_back is not None else ():
                parameter.requires_grad_(True)
        yield names
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
            parameter.grad = kept[parameter]


def _shown(
    name: str,
    look: Callable[[str, Tensor], None],
    look_back: Callable[[str, Tensor], None] | None,
    _: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    look(name, inputs[0])
    if look_back is not None:
        output.register_hook(partial(look_back, name))


def _run(model: Model, batches: Iterable[Batch], steps: int | None, after: Callable[[Tensor], None]) -> None:
    module = cast("nn.Module", model)
    device = next(module.parameters()).device
    with evaluating(module):
        for batch in islice(batches, steps):
            after(module(on(device, batch)))


def _all_of(names: list[str], found: dict[str, Tensor]) -> dict[str, Tensor]:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"modules {missing[:5]} never ran: give batches, and modules that the model's loss goes through")
    return found
