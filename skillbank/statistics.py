"""What a layer sees and how much its outputs matter, gathered from a model as it runs: for the merges that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from skillbank.attach import factors
from skillbank.layers import is_linear
from skillbank.model import Batch, Model, evaluating, on

__all__ = ["fisher_factors", "input_grams", "start_from_inputs"]

T = TypeVar("T")


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
    seen = _all_of(names, outputs)
    return {name: (each / counts[name], inputs[name] / counts[name]) for name, each in seen.items()}


def start_from_inputs(model: Model, batches: Iterable[Batch], *, steps: int | None = None) -> None:
    """Turn the A of a fresh skill to where its layers' inputs vary most, so that training begins there; B stays 0, and so do the outputs.

    A's rows become the first R principal components of the inputs over examples and tokens (arXiv 2410.07170, with the same rank everywhere).

    Args:
        model: with `fresh` factors on its net, linear layers all of them.
        batches: of the task.
        steps: how many of them; None for all.

    Raises:
        ValueError: a module that is no linear layer or has fewer inputs than ranks, no batches, or a module that never ran.

    """
    live = factors(model.net)
    if narrow := next((name for name, (a, _) in live.items() if a.shape[1] < len(a)), None):
        raise ValueError(f"module {narrow!r} has {live[narrow][0].shape[1]} inputs, fewer than rank {len(live[narrow][0])}: give a smaller rank")
    if begun := next((name for name, (_, b) in live.items() if b.count_nonzero()), None):
        raise ValueError(f"module {begun!r} has a B that is not 0, so that another A would change the outputs: call fresh without init first")
    found: dict[str, tuple[int, Tensor, Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).double()
        count, total, squares = found.get(name, (0, 0.0, 0.0))
        found[name] = count + len(flat), total + flat.sum(0), squares + flat.mT @ flat

    with _hooked(model.net, live, look) as names, torch.no_grad():
        _run(model, batches, steps, lambda _: None)
        _all_of(names, found)
        for name, (a, _) in live.items():
            count, total, squares = found[name]
            covariance = squares / count - torch.outer(total, total) / count**2
            a.copy_(torch.linalg.eigh(covariance).eigenvectors[:, -len(a) :].flip(-1).mT)


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
    if look_back is not None and not output.requires_grad:
        return  # under `no_grad`: the loss does not see it
    look(name, inputs[0])
    if look_back is not None:
        output.register_hook(partial(look_back, name))


def _run(model: Model, batches: Iterable[Batch], steps: int | None, after: Callable[[Tensor], None]) -> None:
    module = cast("nn.Module", model)
    device = next(module.parameters()).device
    with evaluating(module):
        for batch in islice(batches, steps):
            after(module(on(device, batch)))


def _all_of(names: list[str], found: dict[str, T]) -> dict[str, T]:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"modules {missing[:5]} never ran: give batches, and modules that the model's loss goes through")
    return found
