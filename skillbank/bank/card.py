"""The card of a version: where it comes from, what it was made with, and the hash of every file beside it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

from skillbank.bank.refs import is_exact
from skillbank.bank.sealed import canonical, seal, unseal
from skillbank.words import did_you_mean

__all__ = ["CARD_FILE", "FORMAT", "KINDS", "README_FILE", "BaseLink", "Card", "Parent", "check_extra", "content_hash", "readme", "tool_versions"]

FORMAT = 1
KINDS = ("base", "skill", "composition")
CARD_FILE = "card.json"
README_FILE = "README.md"
_TOOLS = ("skillbank", "torch", "safetensors", "peft", "transformers", "accelerate", "numpy")


class BaseLink(TypedDict):
    """The base that a skill or a composition belongs to.

    `ref` and `hash` are the exact reference and content hash in the same bank, None where the base lives elsewhere and `name` says where (a
    Hub id); `fingerprint` is the SHA-256 of the base weights that the skills touch (`base_fingerprint`), None where nobody could tell.
    """

    ref: str | None
    hash: str | None
    name: str | None
    fingerprint: str | None


class Parent(TypedDict):
    """A version that this one was made from, by exact reference and content hash, with its weight in a merge."""

    ref: str
    hash: str
    weight: float | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `card.json` says. Name and version are the path of the folder and are not repeated inside.

    Args:
        kind: `base`, `skill` or `composition`.
        hash: content hash: SHA-256 over the payload files.
        files: `{name: {"sha256": .., "size": ..}}` of every other file of the version.
        base: the base, or None.
        parents: what it was made from, in order.
        conf: resolved configuration of the run that made it.
        data: the data sets that were used, with their hashes.
        metrics: finite numbers by name, may be nested.
        tags: words to find it by.
        license: SPDX identifier or None.
        notes: free text.
        tools: versions of the tools that made it.
        created: UTC time in ISO 8601.
        format: number of this format.

    """

    kind: str
    hash: str
    files: Mapping[str, Mapping[str, Any]]
    base: BaseLink | None = None
    parents: tuple[Parent, ...] = ()
    conf: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    license: str | None = None
    notes: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT

    @property
    def base_name(self) -> str:
        """What the base is called: its reference here, its name elsewhere, or nothing."""
        return "" if self.base is None else self.base["ref"] or self.base["name"] or ""

    @property
    def links(self) -> list[tuple[str, str]]:
        """Reference and content hash of what it needs in the same bank: of the base, then of every parent."""
        base = [(self.base["ref"], str(self.base["hash"]))] if self.base is not None and self.base["ref"] is not None else []
        return [*base, *((parent["ref"], parent["hash"]) for parent in self.parents)]

    @property
    def stands_on(self) -> tuple[str, ...]:
        """References in the same bank that this version needs: the base, then the parents, each once."""
        return tuple(dict.fromkeys(ref for ref, _ in self.links))

    def to_bytes(self) -> bytes:
        """Sealed canonical JSON; `from_bytes` is its inverse."""
        return seal(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Card:
        """Read a card.

        Raises:
            ValueError: changed bytes, another format, or fields that are missing, unknown or of the wrong type.

        """
        body = unseal(data)
        if body.get("format") != FORMAT:
            raise ValueError(f"has format {body.get('format')!r}, this skillbank reads {FORMAT}: update skillbank")
        names = {each.name for each in fields(cls)}
        if set(body) != names:
            raise ValueError(f"has the fields {sorted(body)}, a card has {sorted(names)}")
        wrong = [name for name, types in _TYPES.items() if not isinstance(body[name], types)]
        if wrong or body["kind"] not in KINDS:
            raise ValueError(f"has a value of the wrong type in {wrong or ['kind']}")
        if not all(_is_entry(name, entry) for name, entry in body["files"].items()):
            raise ValueError("has an entry in files that is no plain file name with its sha256 and size")
        if not any(needed <= set(body["files"]) <= needed | {*optional, README_FILE} for needed, *optional in _FILES[body["kind"]]):
            raise ValueError(f"names the files {sorted(body['files'])}, which are not those of a {body['kind']}")
        if body["base"] is not None and not _is_link(body["base"], BaseLink, ()):
            raise ValueError("has a base that is no ref, hash, name and fingerprint")
        if not all(_is_link(parent, Parent, ("ref", "hash")) for parent in body["parents"]):
            raise ValueError("has a parent that is no ref, hash and weight")
        if not all(isinstance(text, str) for text in (*body["tags"], *body["tools"].values())):
            raise ValueError("has a tag or a tool's version that is no text")
        return cls(**{**body, "parents": tuple(body["parents"]), "tags": tuple(body["tags"])})


_FILES: Mapping[str, list[tuple[set[str], *tuple[str, ...]]]] = {
    "base": [({"model.json", "model.safetensors"},), ({"checkpoint.json"},)],
    "skill": [({"adapter_config.json", "adapter_model.safetensors"},)],
    "composition": [({"composition.json"}, "gate.safetensors")],
}
"""What a version has beside its card, by kind: files that it needs, and others that it may have; a model card may always be there."""
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "kind": str,
    "hash": str,
    "files": dict,
    "base": (dict, type(None)),
    "parents": list,
    "conf": dict,
    "data": dict,
    "metrics": dict,
    "tags": list,
    "license": (str, type(None)),
    "notes": str,
    "tools": dict,
    "created": str,
}


