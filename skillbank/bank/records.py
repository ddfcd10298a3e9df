"""What a bank holds beside skills: bases and compositions, and how each kind lies in a version folder.

`skill`: `adapter_config.json`, `adapter_model.safetensors`. `base`: `model.json`, `model.safetensors`, or `checkpoint.json` where its weights stay
elsewhere. `composition`: `composition.json`, and `gate.safetensors` where the gate has weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from skillbank.bank.checkpoint import Checkpoint
from skillbank.bank.sealed import read_object, write_object
from skillbank.words import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from skillbank.skill import Skill

__all__ = ["Base", "Composition", "Thing", "base_fingerprint", "kind_of", "plain_weights", "read_payload", "stored_fingerprint", "write_payload"]

MODEL_FILE = "model.json"
MODEL_WEIGHTS = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.json"
COMPOSITION_FILE = "composition.json"
GATE_WEIGHTS = "gate.safetensors"
_NET = "net."
_LARGEST_CHECKPOINT = 2**28
"""Bytes: a line per weight, and there are checkpoints of a million."""


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model.

    Args:
        model: resolved conf of the model, with the `_target_` that builds it.
        tensors: its state dict; the weights that skills attach to are named `net.<module>.weight`.

    Raises:
        ValueError: no `_target_`, or no tensors.

    """

    model: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        _check_target("model", self.model)
        if not self.tensors:
            raise ValueError("a base needs the tensors of its state dict, got none")


@dataclass(frozen=True, eq=False)
class Composition:
    """A base and skills by reference, with the recipe of a merge or with a gate.

    Args:
        base: reference of the base.
        skills: references of the skills, in the order of the weights and of the gate's outputs.
        merge: arguments of a merge (method, weights, rank, ...); None where a gate weights the skills.
        gate: resolved conf of the gate, with its `_target_`; None where a merge does.
        tensors: the gate's state dict; may be empty.

    Raises:
        ValueError: no skills, both or neither of merge and gate, tensors without a gate, or another number of weights than skills.

    """

    base: str
    skills: Sequence[str]
    merge: Mapping[str, Any] | None = None
    gate: Mapping[str, Any] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skills", tuple(str(skill) for skill in self.skills))
        object.__setattr__(self, "base", str(self.base))
        if not self.skills:
            raise ValueError("a composition needs at least one skill, got none")
        if (self.merge is None) == (self.gate is None):
            raise ValueError(f"a composition has either a merge or a gate, got merge={self.merge} and gate={self.gate}")
        if self.gate is not None:
            _check_target("gate", self.gate)
        elif self.tensors:
            raise ValueError(f"tensors are the gate's weights, but this composition is a merge: {sorted(self.tensors)}")
        if self.merge is not None and "weights" in self.merge:
            object.__setattr__(self, "merge", {**self.merge, "weights": plain_weights(self.merge["weights"])})
        if self.weights is not None and len(self.weights) != len(self.skills):
            raise ValueError(f"got {len(self.weights)} weights for {len(self.skills)} skills: give one weight per skill")

    @property
    def weights(self) -> list[float] | None:
        """The weights of a merge, one per skill, where its recipe has them."""
        weights = None if self.merge is None else self.merge.get("weights")
        if weights is not None and (not isinstance(weights, Sequence) or not all(isinstance(each, int | float) for each in weights)):
            raise ValueError(f"weights={weights!r} are no numbers")
        return None if weights is None else list(weights)


def plain_weights(weights: Any) -> Any:
    """Weights, or mappings to them, as JSON takes them: what numpy or torch holds becomes numbers of Python, the rest stays."""
    given = weights.tolist() if hasattr(weights, "tolist") else weights
    if not isinstance(given, list | tuple):
        return given
    return [{key: _plain(each[key]) for key in each} if isinstance(each, Mapping) else _plain(each) for each in given]


def _plain(number: Any) -> Any:
    """A number of Python in place of a single one of numpy's or torch's."""
    return number.item() if math.prod(getattr(number, "shape", (0,))) == 1 else number


Thing: TypeAlias = "Skill | Base | Checkpoint | Composition"
"""What a bank holds."""


def kind_of(thing: object) -> str:
    """`base`, `skill` or `composition`.

    Raises:
        TypeError: something that a bank does not hold.

    """
    from skillbank.skill import Skill

    for kind, each in (("base", Base | Checkpoint), ("skill", Skill), ("composition", Composition)):
        if isinstance(thing, each):
            return kind
    raise TypeError(f"a bank holds Skill, Base, Checkpoint and Composition, got {type(thing).__name__}")


