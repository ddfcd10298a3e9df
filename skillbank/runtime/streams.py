"""Random numbers by row: what is drawn for a part of a batch is what would be drawn for it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Streams"]


class Streams(TorchDispatchMode):
    """In this block, whatever is drawn at random for B rows is drawn for n rows at a time, each from a stream of its own.

    So row by row the numbers are those of n rows alone after `torch.manual_seed(seed)`.

    Args:
        seeds: one per n rows.
        rows: B.

    Raises:
        ValueError: where something is drawn that is not one row per row.

    """

    def __init__(self, seeds: Sequence[int], rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seeds, self.rows = seeds, rows
        self.states: dict[torch.device, list[Tensor]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What runs in the block may be compiled."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags or _drops_nothing(function, args, kwargs):
            return function(*args, **kwargs)
        each = self.rows // len(self.seeds)
        if not any(self._is_ours(value) for value in args):
            raise ValueError(
                f"{function} draws what is not one row per row of the batch, so that there can be no streams by row: run them one by one"
            )
        device = next((value.device for value in args if isinstance(value, Tensor)), kwargs.get("device") or torch.device("cpu"))
        generator = torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else torch.default_generator
        before, parts = generator.get_state(), []
        if device not in self.states:
            self.states[device] = [generator.manual_seed(seed).get_state() for seed in self.seeds]
        for k, state in enumerate(self.states[device]):
            generator.set_state(state)
            parts.append(function(*(self._part(value, k, each) for value in args), **kwargs))
            self.states[device][k] = generator.get_state()
        generator.set_state(before)
        if function._schema.is_mutable:
            return args[0]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)

    def _is_ours(self, value: Any) -> bool:
        shape = value.shape if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else ()
        return len(shape) > 0 and shape[0] == self.rows

    def _part(self, value: Any, k: int, each: int) -> Any:
        if not self._is_ours(value):
            return value
        return value[k * each : (k + 1) * each] if isinstance(value, Tensor) else [each, *value[1:]]


def _drops_nothing(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is attention without dropout, which could draw but does not."""
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    return "dropout_p" in (argument.name for argument in function._schema.arguments) and not given.get("dropout_p")
