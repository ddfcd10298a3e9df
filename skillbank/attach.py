"""One skill on a live module: start a fresh one, attach a given one, read it back, take it off. The only file that knows PEFT."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from skillbank.skill import Deltas, Factor, Skill

__all__ = ["Folding", "attach", "base_weights", "channel_layers", "check_fit", "delta_like", "detach", "fold", "fresh", "is_linear", "mark", "read"]

ADAPTER = "default"
MARK = "_skillbank_mark"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)


def fresh(
    net: nn.Module,
    *,
    rank: int = 8,
    scale: float = 16.0,
    targets: str | Sequence[str] | None = None,
) -> list[nn.Parameter]:
    """Put a new, trainable skill on `net`; until it is trained the net computes exactly what its base does.

    A starts at N(0, 1 / I), B at 0; the forward pass computes `W x + scale * B A x`. What was on the net before is taken off.

    Args:
        net: the frozen base's net, changed in place.
        rank: rank R of every module, >= 1.
        scale: multiplier of B A while training, the paper's alpha (arXiv 2502.05932); PEFT's `lora_alpha` is scale * rank. `read` folds it in.
        targets: which modules: None for all linear layers, a regular expression that matches whole module paths, or a list of paths or of
            their last parts.

    Returns:
        The trainable parameters, A and B of every module.

    Raises:
        ValueError: no module matches, or a module's layer cannot carry B @ A.

    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    detach(net)
    names = _targets(net, targets)
    _inject(net, dict.fromkeys(names, rank), scale)
    for layer in _layers(net).values():
        a, b = _factor(layer)
        with torch.no_grad():
            a.normal_(std=1 / math.sqrt(a[0].numel()))
            b.zero_()
    return [tensor for layer in _layers(net).values() for tensor in _factor(layer)]


def attach(net: nn.Module, skill: Skill) -> None:
    """Put `skill` on `net` in place, frozen; what was on the net before is taken off.

    Raises:
        ValueError: the net lacks one of the skill's modules, its layer has another size, or it cannot carry B @ A; the net is unchanged.

    """
    check_fit(net, skill)
    detach(net)
    _inject(net, skill.ranks, 1.0)
    for name, layer in _layers(net).items():
        with torch.no_grad():
            for live, stored in zip(_factor(layer), _shaped(layer, skill[name]), strict=True):
                live.copy_(stored)
                live.requires_grad_(False)


@torch.no_grad()
def fold(net: nn.Module, skill: Deltas) -> None:
    """Add the deltas of a skill, or of a `dense_merge`, into the base's weights, in place and for good: what is trained now stands on them.

    Sums are in float32 or better and rounded once. `Folding` takes a skill out again.

    Raises:
        ValueError: as `attach`, or a weight that is tied to another or quantised; the net is unchanged.

    """
    layers = _foldable(net, skill)
    for name, layer in layers.items():
        _add(layer, _weight(layer).detach(), skill, name)


