"""PEFT's LoRA format on disk, read and written without PEFT.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Reading folds the scale into B once, so that inside the
library `delta = B @ A` is the whole truth; whatever B @ A on the untouched base cannot say is refused by name. Writing makes PEFT's own
scale 1 and gives the same bytes for the same skill.

The rules for patterns, scales and shapes are those of PEFT 0.21.2: `peft.utils.other.get_pattern_key` and `peft.tuners.lora.layer`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillbank.skill import Factor, Lazy, Skill
from skillbank.tensors import TensorWriter, load_tensors, save_tensors, whole_folder

__all__ = ["CONFIG_FILE", "PICKLE_FILE", "WEIGHTS_FILE", "folded", "read_adapter", "read_config", "stream_adapter", "unshared", "write_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])\.weight|lora_embedding_(?P<table>[AB]))")

# Read below, or without any say in what the stored factors compute: where they came from, which modules they sit on (the file's own keys
# tell), how they were trained or initialised, and how the base stores its weights.
# fmt: off
_KNOWN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "velora_config",
})
# fmt: on
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_MOST_STEPS = math.log(1e8)
_LARGEST = 2**53
_LONGEST_CONFIG = 16 * 2**20
_PLAIN_INITS = frozenset({"eva", "gaussian", "mica", "orthogonal"})
_PLAIN = "train it as plain LoRA"
_REFUSED = {
    "alora_invocation_tokens": f"aLoRA acts on some tokens only; {_PLAIN}",
    "arrow_config": "Arrow routes between adapters at run time; read each of its adapters and train a gate here",
    "kasa_config": f"KaSA cuts the base's weights and puts a diagonal between A and B; {_PLAIN}",
    "layer_replication": "it repeats layers of the base; store the repeated model as the base and target its own modules",
    "lora_bias": "it trains a bias next to B; train with lora_bias=False",
    "modules_to_save": "it carries whole modules; train without modules_to_save, or make them part of the base",
    "monteclora_config": f"MonteCLoRA samples around the factors; {_PLAIN}",
    "target_parameters": "its factors sit on parameters, not on modules; use target_modules",
    "trainable_token_indices": "it replaces rows of an embedding; target the embedding with LoRA instead",
    "use_bdlora": f"BD-LoRA stores block-diagonal factors; {_PLAIN}",
    "use_dora": "DoRA rescales each output by a trained magnitude; train with use_dora=False, or convert it with peft.convert_to_lora",
    "use_qalora": f"QALoRA pools the input before A; {_PLAIN}",
}
_FOREIGN_KEYS = {
    "lora_magnitude_vector": f"use_dora: {_REFUSED['use_dora']}",
    "lora_diag": f"kasa_config: {_REFUSED['kasa_config']}",
    "lora_B.bias": f"lora_bias: {_REFUSED['lora_bias']}",
    "modules_to_save": f"modules_to_save: {_REFUSED['modules_to_save']}",
    "token_adapter": f"trainable_token_indices: {_REFUSED['trainable_token_indices']}",
    ".base_layer.": "it is a weight of the base or an adapter inside one; save with save_embedding_layers=False and target plain layers",
}
_FOREIGN_KEY = re.compile("|".join(map(re.escape, _FOREIGN_KEYS)))


def read_adapter(folder: str | Path, *, trusted: bool = False, lazy: bool = False) -> Skill:
    """Read a PEFT LoRA adapter, its scale folded into B.

    Args:
        folder: a local folder with `adapter_config.json` and `adapter_model.safetensors`.
        trusted: the same files were read before and found finite; without that look at every entry they are mapped and not read.
        lazy: fold a module's scale into it whenever it is looked at, so that the skill takes no memory beside the file's.

    Returns:
        The skill, in the dtype of the file; a float16 or bfloat16 module becomes float32 where folding its scale would round.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: the adapter is damaged, stored as pickle, or does something that B @ A on the untouched base cannot say.

    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        _check_config(config)
        factors, embeddings = _pair(load_tensors(folder / WEIGHTS_FILE, trusted=trusted)[0])
        modules = Lazy(factors, lambda name: _fold(name, factors[name], config))
        return Skill(modules if lazy else dict(modules), embeddings, finite=trusted)
    except ValueError as error:
        raise ValueError(f"adapter {str(folder)!r}: {error}") from None


