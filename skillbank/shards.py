"""A Hugging Face checkpoint with a skill folded into it, written file by file: the model is never built, one file's changed weights are in memory."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skillbank.attach import check_fit, delta_like
from skillbank.skill import Skill
from skillbank.tensors import load_tensors, save_tensors

__all__ = ["fold_checkpoint", "skeleton"]

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf", ".onnx")


def skeleton(folder: Path) -> nn.Module:
    """Model of a checkpoint without its weights, on the meta device.

    Raises:
        ValueError: transformers does not know the architecture in `config.json`.

    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {names[0]!r}, the architecture in {str(folder / 'config.json')!r}: update it"
        )
    with torch.device("meta"):
        made: nn.Module = kind(config) if names else kind.from_config(config)
    return made


def fold_checkpoint(source: str | Path, skill: Skill, folder: str | Path) -> None:
    """Write a complete Hugging Face folder: every weights file of `source` with the skill's deltas added, and all other files as they are.

    Weights are added in float32 or better and rounded once to their own dtype. A tied weight that only one of its modules adapts is untied:
    both are written, and `config.json` says so. The folder appears when it is complete.

    Args:
        source: folder with `config.json` and safetensors files.
        skill: for the model that the folder holds.
        folder: must not be there yet, or be empty.

    Raises:
        FileNotFoundError: there are no safetensors files.
        FileExistsError: the folder holds something.
        ValueError: the skill does not fit the model, or a weight that it changes is missing or quantised.

    """
    source, folder = Path(source), Path(folder)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors files in {str(source)!r}: pickle (.bin, .pt) is not read")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} holds something already: export to another folder")
    net = skeleton(source)
    check_fit(net, skill)
    there = {key: path for path in files for key in load_tensors(path, trusted=True)[0]}
    at, copies = _places(net, skill, there)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    beside.mkdir(parents=True)
    try:
        for path in files:
            tensors, notes = load_tensors(path)
            written = {key: _changed(net, skill, at.get(key), key, tensor) for key, tensor in tensors.items()}
            for new, (old, module) in copies.items():
                if old in tensors:
                    written[new] = _changed(net, skill, module, new, tensors[old]).clone()
            save_tensors(beside / path.name, written, notes)
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
                shutil.copyfile(path, beside / path.name)
        if copies:
            _say_untied(beside, {new: there[old].name for new, (old, _) in copies.items()})
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _places(net: nn.Module, skill: Skill, there: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, tuple[str, str | None]]]:
    """Which module changes which tensor of the files; and tensors to be written beside them, from which and changed by which module."""
    prefix = f"{getattr(net, 'base_model_prefix', '')}."
    tied: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = {name: names for names in tied.values() for name in names}
    at: dict[str, str] = {}
    copies: dict[str, tuple[str, str | None]] = {}
    for module in skill:
        names = groups[f"{module}.weight"]
        stored = {name: key for name in names for key in (name, name.removeprefix(prefix), prefix + name) if key in there}
        if not stored:
            raise ValueError(f"the checkpoint has no tensor {module + '.weight'!r}, which the skill changes; it has {sorted(there)[:5]}, ...")
        if f"{module}.weight" in stored:
            at[stored[f"{module}.weight"]] = module
        for name in names:
            if name not in stored:
                other = name.removesuffix(".weight")
                copies[name] = (next(iter(stored.values())), other if other in skill else None)
    return at, copies


def _changed(net: nn.Module, skill: Skill, module: str | None, key: str, weight: Tensor) -> Tensor:
    if module is None:
        return weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"tensor {key!r} is {weight.dtype}: a skill cannot be folded into quantised weights; take the checkpoint in bfloat16 or more"
        )
    delta = delta_like(net.get_submodule(module), skill, module)
    if delta.shape != weight.shape:
        raise ValueError(f"tensor {key!r} is {tuple(weight.shape)}, the model's is {tuple(delta.shape)}: config.json is of another checkpoint")
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)


def _say_untied(folder: Path, added: Mapping[str, str]) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n")
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text())
        index["weight_map"] |= added
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index.setdefault("metadata", {})["total_size"] = size
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
