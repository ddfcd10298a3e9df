"""In from the folders of PEFT and others, here or on the Hub, and out to PEFT's or to plain weights with everything folded in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skillbank.adapter import CONFIG_FILE, folded, read_config, write_adapter
from skillbank.bank import Bank, Base, Checkpoint, Composition, Ref
from skillbank.bank.hub import repository_files, snapshot
from skillbank.bank.records import write_payload
from skillbank.folding import fold
from skillbank.formats import CONFIGS, FILES, PICKLES, WEIGHTS, peft_options, read_lora
from skillbank.load import build_base
from skillbank.merge import merge
from skillbank.shards import COMPANIONS, fold_checkpoint
from skillbank.skill import Skill
from skillbank.tensors import whole_folder

__all__ = ["adapter_options", "export", "import_adapter"]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def import_adapter(
    source: str | Path,
    bank: Bank,
    name: str,
    *,
    base: str | None = None,
    card: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    revision: str | None = None,
    subfolder: str = "",
) -> Ref:
    """Put a LoRA adapter of PEFT, of AdapterHub's `adapters` or of mttl into a bank, its scale folded in.

    Signs of a scale that is wrong are in the card's `conf`, under `import.lints`.

    Args:
        source: folder that PEFT's `save_pretrained` wrote, or of another of the checkpoints that `read_lora` knows by their files; where there is
            none of that name, a repository on the Hub, such as `user/repo`. The card keeps repository and commit in `conf`, under `source`.
        bank: where it goes.
        name: the name that it gets.
        base: reference of its base in the bank; without it the card names the base that the adapter's own configuration names.
        card: further fields of the card, see `Bank.put`.
        scale: multiplies every delta, to make up for a wrong scale.
        revision: branch, tag or commit of the repository; None for its main branch.
        subfolder: where in the folder or the repository the adapter is.

    Returns:
        The exact reference.

    Raises:
        FileNotFoundError: a file of the adapter is missing, or there is no such repository or revision.
        ValueError: an adapter that B @ A cannot represent, that is stored as pickle, or that does not fit the base; a scale that is not finite.
        PermissionError: the user may not read the repository.
        ConnectionError: the Hub cannot be reached.

    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    folder, origin, called = _fetched(source, revision, subfolder)
    found = read_lora(folder)
    skill = Skill({module: folded(factor, scale) for module, factor in found.skill.factors.items()}, found.skill.embeddings)
    made = {"format": found.format, "scale": scale, "lints": [asdict(lint) for lint in found.lints]}
    fields = {"notes": f"Imported from the {found.format} adapter {called!r}.", **(card or {})}
    fields["conf"] = {"import": made, **origin, **fields.get("conf", {})}
    if base is not None or found.base_name:
        fields["base"] = base if base is not None else {"name": found.base_name}
    return bank.put(skill, name, card=fields, adapter=found.options)


def export(ref: str, folder: str | Path, bank: Bank, *, merged: bool = False, weights: str | Path | None = None) -> Path:
    """Write a version for other tools.

    Args:
        ref: a skill, a composition that is a merge, or, where `merged`, also a base.
        folder: made here; it must be empty or not there yet.
        bank: where the version is.
        merged: write the base's weights with the skill added to them, as `model.safetensors` with the model's conf beside them, instead of a
            PEFT adapter; a language model as transformers loads it. Where the bank knows the base by its hashes alone, a complete Hugging Face
            folder, file by file, see `fold_checkpoint`.
        weights: where such a base's files are; without it, in the folder or the Hub repository that the bank has them from.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something.
        FileNotFoundError: the base's files are not there.
        ValueError: a base alone is no adapter; a gate's weights depend on the input, so that no adapter and no weights hold them.

    """
    folder, thing = Path(folder), bank.get(ref)
    if weights is not None and not merged:
        raise ValueError(f"weights={str(weights)!r} are a base's, and an adapter holds none: export with merged=True (--merged), or leave them out")
    if isinstance(thing, Base | Checkpoint) and not merged:
        raise ValueError(f"{ref!r} is a base, no adapter: export it with merged=True (--merged)")
    skill = None if isinstance(thing, Base | Checkpoint) else thing if isinstance(thing, Skill) else _merged(bank, ref, thing)
    if skill is not None and not merged:
        with whole_folder(folder) as written:
            write_adapter(skill, written, **adapter_options(thing.skills if isinstance(thing, Composition) else [ref], bank))
        return folder
    base = thing if isinstance(thing, Base | Checkpoint) else bank.get(bank.base_of([ref]))
    if isinstance(base, Checkpoint):
        if skill is None:
            raise ValueError(f"{ref!r} is a checkpoint as it lies in {base.repo!r}: copy it from there")
        fold_checkpoint(_located(base, weights), skill, folder)
        return folder
    assert isinstance(base, Base)
    model = build_base(base)
    if skill is not None:
        fold(model.net, skill)
    own = getattr(model, "save_pretrained", None)
    with whole_folder(folder) as written:
        if own is None:
            write_payload(Base(base.model, model.state_dict()), written, {}, {})
        else:
            own(written)
    return folder