def check_extra(extra: Mapping[str, Any]) -> None:
    """Check the fields of a card that the user gives.

    Raises:
        ValueError: a field that a card does not have, of the wrong type, or with a value that JSON has no word for.

    """
    for name, value in extra.items():
        if name not in _GIVEN:
            raise ValueError(f"the card has no field {name!r}: {did_you_mean(name, [*_GIVEN, 'base', 'parents'])}")
        if not isinstance(value, _GIVEN[name]) or (name == "tags" and (isinstance(value, str) or not all(isinstance(tag, str) for tag in value))):
            raise ValueError(f"card field {name!r} is {value!r}, it must be of type {_GIVEN[name].__name__}")
        canonical(value, f"card field {name!r}")


def _is_link(link: object, form: type, needed: Iterable[str]) -> bool:
    if not isinstance(link, dict) or set(link) != set(form.__annotations__):
        return False
    text = all(value is None or isinstance(value, str) for key, value in link.items() if key != "weight")
    exact = text and (link["ref"] is None or is_exact(link["ref"]))
    return exact and all(link[key] for key in needed) and isinstance(link.get("weight"), int | float | None)


def _is_entry(name: str, entry: object) -> bool:
    plain = name not in ("", ".", "..", CARD_FILE) and not set(name) & set("/\\\0")
    return plain and isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("size"), int)


_GIVEN: Mapping[str, type[Any]] = {"conf": Mapping, "data": Mapping, "metrics": Mapping, "tags": Sequence, "license": str, "notes": str}


def content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over names and SHA-256s of the payload files, in the order of the names; the model card is no payload."""
    total = hashlib.sha256()
    for name in sorted(set(files) - {README_FILE}):
        total.update(f"{name}\0{files[name]['sha256']}\n".encode())
    return total.hexdigest()


@functools.cache
def tool_versions() -> Mapping[str, str]:
    """Versions of the installed tools that have a say in what is stored."""
    import importlib.metadata

    found: dict[str, str] = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def readme(name: str, card: Card) -> str:
    """Model card in Markdown with the front matter of the Hub."""
    matter: dict[str, Any] = {"library_name": "peft" if card.kind == "skill" else "skillbank", "tags": ["skillbank", card.kind, *card.tags]}
    if card.base is not None and card.base["name"] is not None:
        matter["base_model"] = card.base["name"]
    if card.license is not None:
        matter["license"] = card.license
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in sorted(matter.items())), "---", "", f"# {name}", ""]
    lines += [f"A {card.kind} of a skillbank bank, content `sha256:{card.hash[:12]}`.", ""]
    if card.notes:
        lines += [card.notes.strip(), ""]
    if card.base is not None:
        lines += [f"- base: `{card.base['ref'] or card.base['name']}`"]
    lines += [f"- parent: {weighted(each)}" for each in card.parents]
    lines += [f"- data: {key} {value}" for key, value in flat(card.data)]
    lines += [f"- made: {card.created} with " + ", ".join(f"{tool} {version}" for tool, version in sorted(card.tools.items())), ""]
    if card.metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in flat(card.metrics)), ""]
    lines += ["```python", "import skillbank", "", f'thing = skillbank.Bank("adapters").get("{name}")', "```"]
    return "\n".join(lines) + "\n"


def weighted(parent: Parent) -> str:
    """`0.7 walker/walk@1`, or the reference alone."""
    return parent["ref"] if parent["weight"] is None else f"{parent['weight']:g} {parent['ref']}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested values as `a.b` and text, in the order of the names."""
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)