class Folding:
    """One skill at a time folded into the weights of a live net, and taken out again bit for bit, however often and in any dtype.

    The weights that a skill touches are kept as they were, once; every skill is added to those. Use it as a context, or call `clear`.

    Args:
        net: without an adapter on it. Nobody else may change the weights meanwhile.

    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._kept: dict[str, Tensor] = {}
        self._folded: dict[str, nn.Module] = {}

    def set(self, skill: Deltas) -> None:
        """Fold this skill in, instead of the one before; a ValueError, as from `fold`, leaves the one before."""
        layers = _foldable(self.net, skill)
        self.clear()
        for name, layer in layers.items():
            if name not in self._kept:
                self._kept[name] = _weight(layer).detach().clone()
        self._folded = layers  # before the first sum, so that whatever stops it is taken out again
        for name, layer in layers.items():
            _add(layer, self._kept[name], skill, name)

    def clear(self) -> None:
        """Take the skill out: the weights are what they were, to the last bit."""
        with torch.no_grad():
            for name, layer in self._folded.items():
                _weight(layer).copy_(self._kept[name])
        self._folded = {}

    def __enter__(self) -> Folding:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the skill out."""
        self.clear()


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer, or the base of a layer that a skill is on, is a linear one: `nn.Linear`, or `Conv1D` of transformers."""
    return isinstance(getattr(layer, "base_layer", layer), nn.Linear | Conv1D)


def delta_like(layer: nn.Module, deltas: Deltas, module: str) -> Tensor:
    """Dense delta of a module as its layer stores weights, in float32 or better."""
    delta = deltas.delta(module, torch.float32)
    return delta.mT if isinstance(layer, nn.Embedding | Conv1D) else delta


def _foldable(net: nn.Module, skill: Deltas) -> dict[str, nn.Module]:
    """Layers that a skill is added to."""
    check_fit(net, skill)
    plain = _plain_modules(net)
    layers = {name: plain[name] for name in skill}
    owners: dict[int, list[str]] = {}
    for name, layer in net.named_modules(remove_duplicate=False):
        for own, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{own}")
    for name, layer in layers.items():
        weight = _weight(layer)
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"module {name!r} has weights of {weight.dtype}, which no skill can be folded into: attach it")
        if len(tied := owners[id(weight)]) > 1:
            raise ValueError(f"module {name!r} shares its weight, {tied}, so that a skill folded into one changes the others: attach it")
    return layers


def _add(layer: nn.Module, base: Tensor, skill: Deltas, module: str) -> None:
    delta = delta_like(layer, skill, module).to(base.device)
    with torch.no_grad():
        _weight(layer).copy_(base.to(torch.promote_types(base.dtype, delta.dtype)) + delta)


def read(net: nn.Module) -> Skill:
    """Skill that is on `net` (ours, or the one adapter that PEFT put there), its scale folded into A; a detached copy.

    Raises:
        ValueError: no skill, several adapters, or a variant that B @ A cannot represent (DoRA, a LoRA bias), named by module.

    """
    layers = _layers(net)
    if not layers:
        raise ValueError("there is no skill on this net: call fresh(net) or attach(net, skill) first")
    factors: dict[str, Factor] = {}
    for name, layer in layers.items():
        _check_variant(name, layer)
        a, b = _factor(layer)
        scale = layer.scaling[_adapter(layer)]
        folded = a.detach().clone() if scale == 1 else a.detach() * scale
        factors[name] = (folded, b.detach().clone().flatten(1))
    return Skill(factors, frozenset(name for name, layer in layers.items() if isinstance(layer.get_base_layer(), nn.Embedding)))


def detach(net: nn.Module) -> None:
    """Take the skill off `net`, if there is one; the base layers stand where they stood."""
    for name, layer in _layers(net).items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config
    net.__dict__.pop(MARK, None)


def mark(net: nn.Module) -> object | None:
    """Return an object that stands for the skill now on `net`: another one after every attach, None without a skill."""
    return net.__dict__.get(MARK)


def base_weights(net: nn.Module, modules: Sequence[str] | Skill) -> dict[str, Tensor]:
    """`{module.weight: tensor}` of the base under the given modules, whether a skill is on them or not: what a base fingerprint is made of."""
    plain = _plain_modules(net)
    missing = [name for name in modules if name not in plain]
    if missing:
        raise ValueError(f"the net has no modules {_some(missing)}; it has {_some(list(_candidates(plain)))}")
    return {f"{name}.weight": _weight(plain[name]).detach() for name in modules}


def channel_layers(net: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Per adapted module the layer that reads the R rank channels and their dimension in its input: where a gate weights them.

    Raises:
        ValueError: an embedding layer, whose channels no layer reads.

    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, layer in _layers(net).items():
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding):
            raise ValueError(f"a gate cannot weight the embedding layer {name!r}: merge these skills, or train them without it")
        found[name] = (layer.lora_B[_adapter(layer)], 1 if isinstance(base, CONVOLUTIONS) else -1)
    return found


def check_fit(net: nn.Module, skill: Deltas) -> None:
    """Check that a net has all modules of a skill, in its sizes; a ValueError names the first that does not fit."""
    modules = _plain_modules(net)
    for name in skill:
        if name not in modules:
            raise ValueError(f"the net has no module {name!r} that the skill adapts; it has {_some(list(_candidates(modules)))}")
        _check_layer(name, modules[name])
        expected, found = _layer_sizes(modules[name]), skill.size(name)
        if expected != found:
            raise ValueError(f"module {name!r} is (out, in) {expected}, the skill's factor is {found}: it belongs to another base")
        if isinstance(modules[name], nn.Embedding) != (name in skill.embeddings):
            kind, known = type(modules[name]).__name__, sorted(skill.embeddings)
            raise ValueError(f"module {name!r} is {kind}, which the skill does not take it for (embeddings={known})")


def _inject(net: nn.Module, ranks: dict[str, int], scale: float) -> None:
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=1,
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern=patterns,
        alpha_pattern={pattern: scale * rank for pattern, rank in patterns.items()},
        fan_in_fan_out=any(isinstance(net.get_submodule(name), Conv1D) for name in ranks),
    )
    training = net.training
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # factors beside a tied weight leave the tie alone
        inject_adapter_in_model(config, net, ADAPTER)
    net.train(training)
    net.__dict__[MARK] = object()


def _layers(net: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


def _plain_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Modules by path as they were before a skill was put on, with the parts of PEFT's own layers left out."""
    layers = _layers(net)
    plain = {name: module for name, module in net.named_modules() if not any(name.startswith(f"{layer}.") for layer in layers)}
    return {name: layers[name].get_base_layer() if name in layers else module for name, module in plain.items()}


