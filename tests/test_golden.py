"""Bytes on disk: a bank that was written when the format was new is read, and what is written today has the same bytes."""

from pathlib import Path

import pytest

from skillbank.bank import Bank, Base, Composition
from skillbank.skill import digest
from tests.golden_bank import fill, things

GOLDEN = Path(__file__).parent / "golden" / "bank"
NAMES = list(things())


def test_it_verifies():
    assert Bank(GOLDEN).verify() == []
    assert Bank(GOLDEN).aliases("skill/walk") == {"best": 1}
    assert [move.protected for move in Bank(GOLDEN).moves("skill/walk")] == [True]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_stored_is_read(name):
    stored, made = Bank(GOLDEN).get(name), things()[name]
    assert type(stored) is type(made)
    if isinstance(stored, Base):
        assert (stored.model, digest(stored.tensors)) == (made.model, digest(made.tensors))
    elif isinstance(stored, Composition):
        assert (stored.merge, stored.gate) == (made.merge, made.gate)
        assert digest(stored.tensors) == digest(made.tensors)
    else:
        assert stored.fingerprint == made.fingerprint


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    bank = Bank(tmp_path_factory.mktemp("fresh"))
    fill(bank)
    return bank


@pytest.mark.parametrize("name", NAMES)
def test_the_same_things_are_written_as_the_same_bytes(fresh, name):
    """All but the model card, the card and the alias file, which tell the time and the versions of the tools."""
    for path in sorted((GOLDEN / name / "1").iterdir()):
        if path.name not in ("README.md", "card.json"):
            assert (fresh.root / name / "1" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_the_same(fresh, name):
    old, new = Bank(GOLDEN).card(name), fresh.card(name)
    for key in ("format", "kind", "hash", "base", "parents", "conf", "data", "metrics", "tags", "license", "notes"):
        assert getattr(old, key) == getattr(new, key), key
    assert set(old.files) == set(new.files)
