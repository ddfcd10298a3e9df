"""A Hugging Face checkpoint with a skill folded into it, written file by file: the model is never built, one file's changed weights are in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skillbank.attach import check_fit
from skillbank.folding import delta_like
from skillbank.skill import Deltas
from skillbank.tensors import load_tensors, save_tensors, whole_folder

__all__ = ["COMPANIONS", "fold_checkpoint", "skeleton", "weight_files"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "LICENSE*")
"""Shell patterns of what goes with a checkpoint's weights on the Hub."""
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


def fold_checkpoint(source: str | Path, skill: Deltas, folder: str | Path) -> None:
    """Write a complete Hugging Face folder: the weights files of `source` with the skill's deltas added, and its other files as they are.

    Left out are folders in it, hidden files, and the same weights in other forms.

    Weights are added in float32 or better and rounded once to their own dtype. A tied weight that only one of its modules adapts is untied:
    both are written, and `config.json` says so. The folder appears when it is complete.

    Args:
        source: folder with `config.json` and safetensors files.
        skill: for the model that the folder holds; or a `dense_merge` of skills, whose deltas are made when their turn comes.
        folder: must not be there yet, or be empty.

    Raises:
        FileNotFoundError: there are no safetensors files.
        FileExistsError: the folder holds something.
        ValueError: the skill does not fit the model, or a weight that it changes is missing or quantised.

    """
    source = Path(source)
    files = weight_files(source)
    net = skeleton(source)
    check_fit(net, skill)
    there = {key: path for path in files for key in load_tensors(path, trusted=True)[0]}
    at, copies, untied = _places(net, skill, there)
    with whole_folder(Path(folder)) as written:
        for path in files:
            tensors, notes = load_tensors(path)
            changed = {key: _changed(net, skill, at.get(key), key, tensor) for key, tensor in tensors.items()}
            for new, (old, module) in copies.items():
                if old in tensors:
                    changed[new] = _changed(net, skill, module, new, tensors[old]).clone()
            save_tensors(written / path.name, changed, notes)
        for path in source.iterdir():
            if path.is_file() and _is_companion(path.name):
                shutil.copyfile(path, written / path.name)
        if untied:
            _say_untied(written, {new: there[old].name for new, (old, _) in copies.items()})


def weight_files(folder: Path) -> list[Path]:
    """Files that hold a checkpoint's weights: those of its index, or its one file, and not others of the same weights beside them.

    Raises:
        FileNotFoundError: there are none, or one is missing.

    """
    if (folder / _INDEX).exists():
        files = [folder / name for name in sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))]
    else:
        files = [folder / _SINGLE] if (folder / _SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = f"{missing[0]!r} of the index is missing" if missing else "no safetensors files; pickle (.bin, .pt) is not read"
        raise FileNotFoundError(f"{str(folder)!r}: {what}")
    return files


def _is_companion(name: str) -> bool:
    """Whether a file of a checkpoint's folder goes with its weights: configuration, tokenizer, licence, and not weights in another form."""
    return name == _INDEX or not (name.startswith(".") or name.endswith((*_WEIGHTS, ".index.json")))


def _places(net: nn.Module, skill: Deltas, there: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, tuple[str, str | None]], bool]:
    """Which module changes which tensor of the files; tensors to be written beside them, from which and changed by which module; and any ties cut."""
    prefix = f"{getattr(net, 'base_model_prefix', '')}."
    tied: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = {name: names for names in tied.values() for name in names}
    at: dict[str, str] = {}
    copies: dict[str, tuple[str, str | None]] = {}
    untied = False
    for module in skill:
        names = groups[f"{module}.weight"]
        stored = {name: key for name in names for key in (name, name.removeprefix(prefix), prefix + name) if key in there}
        if not stored:
            raise ValueError(f"the checkpoint has no tensor {module + '.weight'!r}, which the skill changes; it has {sorted(there)[:5]}, ...")
        untied |= len(names) > 1
        if f"{module}.weight" in stored:
            at[stored[f"{module}.weight"]] = module
        for name in names:
            if name not in stored:
                other = name.removesuffix(".weight")
                copies[name] = (next(iter(stored.values())), other if other in skill else None)
    return at, copies, untied


def _changed(net: nn.Module, skill: Deltas, module: str | None, key: str, weight: Tensor) -> Tensor:
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
    for part in [config, *(each for each in config.values() if isinstance(each, dict) and "tie_word_embeddings" in each)]:
        part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text())
        index["weight_map"] |= added
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index.setdefault("metadata", {})["total_size"] = size
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