def write_adapter(
    skill: Skill, folder: str | Path, *, base_name: str | None = None, fan_in_fan_out: bool = False, task_type: str | None = None
) -> None:
    """Write a skill as a PEFT adapter that `PeftModel.from_pretrained(base, folder)` loads; the same skill gives the same bytes.

    Args:
        skill: what to write.
        folder: made where it does not exist; it must not hold an adapter yet.
        base_name: PEFT's `base_model_name_or_path`, a Hub id or a path, for tools that load the base from it.
        fan_in_fan_out: whether the adapted layers store (in, out) weights, as transformers' `Conv1D` does; PEFT corrects it with a warning.
        task_type: PEFT's task type, such as `CAUSAL_LM`.

    Raises:
        FileExistsError: the folder holds an adapter already.

    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists():
            raise FileExistsError(f"{str(folder / name)!r} exists: write the adapter to another folder, or remove it first")
    tensors = {key: half for name, pair in skill.factors.items() for key, half in _named(name, pair, name in skill.embeddings)}
    save_tensors(folder / WEIGHTS_FILE, unshared(tensors), {"format": "pt"})
    _write_config(folder, skill.ranks, base_name, fan_in_fan_out, task_type)


def stream_adapter(
    modules: Iterable[tuple[str, Factor]],
    names: Iterable[str],
    folder: str | Path,
    *,
    embeddings: Container[str] = frozenset(),
    base_name: str | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
) -> None:
    """Write a PEFT adapter module by module, so that one of them is in memory; the folder appears when it is complete.

    Args:
        modules: (module path, factors).
        names: paths of the modules that may come.
        folder: must not be there yet, or be empty.
        embeddings: see `Skill`.
        base_name: see `write_adapter`, as the others.
        fan_in_fan_out: see there.
        task_type: see there.

    Raises:
        FileExistsError: the folder holds something.

    """
    ranks: dict[str, int] = {}
    with whole_folder(Path(folder)) as written:
        with (written / WEIGHTS_FILE).open("wb") as file:
            keys = [f"{_PREFIX}{name}.{half}" for name in names for half in _halves(name in embeddings)]
            writer = TensorWriter(file, keys, {"format": "pt"})
            for name, pair in modules:
                ranks[name] = len(pair[0])
                for key, half in _named(name, pair, name in embeddings):
                    writer.add(key, half)
            writer.close()
        _write_config(written, ranks, base_name, fan_in_fan_out, task_type)


def _halves(table: bool) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")


def _named(name: str, pair: Factor, table: bool) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of a module in PEFT's file."""
    a, b = pair
    for half, tensor in zip(_halves(table), (a, b.reshape(*b.shape, *[1] * (a.dim() - 2))), strict=True):
        yield f"{_PREFIX}{name}.{half}", tensor


def _write_config(folder: Path, ranks: Mapping[str, int], base_name: str | None, fan_in_fan_out: bool, task_type: str | None) -> None:
    rank = max(ranks.values())
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_bytes((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors with no memory in common (tied weights, slices of one stack), as safetensors asks."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return plain


def folded(factor: Factor, scale: float) -> Factor:
    """Factors with a scale multiplied into B, exactly: float16 and bfloat16 become float32 where the product would round."""
    a, b = factor
    if scale == 1:
        return a, b
    product = b * scale
    if b.dtype in (torch.float16, torch.bfloat16) and not torch.equal(product.float(), b.float() * scale):
        return a.float(), b.float() * scale
    return a, product


def read_config(path: Path, what: str) -> dict[str, Any]:
    """Object in a JSON file; a ValueError says of `what` that it is none."""
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_LONGEST_CONFIG))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{what}: {path.name} is not a JSON object")
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder at {str(folder)!r}: give a local folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / WEIGHTS_FILE).is_file() and (folder / PICKLE_FILE).exists():
        raise ValueError(
            f"adapter {str(folder)!r} is stored as pickle ({PICKLE_FILE}), which can run code when it is read: load it with PEFT where you "
            "trust it, and model.save_pretrained(folder) writes safetensors"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter {str(folder)!r} has no {name}: save it with PEFT's save_pretrained")
    return read_config(folder / CONFIG_FILE, f"adapter {str(folder)!r}")


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={config.get('peft_type')!r} is not LoRA: convert it with peft.convert_to_lora, or {_PLAIN}")
    for key, value in config.items():
        if value and key in _REFUSED:
            raise ValueError(f"{key}={value!r}: {_REFUSED[key]}")
        if value and key not in _KNOWN:
            raise ValueError(f"{key}={value!r} is unknown and may change what the factors compute; if it does not, take it out of {CONFIG_FILE}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias={config['bias']!r} trains biases of the base: train with bias='none'")
    init = config.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init is None or str(init).lower() in _PLAIN_INITS):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base's weights, so the factors fit only that base: save it with "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) where PEFT offers that, or train from the default"
        )