def base_fingerprint(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> str:
    """SHA-256 of the base weights that a skill touches, the same on any machine.

    Args:
        tensors: state dict of the net, `<module>.weight` for every module.
        modules: the modules that the skill adapts.

    Raises:
        ValueError: the base has no weight for one of the modules.

    """
    from skillbank.skill import digest

    return _fingerprint(modules, tensors, lambda name: digest({"": tensors[name]}))


def stored_fingerprint(folder: Path, modules: Iterable[str]) -> str:
    """`base_fingerprint` of a base in its version folder; of a `Checkpoint`, without its weights."""
    from safetensors import SafetensorError, safe_open

    if (folder / CHECKPOINT_FILE).exists():
        digests = _read_checkpoint(folder).weights
        return _fingerprint(modules, digests, digests.__getitem__)
    path = folder / MODEL_WEIGHTS
    found = path.stat()
    try:
        with safe_open(path, framework="pt") as file:
            names = {name.removeprefix(_NET) for name in file.keys() if name.startswith(_NET)}  # noqa: SIM118
        return _fingerprint(
            modules, names, lambda name: _stored_digest(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns), name)
        )
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _fingerprint(modules: Iterable[str], known: Iterable[str], digest_of: Callable[[str], str]) -> str:
    """SHA-256 over the lines `name NUL digest LF` of the weights, by name; a digest is over dtype, shape and bytes."""
    total, names = hashlib.sha256(), set(known)
    for name in sorted(f"{module}.weight" for module in modules):
        if name not in names:
            module, others = name.removesuffix(".weight"), [each.removesuffix(".weight") for each in names if each.endswith(".weight")]
            raise ValueError(f"the base has no module {module!r} with a weight, but the skill adapts it: {did_you_mean(module, others)}")
        total.update(f"{name}\0{digest_of(name)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=100_000)
def _stored_digest(path: Path, _stamp: tuple[int, ...], name: str) -> str:
    """Digest of one weight in the file of a base, which every skill on it asks for again."""
    from safetensors import safe_open

    from skillbank.skill import digest

    with safe_open(path, framework="pt") as file:
        return digest({"": file.get_tensor(f"{_NET}{name}")})


def write_payload(thing: Thing, folder: Path, parents: Mapping[str, str], adapter: Mapping[str, Any]) -> None:
    """Write what `thing` is into an empty folder; its content hash is taken over these files.

    Args:
        thing: what to write.
        folder: an empty folder.
        parents: content hash of every reference that a composition names.
        adapter: options of `write_adapter`.

    Raises:
        ValueError: something that JSON has no word for, or more of it than can be read again.

    """
    from skillbank.adapter import unshared, write_adapter
    from skillbank.tensors import save_tensors

    if isinstance(thing, Base):
        save_tensors(folder / MODEL_WEIGHTS, unshared(thing.tensors), {"format": "pt"})
        write_object(folder / MODEL_FILE, dict(thing.model), "the model's conf")
    elif isinstance(thing, Checkpoint):
        write_object(folder / CHECKPOINT_FILE, asdict(thing), "the checkpoint", _LARGEST_CHECKPOINT)
    elif isinstance(thing, Composition):
        body = {
            "base": {"ref": thing.base, "hash": parents[thing.base]},
            "skills": [{"ref": ref, "hash": parents[ref]} for ref in thing.skills],
            "merge": None if thing.merge is None else dict(thing.merge),
            "gate": None if thing.gate is None else dict(thing.gate),
        }
        write_object(folder / COMPOSITION_FILE, body, "the composition")
        if thing.tensors:
            save_tensors(folder / GATE_WEIGHTS, unshared(thing.tensors), {"format": "pt"})
    else:
        write_adapter(thing, folder, **adapter)


def read_payload(kind: str, folder: Path, *, trusted: bool = False, links: Sequence[tuple[str, str]] | None = None) -> Thing:
    """Read what `write_payload` wrote; the caller has checked the hashes of the files.

    Args:
        kind: `base`, `skill` or `composition`.
        folder: where it lies.
        trusted: it was read before.
        links: what a composition has to name as its base and skills: their references and content hashes.

    Raises:
        ValueError: it is not what such a version holds; the message names the file.

    """
    from skillbank.adapter import read_adapter
    from skillbank.tensors import load_tensors

    if kind == "base" and (folder / CHECKPOINT_FILE).exists():
        return _read_checkpoint(folder)
    if kind == "base":
        return Base(read_object(folder / MODEL_FILE), load_tensors(folder / MODEL_WEIGHTS)[0])
    if kind == "skill":
        return read_adapter(folder, trusted=trusted)
    body, gate = read_object(folder / COMPOSITION_FILE), folder / GATE_WEIGHTS
    named = _named(body)
    if links is not None and named != list(links):
        raise ValueError(f"{COMPOSITION_FILE} names {[ref for ref, _ in named]}, but the card {[ref for ref, _ in links]}, or other content of them")
    refs = [ref for ref, _ in named]
    return Composition(refs[0], refs[1:], body["merge"], body["gate"], load_tensors(gate)[0] if gate.exists() else {})


def _named(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Reference and content hash of the base and of every skill in the file of a composition."""
    skills, recipes = body.get("skills"), [body.get("merge"), body.get("gate")]
    entries = [body.get("base"), *skills] if isinstance(skills, list) else []
    whole = all(isinstance(each, dict) and set(each) == {"ref", "hash"} and all(isinstance(text, str) for text in each.values()) for each in entries)
    if not entries or not whole or set(body) != {"base", "skills", "merge", "gate"} or not all(isinstance(each, dict | None) for each in recipes):
        raise ValueError(f"{COMPOSITION_FILE} is no base and skills by reference and hash, with a merge or a gate")
    return [(each["ref"], each["hash"]) for each in entries]


def _read_checkpoint(folder: Path) -> Checkpoint:
    try:
        return Checkpoint(**read_object(folder / CHECKPOINT_FILE, _LARGEST_CHECKPOINT))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CHECKPOINT_FILE} is no checkpoint: {error}") from None


def _check_target(what: str, conf: Mapping[str, Any]) -> None:
    if not isinstance(conf.get("_target_"), str):
        raise ValueError(f"the conf of a {what} needs the '_target_' that builds it, got the keys {sorted(map(str, conf))}")
