"""skillbank: skills as LoRA adapters on a frozen base, kept in a versioned bank, merged and gated in parameter space.

The names below are loaded when they are first used, so that `import skillbank` and the command line start at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skillbank.adapter import read_adapter, write_adapter
    from skillbank.artifacts import log_artifacts
    from skillbank.attach import attach, detach, fresh, read
    from skillbank.bank import Bank, Base, Checkpoint, Composition, Ref
    from skillbank.certificate import Certificate
    from skillbank.discovery import discover, train_discovered
    from skillbank.exchange import export, import_adapter
    from skillbank.fit import fit, validation_loss
    from skillbank.folding import Folding, fold
    from skillbank.formats import read_lora
    from skillbank.gate import ConstantGate, Growing, MLPGate, Routes, TopK, grow
    from skillbank.kshot import best_skills
    from skillbank.learn import learn_weights, search_weights
    from skillbank.levels import compose_at
    from skillbank.load import check_base, load
    from skillbank.localise import Graft, graft
    from skillbank.merge import dense_merge, merge, merge_adapters
    from skillbank.mixture import Composed
    from skillbank.model import Model, Task, check_model
    from skillbank.reproduce import rebuild
    from skillbank.runtime.slots import Slots
    from skillbank.runtime.together import Together, together_batches
    from skillbank.search import duplicates, overlap, similar
    from skillbank.server import Server
    from skillbank.skill import Skill, cosine, distance, gram, stack, truncate
    from skillbank.statistics import fisher_factors, input_grams, start_from_inputs
    from skillbank.tasks.text import TextTask, complete
    from skillbank.unlearn import Abstaining, Adjustment, forgetting, negate

__version__ = "0.1.0"

_HOME = {
    "adapter": ["read_adapter", "write_adapter"],
    "artifacts": ["log_artifacts"],
    "attach": ["attach", "detach", "fresh", "read"],
    "bank": ["Bank", "Base", "Checkpoint", "Composition", "Ref"],
    "certificate": ["Certificate"],
    "discovery": ["discover", "train_discovered"],
    "exchange": ["export", "import_adapter"],
    "fit": ["fit", "validation_loss"],
    "folding": ["Folding", "fold"],
    "formats": ["read_lora"],
    "gate": ["ConstantGate", "Growing", "MLPGate", "Routes", "TopK", "grow"],
    "kshot": ["best_skills"],
    "learn": ["learn_weights", "search_weights"],
    "levels": ["compose_at"],
    "load": ["check_base", "load"],
    "localise": ["Graft", "graft"],
    "merge": ["dense_merge", "merge", "merge_adapters"],
    "mixture": ["Composed"],
    "model": ["Model", "Task", "check_model"],
    "reproduce": ["rebuild"],
    "runtime.slots": ["Slots"],
    "runtime.together": ["Together", "together_batches"],
    "search": ["duplicates", "overlap", "similar"],
    "server": ["Server"],
    "skill": ["Skill", "cosine", "distance", "gram", "stack", "truncate"],
    "statistics": ["fisher_factors", "input_grams", "start_from_inputs"],
    "tasks.text": ["TextTask", "complete"],
    "unlearn": ["Abstaining", "Adjustment", "forgetting", "negate"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Abstaining",
    "Adjustment",
    "Bank",
    "Base",
    "Certificate",
    "Checkpoint",
    "Composed",
    "Composition",
    "ConstantGate",
    "Folding",
    "Graft",
    "Growing",
    "MLPGate",
    "Model",
    "Ref",
    "Routes",
    "Server",
    "Skill",
    "Slots",
    "Task",
    "TextTask",
    "Together",
    "TopK",
    "attach",
    "best_skills",
    "check_base",
    "check_model",
    "complete",
    "compose_at",
    "cosine",
    "dense_merge",
    "detach",
    "discover",
    "distance",
    "duplicates",
    "export",
    "fisher_factors",
    "fit",
    "fold",
    "forgetting",
    "fresh",
    "graft",
    "gram",
    "grow",
    "import_adapter",
    "input_grams",
    "learn_weights",
    "load",
    "log_artifacts",
    "merge",
    "merge_adapters",
    "negate",
    "overlap",
    "read",
    "read_adapter",
    "read_lora",
    "rebuild",
    "search_weights",
    "similar",
    "stack",
    "start_from_inputs",
    "together_batches",
    "train_discovered",
    "truncate",
    "validation_loss",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _MODULE:
        raise AttributeError(f"module 'skillbank' has no attribute {name!r}")
    value = getattr(import_module(f"skillbank.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This module's class: a submodule that is imported later does not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, as any module: for those who send functions that use it to other processes."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    """Public names."""
    return [*__all__, "__version__"]
