"""LoRA checkpoints of any library, told apart by their files, as far as B @ A on the untouched base says what they do.

PEFT                     adapter_config.json with `peft_type`, adapter_model.safetensors
AdapterHub's `adapters`  adapter_config.json with `config`, adapter.safetensors: `<module>.loras.<name>.lora_A` (R, I), `lora_B` (O, R)
mttl                     mttl_config.json with `modifier_config`, mttl_weights.safetensors: `<module>.lora_a` (I, R), `lora_b` (R, O)

The rules are those of adapters 1.3.0 (`adapters.methods.lora`, `AdapterLoader._fix_backward_compat`) and of microsoft/mttl at 3724abf
(`mttl.models.modifiers.lora`). Pickles are refused; mttl itself writes nothing else, so that its safetensors form is one that was resaved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from skillbank.adapter import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, folded, read_adapter, read_config
from skillbank.lints import Lint, peft_lints
from skillbank.skill import Factor, Skill
from skillbank.tensors import load_tensors

__all__ = ["CONFIGS", "FILES", "PICKLES", "WEIGHTS", "Lora", "read_lora"]

ADAPTERS_WEIGHTS, ADAPTERS_PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
MTTL_CONFIG, MTTL_WEIGHTS, MTTL_PICKLE = "mttl_config.json", "mttl_weights.safetensors", "mttl_weights.bin"
_ADAPTERS_KEY = re.compile(r"(?P<module>.+)\.loras\.[^.]+\.lora_(?P<letter>[AB])")
_MTTL_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[ab])")
_FUSED = ("Wqkv", "c_attn", "in_proj", "qkv")
"""Layers that hold query, key and value in one, as `adapters` knows them; their LoRA is one block of O / 3 rows for each that is adapted."""
_HEADS = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
CONFIGS = (CONFIG_FILE, MTTL_CONFIG)
WEIGHTS = (WEIGHTS_FILE, ADAPTERS_WEIGHTS, MTTL_WEIGHTS)
PICKLES = (PICKLE_FILE, ADAPTERS_PICKLE, MTTL_PICKLE)
FILES = (*CONFIGS, *WEIGHTS, _HEADS[0])
"""All that is read, or whose presence says what is not."""

# fmt: off
_ADAPTERS_KNOWN = frozenset({
    "alpha", "architecture", "attn_matrices", "composition_mode", "dropout", "dtype", "init_weights", "init_weights_seed", "intermediate_lora",
    "leave_out", "output_lora", "r", "selfattn_lora",
})
_MTTL_KNOWN = frozenset({
    "__model_modifier__", "class_name", "lora_alpha", "lora_dropout", "lora_init_b_random", "lora_rank", "modify_layers", "modify_modules",
    "tie_params",
})
# fmt: on
_ADAPTERS_REFUSED = {
    "use_dora": "DoRA rescales each output by a trained magnitude; train with use_dora=False",
    "use_gating": "a gate weights the output by the input; train with use_gating=False",
    "vera_b": "VeRA trains vectors around shared random factors; train it as plain LoRA",
    "vera_d": "VeRA trains vectors around shared random factors; train it as plain LoRA",
}


@dataclass(frozen=True, eq=False)
class Lora:
    """What a LoRA checkpoint holds.

    Args:
        skill: its factors, the scale folded in.
        format: `PEFT`, `adapters` or `mttl`.
        base_name: what it calls its base, or None.
        options: options of `write_adapter` that its own configuration gives.
        lints: signs of a scale that is wrong.

    """

    skill: Skill
    format: str
    base_name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lints: tuple[Lint, ...] = ()


def read_lora(folder: str | Path) -> Lora:
    """Read a LoRA checkpoint of PEFT, of AdapterHub's `adapters` or of mttl.

    Args:
        folder: where its files are.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it is damaged, stored as pickle, or does something that B @ A on the untouched base cannot say.

    """
    folder = Path(folder)
    what = f"adapter {str(folder)!r}"
    try:
        config = read_config(folder / CONFIG_FILE, what) if (folder / CONFIG_FILE).is_file() else {}
        named = any((folder / name).exists() for name in (MTTL_CONFIG, MTTL_WEIGHTS, MTTL_PICKLE))
        if named or folder.is_file() or ([*folder.glob("*.ckpt")] and not (folder / WEIGHTS_FILE).exists()):
            return _read_mttl(folder, what)
        if "peft_type" not in config and "config" in config:
            return _read_adapters(folder, config)
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).removeprefix(f'{what}: ')}") from None
    skill = read_adapter(folder)
    return Lora(skill, "PEFT", config.get("base_model_name_or_path"), peft_options(config), tuple(peft_lints(config, skill)))


def peft_options(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `write_adapter` that say of the base what configurations of PEFT's say of it, of each the first that does."""
    named, conv1d, task = (
        next((config[key] for config in configs if config.get(key)), None) for key in ("base_model_name_or_path", "fan_in_fan_out", "task_type")
    )
    return {"base_name": named, "fan_in_fan_out": bool(conv1d), "task_type": task}