def _pair(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factor], frozenset[str]]:
    """(A, B) per module, both as matrices for B, and which modules are embeddings."""
    halves: dict[str, dict[str, Tensor]] = {}
    tables: dict[str, bool] = {}
    for key, tensor in tensors.items():
        if foreign := _FOREIGN_KEY.search(key):
            raise ValueError(f"tensor {key!r} belongs to no plain LoRA factor, {_FOREIGN_KEYS[foreign[0]]}")
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if not match:
            raise ValueError(f"tensor {key!r} fits no LoRA factor: only lora_A, lora_B, lora_embedding_A and lora_embedding_B are read")
        name, is_table = match["module"], match["letter"] is None
        if tables.setdefault(name, is_table) != is_table or (match["letter"] or match["table"]) in halves.get(name, {}):
            raise ValueError(f"module {name!r} has two factors in one file, {key!r} is one of them: keep one")
        halves.setdefault(name, {})[match["letter"] or match["table"]] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise ValueError(f"module {name!r} has lora_{next(iter(pair))} but no lora_{'B' if 'A' in pair else 'A'}: the file is incomplete")
    factors = {name: (pair["A"], _matrix(name, pair["A"], pair["B"])) for name, pair in halves.items()}
    return factors, frozenset(name for name, is_table in tables.items() if is_table)


def _matrix(module: str, a: Tensor, b: Tensor) -> Tensor:
    """B (O, R, 1, ..) of a convolution as (O, R)."""
    if b.dim() <= 2:
        return b
    if a.dim() != b.dim() or any(size != 1 for size in b.shape[2:]):
        raise ValueError(f"module {module!r}: A {tuple(a.shape)} and B {tuple(b.shape)} are no factors of a convolution, B must be (O, R, 1, ..)")
    if b.shape[1] != a.shape[0]:
        raise ValueError(
            f"module {module!r} is a grouped convolution, A {tuple(a.shape)} and B {tuple(b.shape)}: its change is not B @ A; target layers "
            "with groups=1"
        )
    return b.flatten(1)


def _fold(module: str, pair: Factor, config: Mapping[str, Any]) -> Factor:
    """Factors with PEFT's scale multiplied into B, exactly."""
    a, b = pair
    rank = _pattern(config, "rank_pattern", module, config.get("r", 8))
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if not a.numel() or not b.numel():
        raise ValueError(f"module {module!r} is empty, A is {tuple(a.shape)} and B {tuple(b.shape)}")
    if a.dim() < 2 or rank != a.shape[0] or rank < 1:
        raise ValueError(f"module {module!r}: {CONFIG_FILE} says rank {rank}, but A in {WEIGHTS_FILE} is {tuple(a.shape)}")
    return folded(pair, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern(config: Mapping[str, Any], table: str, module: str, default: object) -> float:
    """Value of the first pattern that matches the end of the module's path, PEFT's own rule; else the default."""
    value: object = default
    patterns = config.get(table) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{table}={patterns!r} must map patterns to numbers")
    for pattern, each in patterns.items():
        if _steps(pattern, len(module)) > _MOST_STEPS:
            raise ValueError(f"{table} key {pattern!r:.200} may take for ever to match: name the modules, or repeat less in it")
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{table} key {pattern!r} is no regular expression: {error}") from None
        if found:
            value = each
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{table} gives {value!r:.200} for module {module!r}: it must be a number")
    return value


def _steps(pattern: str, length: int) -> float:
    """Logarithm of how often a regular expression may go back in a text of this length, from above; no end where what is repeated repeats."""
    if _REPEATED_GROUP.search(pattern):
        return math.inf
    ends = len(_REPEAT.findall(pattern)) + 1
    ways = math.lgamma(length + ends + 1) - math.lgamma(ends + 1) - math.lgamma(length + 1)
    groups = pattern.count("(") + 1
    return ways + math.log(2) * pattern.count("?") + groups * math.log1p(pattern.count("|") / groups)


def _targets(modules: Iterable[str]) -> list[str] | str:
    """Modules for PEFT: their list, or, where a short name could be the end of another module's name, the exact pattern."""
    names = list(modules)
    return names if all(name.count(".") >= 2 for name in names) else "|".join(map(re.escape, names))
