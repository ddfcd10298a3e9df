import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillbank.bank import Card, Where
from skillbank.bank.query import field

CARD = Card(
    kind="skill",
    hash="ab",
    files={},
    metrics={"return": 512.5, "loss": {"final": 2}},
    tags=("dmc", "Walker"),
    notes="It walks, 1234567.50.",
    conf={"id": "007"},
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("metrics.return > 512", True),
        ("metrics.return>512.5", False),
        ("metrics.return >= 512.5", True),
        ("metrics.loss.final = 2", True),
        ("metrics.loss.final == 2.0", True),
        ("metrics.loss.final != 2", False),
        ("metrics.return < 1e3", True),
        ("metrics.return <= 512", False),
        ("kind = skill", True),
        ("kind != 'skill'", False),
        ("tags ~ walker", True),
        ("notes ~ WALKS", True),
        ("metrics.return ~ 512", True),
        ("notes ~ 1234567", True),
        ("notes ~ '1234567.50'", True),
        ("notes ~ 1e3", False),
        ("conf.id ~ 007", True),
        ("conf.id = '007'", True),
        ('conf.id != "007"', False),
        ("conf.id = 007", False),
        ("metrics.none < 1", False),
        ("metrics.none != 1", False),
        ("kind < 3", False),
        ("kind != 3", True),
        ("tags < a", False),
        ("tags != a", True),
        ("metrics.loss >= a", False),
        ("metrics = 1", False),
    ],
)
def test_conditions(text, holds):
    assert Where.parse(text)(CARD) is holds


@pytest.mark.parametrize("text", ["", "metrics.return", "> 3", "a b > 3", "metrics.return >", "kind ! skill"])
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match="is no condition: give a field, one of < <= > >= = == != ~ and a value"):
        Where.parse(text)


@given(st.floats(-1e6, 1e6), st.sampled_from(["<", "<=", ">", ">=", "=", "!="]))
def test_numbers_compare_as_in_python(value, sign):
    python = {"=": "=="}.get(sign, sign)
    assert Where.parse(f"metrics.return {sign} {value!r}")(CARD) is eval(f"512.5 {python} {value!r}")


def test_fields():
    assert field(CARD, "metrics.loss") == {"final": 2}
    assert field(CARD, "metrics.loss.final.more") is None
