"""One skill on a live module: start a fresh one, attach a given one, read it back, take it off. The only file that knows PEFT."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from skillbank.layers import CONVOLUTIONS, SUPPORTED, check_layer, is_linear, is_transposed, layer_sizes, run_layers, weight_of
from skillbank.skill import Deltas, Factor, Skill

__all__ = [
    "Adapted",
    "adapted_layers",
    "attach",
    "base_weights",
    "channel_layers",
    "check_fit",
    "detach",
    "factors",
    "fresh",
    "mark",
    "plain_modules",
    "read",
]

ADAPTER = "default"
MARK = "_skillbank_mark"
PLAIN_VARIANTS = ("VeloraLinearVariant", "VeloraEmbeddingVariant")
"""Classes of PEFT's that train in another way and compute what LoRA does."""
STARTS = ("start_down", "start_up")
"""Buffers of a layer whose factors do not start at 0: A and B as they were, which it takes off again."""


class Adapted(NamedTuple):
    """A layer with a skill on it, which computes `base(x) + scale * up(down(x))`; `down` holds A (R, I), `up` B (O, R)."""

    layer: nn.Module
    base: nn.Module
    down: nn.Module
    up: nn.Module
    scale: float


def fresh(
    net: nn.Module,
    *,
    rank: int = 8,
    scale: float = 16.0,
    targets: str | Sequence[str] | None = None,
    init: str | None = None,
) -> list[nn.Parameter]:
    """Put a new, trainable skill on `net`; until it is trained the net computes exactly what its base does.

    But for rows of padding in torch's transformer encoders: from then on their output is no longer 0 (`layers.run_layers`), which only a head that
    looks at padding sees.

    A starts at N(0, 1 / I), B at 0; the forward pass computes `W x + scale * B A x`. What was on the net before is taken off. With `init`, A and B
    start in the weight itself, and the pass computes `W x + scale * (B A - B0 A0) x`, equal to the base up to rounding: the trained parameters and
    their gradients are those of PEFT, which takes `scale * B0 A0` off the weight, but the base stays as it is. `read` then gives both, as rank 2 R.

    Args:
        net: the frozen base's net, changed in place.
        rank: rank R of every module, >= 1.
        scale: multiplier of B A while training, the paper's alpha (arXiv 2502.05932); PEFT's `lora_alpha` is scale * rank, with `use_rslora`
            scale * sqrt(rank) (arXiv 2312.03732). `read` folds it in.
        targets: which modules: None for all linear layers, of a net of transformers those of its body, without its head (a language model's last
            layer, a classifier's layers behind the body) and without a pooler before it; a regular expression that matches whole module paths, or
            a list of paths or of their last parts, each of which has to be there.
        init: None, or of linear layers, PEFT's `pissa`, the largest R singular values of the weight (arXiv 2404.02948, where scale is 1),
            `pissa_niter_<N>`, the same by N power iterations, or `olora`, R columns of its QR (arXiv 2406.01775).

    Returns:
        The trainable parameters, A and B of every module.

    Raises:
        ValueError: no module matches, a module's layer cannot carry B @ A, an unknown init, or a layer that is too small or not linear for it.

    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if init is not None and (not re.fullmatch(r"pissa(_niter_\d+)?|olora", init) or scale <= 0):
        known = "pissa, pissa_niter_<N> or olora, with a scale above 0, or None for a random A (which start_from_inputs can turn, as eva does)"
        raise ValueError(f"init is {known}; got {init!r} with scale={scale}")
    detach(net)
    names = _targets(net, targets)
    if init is not None:
        for name in names:
            _check_start(name, net.get_submodule(name), rank, init)
    _inject(net, dict.fromkeys(names, rank), scale)
    for layer in _layers(net).values():
        a, b = _factor(layer)
        with torch.no_grad():
            if init is not None:
                _start(layer, init)
                continue
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


def plain_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Modules by path as they were before a skill was put on, with the parts of PEFT's own layers left out."""
    layers = _layers(net)
    plain = {name: module for name, module in net.named_modules() if not any(name.startswith(f"{layer}.") for layer in layers)}
    return {name: layers[name].get_base_layer() if name in layers else module for name, module in plain.items()}


def read(net: nn.Module) -> Skill:
    """Skill that is on `net` (ours, or the one adapter that PEFT put there), its scale folded into A; a detached copy.

    Factors that did not start at 0 (`init` of `fresh`) are read with what they started from taken off, as [A; A0] and [B, -B0].

    Raises:
        ValueError: no skill, several adapters, or a variant that B @ A cannot represent (DoRA, a LoRA bias), named by module.

    """
    layers = _layers(net)
    if not layers:
        raise ValueError("there is no skill on this net: call fresh(net) or attach(net, skill) first")
    factors: dict[str, Factor] = {}
    for name, layer in layers.items():
        _check_variant(name, layer)
        a, b = cast("Factor", _factor(layer))
        if hasattr(layer, STARTS[0]):
            a, b = torch.cat([a, layer.start_down]), torch.cat([b, -layer.start_up], 1)
        scale = layer.scaling[_adapter(layer)]
        folded = a.detach().clone() if scale == 1 else a.detach() * scale
        factors[name] = (folded, b.detach().clone().flatten(1))
    return Skill(factors, frozenset(name for name, layer in layers.items() if isinstance(layer.get_base_layer(), nn.Embedding)))


def factors(net: nn.Module) -> dict[str, Factor]:
    """Live parameters A (R, I, *kernel) and B (O, R, 1, ...) of the skill on `net`, its scale not folded in."""
    return {name: _factor(layer) for name, layer in _layers(net).items()}


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
    plain = plain_modules(net)
    missing = [name for name in modules if name not in plain]
    if missing:
        raise ValueError(f"the net has no modules {_some(missing)}; it has {_some(list(_candidates(plain)))}")
    return {f"{name}.weight": weight_of(plain[name]).detach() for name in modules}


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


