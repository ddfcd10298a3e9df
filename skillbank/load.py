"""From a reference in a bank to a model that predicts: base, skill or composition, checked on the way."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from skillbank.attach import base_weights
from skillbank.bank import Bank, Base, Checkpoint, Composition, base_fingerprint
from skillbank.memory import keep_freed_memory
from skillbank.merge import merge
from skillbank.mixture import Composed, Mixture, every_pass, see
from skillbank.model import ModelModule
from skillbank.runtime.compiled import Compiled
from skillbank.runtime.fused import lay_out
from skillbank.runtime.plan import Plan, Wanted, carry_out, plan_constant, plan_gated
from skillbank.skill import Skill, stack

__all__ = ["build", "build_base", "check_base", "load", "skills_on_base"]


def load(
    ref: str,
    bank: Bank | str | Path = "adapters",
    device: str | torch.device = "cpu",
    *,
    plan: Wanted = None,
    samples: int = 1,
    compile: bool = False,
) -> ModelModule:
    """Model of any version in a bank, in eval mode and ready to predict: a base, a skill on its base, or a composition.

    What is the same for every input is merged into the weights, what a gate weights is computed in the way that costs least; `model.plan` says how
    and why, module by module.

    Args:
        ref: `name` (newest), `name@3`, `name@alias`, `name@sha256:prefix` or `@sha256:prefix`.
        bank: a bank, or where one is.
        device: where the model goes.
        plan: `merged`, `per row`, `factors` or `reference` (PEFT's layers and hooks), for all modules or by module, instead of what is best.
        samples: predictions per row that the plan counts on.
        compile: `predict` as one compiled function, for every shape of batch that it meets; other skills or weights in it need no other.

    Raises:
        UnknownRef: the bank has no such version.
        ValueError: a version is damaged, a skill belongs to another base, the version's model cannot be built, there is no such GPU, or a module
            cannot be computed as the plan asks for.

    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device} was asked for, but torch sees no GPU: use device='cpu', or install a CUDA build of torch")
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    thing = bank.get(ref)
    if isinstance(thing, Base | Checkpoint):
        model, made = build_base(thing), Plan({})
    elif isinstance(thing, Skill):
        _, model, (skill,), _ = skills_on_base(bank, [ref])
        made = _always(model, skill, plan)
    else:
        model, made = _compose(bank, thing, plan, samples)
    model.to(device).eval()
    if torch.device(device).type == "cpu" and plan != "reference":
        keep_freed_memory()
        lay_out(model.net)
    model.plan = made
    if not compile:
        return model
    fast = cast("ModelModule", Compiled(model))
    fast.plan = made
    return fast


def build_base(base: Base | Checkpoint) -> ModelModule:
    """Model of a stored base, its weights in place; of a checkpoint, the causal language model that it is."""
    if isinstance(base, Checkpoint):
        try:
            return cast("ModelModule", build({"_target_": "skillbank.models.transformer.CausalLM", "net": base.repo, "revision": base.revision}))
        except ValueError as error:
            raise ValueError(
                f"the bank knows the checkpoint {base.repo!r} by its hashes only, and there is {error}; or load it where it is, then "
                "skillbank.attach(net, skill), and check with skillbank.check_base(bank, ref, net)"
            ) from None
    model = cast("ModelModule", build(base.model))
    expected, found = set(model.state_dict()), set(base.tensors)
    if expected != found:
        raise ValueError(
            f"the base's tensors do not fit {base.model['_target_']}: missing {sorted(expected - found)}, unknown {sorted(found - expected)}"
        )
    model.load_state_dict(base.tensors)
    return model


def build(conf: Mapping[str, Any], **extra: Any) -> nn.Module:
    """Instantiate a module from its `_target_` and arguments; only subclasses of `nn.Module` are ever called."""
    options = dict(conf)
    path = str(options.pop("_target_", ""))
    options.pop("_partial_", None)
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path!r}, the model class that a version names ({error}): install the package that has it") from None
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ValueError(f"{path!r} is no nn.Module, so a bank may not build it")
    return target(**options, **extra)


def check_base(bank: Bank, ref: str, net: nn.Module) -> None:
    """Check that the skill at `ref` was trained on exactly the weights of this net.

    Args:
        bank: where the skill is.
        ref: the skill.
        net: what it attaches to, with a skill on it or without.

    Raises:
        UnknownRef: no such version.
        ValueError: other weights; the message names the skill and both fingerprints.

    """
    card, skill = bank.card(ref), bank.get(ref)
    if not isinstance(skill, Skill):
        raise ValueError(f"{ref!r} is a {card.kind}, a skill is needed here")
    recorded = card.base["fingerprint"] if card.base else None
    live = base_fingerprint(base_weights(net, skill), skill)
    if recorded != live:
        was = card.base_name or "none"
        raise ValueError(
            f"skill {ref!r} was trained on base {was!r} ({str(recorded)[:12]}), this model is {live[:12]}: load that base or retrain the skill"
        )


def skills_on_base(bank: Bank, refs: Sequence[str]) -> tuple[str, ModelModule, list[Skill], list[str]]:
    """Load skills and the base that they share, every skill checked against it.

    Returns:
        The base's exact reference, its model, the skills, and their exact references.

    Raises:
        ValueError: no skills, a version of another kind, or skills of different bases.

    """
    exact = [str(bank.resolve(ref)) for ref in refs]
    base_ref = str(bank.base_of(exact))
    base = bank.get(base_ref)
    assert isinstance(base, Base | Checkpoint)
    model = build_base(base)
    skills = []
    for ref in exact:
        check_base(bank, ref, model.net)
        skills.append(cast("Skill", bank.get(ref)))
    return base_ref, model, skills, exact


def _compose(bank: Bank, composition: Composition, wanted: Wanted, samples: int) -> tuple[ModelModule, Plan]:
    _, model, skills, _ = skills_on_base(bank, composition.skills)
    if composition.merge is not None:
        return model, _always(model, merge(skills, **composition.merge), wanted)
    assert composition.gate is not None
    gate = build(composition.gate)
    gate.load_state_dict(composition.tensors)
    constant = getattr(gate, "constant", None)
    if constant is not None and wanted is None:
        return model, _always(model, stack(skills, constant), None)
    mixture = Mixture(model.net, skills)
    see(model, getattr(gate, "view", {}))
    anew = every_pass(model, gate)
    own = getattr(model, "tokens", False) or getattr(gate, "layerwise", False)
    passes = int(not own) if anew else getattr(model, "steps", 1)
    plan = plan_gated(model.net, mixture, repeats=passes if anew else passes * samples, passes=passes, wanted=wanted)
    carry_out(plan, model.net, mixture)
    return cast("ModelModule", Composed(model, gate, mixture)), plan


def _always(model: ModelModule, skill: Skill, wanted: Wanted) -> Plan:
    """Put what is the same for every input on a model."""
    plan = plan_constant(model.net, skill, wanted)
    carry_out(plan, model.net, skill)
    return plan