def _read_adapters(folder: Path, whole: Mapping[str, Any]) -> Lora:
    if not (folder / ADAPTERS_WEIGHTS).is_file() and (folder / ADAPTERS_PICKLE).exists():
        raise ValueError(
            f"it is stored as pickle ({ADAPTERS_PICKLE}), which can run code when it is read: load it with `adapters` where you trust it, and "
            "model.save_adapter(folder, name, use_safetensors=True) writes safetensors"
        )
    config, rank, alpha = _check_adapters(folder, whole)
    pairs = _pair(load_tensors(folder / ADAPTERS_WEIGHTS)[0], _ADAPTERS_KEY)
    old = _is_before_1_1(whole.get("version"))
    factors = {}
    for name, (a, b) in pairs.items():
        blocks = _blocks(name, a, b, rank, config)
        scale = 1.0 if old and not blocks else alpha / rank
        factors[name] = folded(_spread(a, b, blocks) if blocks else (a, b), scale)
    lints: tuple[Lint, ...] = ()
    if old and alpha != rank:
        what = f"alpha = {alpha:g} was not applied in training, but in layers that fuse query, key and value; it is read as it was trained"
        lints = (Lint(what, "adapters before 1.1.0", 1.0, "nothing is to be done"),)
    named = whole.get("model_name") or None
    return Lora(Skill(factors), "adapters", named, {"base_name": named, "fan_in_fan_out": whole.get("model_type") == "gpt2"}, lints)


def _check_adapters(folder: Path, whole: Mapping[str, Any]) -> tuple[Mapping[str, Any], int, float]:
    """The part of the configuration that says what it does, checked; its rank and alpha."""
    config = whole["config"]
    if not isinstance(config, dict) or config.get("architecture") != "lora":
        architecture = config.get("architecture", "bottleneck") if isinstance(config, dict) else config
        raise ValueError(f"architecture={architecture!r} is not LoRA alone: train it with LoRAConfig")
    if config.get("composition_mode", "add") != "add":
        raise ValueError(f"composition_mode={config['composition_mode']!r} is (IA)^3, which multiplies the base's outputs: train it with LoRAConfig")
    for key, value in config.items():
        if key in _ADAPTERS_REFUSED and value is not None and value is not False:
            raise ValueError(f"{key}={value!r}: {_ADAPTERS_REFUSED[key]}")
        if value and key not in _ADAPTERS_KNOWN:
            raise ValueError(f"{key}={value!r} is unknown and may change what the factors compute; if it does not, take it out of {CONFIG_FILE}")
    for name in _HEADS:
        if (folder / name).exists():
            raise ValueError(f"{name}: it carries a prediction head; save it with model.save_adapter(folder, name, with_head=False)")
    return config, *_rank_and_alpha(config, "r", "alpha")


def _blocks(module: str, a: Tensor, b: Tensor, rank: int, config: Mapping[str, Any]) -> list[int]:
    """Which thirds of a fused layer's outputs are adapted (0 query, 1 key, 2 value); none where the layer is not fused."""
    adapted = [third for third, letter in enumerate("qkv") if letter in config.get("attn_matrices", ())]
    fused = module.rpartition(".")[2] in _FUSED or a.shape[0] != rank
    if fused and adapted and a.shape[0] == rank * len(adapted) and b.shape[0] % len(adapted) == 0:
        return adapted
    if a.shape[0] != rank:
        raise ValueError(f"module {module!r}: {CONFIG_FILE} says r={rank} and attn_matrices={config.get('attn_matrices')}, but A is {tuple(a.shape)}")
    return []