def adapter_options(refs: Sequence[str | Ref], bank: Bank) -> dict[str, Any]:
    """Options of `write_adapter`, or of `Bank.put`, that say of their base what skills of a bank say of it, of each the first that does."""
    return peft_options(*(read_config(bank.path(ref) / CONFIG_FILE, f"adapter {str(ref)!r}") for ref in refs))


def _located(base: Checkpoint, weights: str | Path | None) -> Path:
    """Folder with the files of a checkpoint, which are those that the bank knows."""
    if weights is not None or base.revision is None:
        folder = Path(weights or base.repo)
    else:
        folder = snapshot(base.repo, [*base.files], base.revision, COMPANIONS)
    if not folder.is_dir():
        raise FileNotFoundError(f"the weights of {base.repo!r} are not at {str(folder)!r}: say where they are with weights=... (--weights)")
    if wrong := base.differences(folder):
        raise ValueError(f"{str(folder)!r} does not hold the base that the skill was put with: {wrong[0]}")
    return folder


def _merged(bank: Bank, ref: str, composition: Composition) -> Skill:
    if composition.merge is None:
        raise ValueError(f"{ref!r} has a gate, whose weights depend on the input: no adapter and no weights hold it; load it with skillbank.load")
    skills = [thing for thing in map(bank.get, composition.skills) if isinstance(thing, Skill)]
    return merge(skills, **composition.merge)


def _fetched(source: str | Path, revision: str | None, subfolder: str) -> tuple[Path, dict[str, Any], str]:
    """Folder of an adapter on this machine, what the card keeps of where it comes from, and what it is called."""
    folder = Path(source)
    if folder.exists() or not (isinstance(source, str) and _REPOSITORY.fullmatch(source)):
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} of {str(source)!r}: only a repository on the Hub, such as 'user/repo', has revisions; leave it out"
            )
        return folder / subfolder, {}, (folder / subfolder).name
    inside = f"{subfolder.strip('/')}/".lstrip("/")
    folder = snapshot(source, [inside + each for each in FILES], revision)
    if not any((folder / inside / each).is_file() for each in WEIGHTS):
        raise _incomplete(source, inside, repository_files(source, folder.name))
    kept = {"repository": source, "commit": folder.name, **({"subfolder": inside.rstrip("/")} if inside else {})}
    return folder / inside, {"source": kept}, f"{source}/{inside}".rstrip("/")


def _incomplete(repository: str, inside: str, files: list[str]) -> Exception:
    """What to say of a repository without weights in a folder of it."""
    for path in files:
        if path.startswith(inside) and ((name := path.removeprefix(inside)) in PICKLES or ("/" not in name and name.endswith(".ckpt"))):
            return ValueError(
                f"{repository!r} has its weights as pickle ({path}), which can run code when it is read: load them where you trust them, with the "
                "library that wrote them, and save them as safetensors"
            )
    others = sorted({path.rpartition("/")[0] or "its root" for path in files if path.rpartition("/")[2] in CONFIGS})
    return FileNotFoundError(
        f"{repository!r} holds no adapter in {inside.rstrip('/') or 'its root'}, which takes one of {', '.join(WEIGHTS)}: "
        + (f"name the subfolder, there is {', '.join(others[:5])}" if others else "it is none that skillbank reads")
    )