def _candidates(modules: dict[str, nn.Module]) -> Iterator[str]:
    return (name for name, module in modules.items() if isinstance(module, SUPPORTED))


def _targets(net: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    modules = _plain_modules(net)
    match: Callable[[str], bool]
    if targets is None:
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    else:
        if isinstance(targets, str):
            pattern = re.compile(targets)
            match = lambda name: pattern.fullmatch(name) is not None  # noqa: E731
        else:
            match = lambda name: any(name == target or name.endswith(f".{target}") for target in targets)  # noqa: E731
        names = [name for name in modules if name and match(name)]
    if not names:
        raise ValueError(f"no module of the net matches targets={targets!r}; it has {_some(list(_candidates(modules)))}")
    for name in names:
        _check_layer(name, modules[name])
    return names


def _check_layer(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, SUPPORTED):
        kinds = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise ValueError(f"module {name!r} is {type(layer).__name__}, which cannot carry B @ A: choose layers among {kinds}")
    if isinstance(layer, CONVOLUTIONS) and layer.groups != 1:
        raise ValueError(f"module {name!r} is a convolution with groups={layer.groups}, whose change is not B @ A: leave it out of the targets")


def _check_variant(name: str, layer: LoraLayer) -> None:
    if layer.use_dora.get(_adapter(layer), False) or len(layer.lora_magnitude_vector):
        raise ValueError(f"module {name!r} carries DoRA, whose magnitude B @ A cannot represent: train it with use_dora=False")
    if getattr(layer, "lora_bias", {}).get(_adapter(layer), False):
        raise ValueError(f"module {name!r} carries a LoRA bias, which B @ A cannot represent: train it with lora_bias=False")


def _adapter(layer: LoraLayer) -> str:
    names = [*layer.lora_A, *layer.lora_embedding_A]
    if len(names) != 1:
        raise ValueError(f"a net holds one skill at a time, this one has the adapters {names}: delete all but one")
    return names[0]


def _factor(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Live parameters A (R, I, *kernel) and B (O, R, 1, ...)."""
    name = _adapter(layer)
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _shaped(layer: LoraLayer, factor: Factor) -> Factor:
    return factor[0], factor[1].reshape(_factor(layer)[1].shape)


def _layer_sizes(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """(O, (I, *kernel)) of a base layer."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, (layer.num_embeddings,)
    shape = tuple(_weight(layer).shape)
    return (shape[1], (shape[0],)) if isinstance(layer, Conv1D) else (shape[0], shape[1:])


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