def _spread(a: Tensor, b: Tensor, blocks: list[int]) -> Factor:
    """Factors of a fused layer: block i of B's rows on its own channels of A, in the rows of its third of the outputs."""
    size, rank = b.shape[0] // len(blocks), b.shape[1]
    whole = b.new_zeros(3 * size, rank * len(blocks))
    for i, third in enumerate(blocks):
        whole[third * size : (third + 1) * size, i * rank : (i + 1) * rank] = b[i * size : (i + 1) * size]
    return a, whole


def _is_before_1_1(version: object) -> bool:
    match = re.match(r"adapters\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _read_mttl(folder: Path, what: str) -> Lora:
    if not (folder / MTTL_WEIGHTS).is_file():
        pickles = [path.name for path in (folder, folder / MTTL_PICKLE, *sorted(folder.glob("*.ckpt"))) if path.is_file()]
        if not pickles:
            raise FileNotFoundError(f"{what} has no {MTTL_WEIGHTS}: write the expert's expert_weights there with safetensors.torch.save_file")
        raise ValueError(
            f"it is stored as pickle ({pickles[0]}), which can run code when it is read: where you trust it, load the expert with mttl, write "
            f"expert.expert_weights with safetensors.torch.save_file to {MTTL_WEIGHTS}, and beside it as {MTTL_CONFIG} "
            '{"base_model": ..., "modifier_config": expert.expert_config.asdict()}'
        )
    if not (folder / MTTL_CONFIG).is_file():
        raise FileNotFoundError(f"{what} has no {MTTL_CONFIG}: write it with base_model and modifier_config beside {MTTL_WEIGHTS}")
    whole = read_config(folder / MTTL_CONFIG, what)
    rank, alpha = _check_mttl(whole)
    factors = {}
    for name, (a, b) in _pair(load_tensors(folder / MTTL_WEIGHTS)[0], _MTTL_KEY).items():
        if a.dim() != 2 or b.dim() != 2:
            raise ValueError(f"module {name!r}: lora_a {tuple(a.shape)} holds several skills or splits; write one expert of them as plain LoRA")
        if a.shape[1] != rank:
            raise ValueError(f"module {name!r}: {MTTL_CONFIG} says lora_rank={rank}, but lora_a is {tuple(a.shape)}, it must be (I, R)")
        factors[name] = folded((a.mT.contiguous(), b.mT.contiguous()), alpha / rank)
    return Lora(Skill(factors), "mttl", whole.get("base_model"), {"base_name": whole.get("base_model")})


def _check_mttl(whole: Mapping[str, Any]) -> tuple[int, float]:
    config = whole.get("modifier_config")
    if not isinstance(config, dict):
        raise ValueError(f"{MTTL_CONFIG} has no modifier_config, which says rank and alpha")
    kind = config.get("__model_modifier__", str(config.get("class_name", "LoRAConfig")).rpartition(".")[2])
    if kind not in ("lora", "LoRAConfig"):
        raise ValueError(f"modifier_config is of {kind!r}, which is not plain LoRA: train the expert with model_modifier=lora")
    for key, value in config.items():
        if value and key not in _MTTL_KNOWN:
            raise ValueError(f"{key}={value!r} is unknown and may change what the factors compute; if it does not, take it out of {MTTL_CONFIG}")
    return _rank_and_alpha(config, "lora_rank", "lora_alpha")


def _rank_and_alpha(config: Mapping[str, Any], rank: str, alpha: str) -> tuple[int, float]:
    for key in (rank, alpha):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float):
            raise ValueError(f"{key}={config.get(key)!r} must be a number")
    if config[rank] < 1:
        raise ValueError(f"{rank}={config[rank]!r} must be at least 1")
    return config[rank], config[alpha]


def _pair(tensors: Mapping[str, Tensor], form: re.Pattern[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of every module; every other tensor is refused."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = form.fullmatch(key)
        if match is None:
            raise ValueError(f"tensor {key!r} is no LoRA factor: B @ A alone does not say what the checkpoint does")
        halves.setdefault(match["module"], {})[match["letter"].lower()] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise ValueError(f"module {name!r} has one factor of two: tied factors must be written for every module, and the file be complete")
    return {name: (pair["a"], pair["b"]) for name, pair in halves.items()}