def adapted_layers(net: nn.Module) -> dict[str, Adapted | None]:
    """Every layer with a skill on it by module; None for one that computes more than `Adapted` says, such as an embedding or dropout before A.

    What factors started from is taken off behind the layer, whatever computes it.
    """
    found: dict[str, Adapted | None] = {}
    for name, layer in _layers(net).items():
        own = _adapter(layer)
        plain = is_linear(layer) and isinstance(layer.lora_dropout[own], nn.Identity) and not (layer.disable_adapters or layer.merged)
        try:
            _check_variant(name, layer)
        except ValueError:
            plain = False
        found[name] = Adapted(layer, layer.get_base_layer(), layer.lora_A[own], layer.lora_B[own], layer.scaling[own]) if plain else None
    return found


def check_fit(net: nn.Module, skill: Deltas) -> None:
    """Check that a net has all modules of a skill, in its sizes; a ValueError names the first that does not fit."""
    modules = plain_modules(net)
    for name in skill:
        if name not in modules:
            raise ValueError(f"the net has no module {name!r} that the skill adapts; it has {_some(list(_candidates(modules)))}")
        check_layer(name, modules[name])
        expected, found = layer_sizes(modules[name]), skill.size(name)
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
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sets it right for each layer of a net that has both kinds
        inject_adapter_in_model(config, net, ADAPTER)
    net.train(training)
    run_layers(net)
    net.__dict__[MARK] = object()


def _check_start(name: str, layer: nn.Module, rank: int, init: str) -> None:
    weight = weight_of(layer)
    if not is_linear(layer) or not weight.is_floating_point():
        kind = type(layer).__name__ if not is_linear(layer) else f"{type(layer).__name__} of {weight.dtype}"
        raise ValueError(f"init={init!r} is for linear layers of floating point, module {name!r} is {kind}: leave it out of the targets")
    if rank > min(weight.shape):
        raise ValueError(f"init={init!r} finds {min(weight.shape)} directions in module {name!r}, not rank={rank}: lower it, or leave the module out")


def _start(layer: LoraLayer, init: str) -> None:
    """Let the factors of a linear layer start in its weight, and take off behind it what they add by that."""
    base, live = layer.get_base_layer(), _factor(layer)
    weight = weight_of(base).mT if is_transposed(base) else weight_of(base)
    for name, parameter, found in zip(STARTS, live, _directions(weight, len(live[0]), init, layer.scaling[ADAPTER]), strict=True):
        parameter.copy_(found)
        layer.register_buffer(name, parameter.detach().clone(), persistent=False)
    layer.register_forward_hook(_without_start)


def _directions(weight: Tensor, rank: int, init: str, scale: float) -> Factor:
    """A0 (R, I) and B0 (O, R) of a weight (O, I)."""
    whole = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        q, r = torch.linalg.qr(whole)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        u, values, vh = torch.linalg.svd(whole, full_matrices=False)
    else:
        with torch.random.fork_rng([whole.device] if whole.is_cuda else []):
            torch.manual_seed(0)  # a run that is resumed has to start in the same factors
            u, values, v = torch.svd_lowrank(whole, rank, niter=int(init.removeprefix("pissa_niter_")))
        vh = v.mT
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _without_start(layer: LoraLayer, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Output of a layer minus `scale * B0 A0 x`."""
    down, up = layer.start_down, layer.start_up
    start = nn.functional.linear(nn.functional.linear(inputs[0].to(down.dtype), down), up)
    return output - (start * layer.scaling[ADAPTER]).to(output.dtype)


def _layers(net: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


def _candidates(modules: dict[str, nn.Module]) -> Iterator[str]:
    return (name for name, module in modules.items() if isinstance(module, SUPPORTED))


def _targets(net: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    modules = plain_modules(net)
    if targets is None:
        found: dict[str | None, set[str]] = {None: {name for name, module in modules.items() if is_linear(module) and not _is_head(net, name)}}
    else:
        patterns = {targets: targets} if isinstance(targets, str) else {each: rf"(.*\.)?{re.escape(each)}" for each in targets}
        found = {each: {name for name in modules if name and re.fullmatch(pattern, name)} for each, pattern in patterns.items()}
    if not all(found.values()) or not found:
        missing = next((each for each, matching in found.items() if not matching), targets)
        raise ValueError(f"no module of the net matches targets={missing!r}; it has {_some(list(_candidates(modules)))}")
    names = [name for name in modules if any(name in matching for matching in found.values())]
    for name in names:
        check_layer(name, modules[name])
    return names


def _is_head(net: nn.Module, name: str) -> bool:
    """Whether a module turns the features of a net of transformers into what it says: its last layer, one outside its body, or in the pooler."""
    body = getattr(net, "base_model_prefix", "")
    last = getattr(net, "get_output_embeddings", lambda: None)()
    outside = bool(body) and hasattr(net, body) and not name.startswith(f"{body}.")
    return outside or net.get_submodule(name) is last or "pooler" in name.split(".")


def _check_variant(name: str, layer: LoraLayer) -> None:
    if layer.use_dora.get(_adapter(layer), False) or len(layer.lora_magnitude_vector):
        raise ValueError(f"module {name!r} carries DoRA, whose magnitude B @ A cannot represent: train it with use_dora=False")
    variant = type(layer.lora_variant.get(_adapter(layer))).__name__
    if variant not in ("NoneType", *PLAIN_VARIANTS):
        raise ValueError(f"module {name!r} carries PEFT's {variant}, which B @ A cannot represent: train it as plain LoRA")
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


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
