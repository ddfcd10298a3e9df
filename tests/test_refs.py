"""References: parse and str are inverses, and what is no reference is refused by name."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank.bank.refs import Ref, UnknownRef
from skillbank.words import did_you_mean

words = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True).filter(lambda word: not word.isdigit())
names = st.lists(words, min_size=1, max_size=3).map("/".join)
prefixes = st.from_regex(r"sha256:[0-9a-f]{4,64}", fullmatch=True)
refs = st.one_of(
    st.builds(Ref, names, st.one_of(st.none(), st.integers(1, 999_999_999), words, prefixes)),
    st.builds(Ref, st.just(""), prefixes),
)


@settings(max_examples=60, deadline=None)
@given(refs)
def test_parse_inverts_str(ref):
    assert Ref.parse(str(ref)) == ref
    assert Ref.parse(ref) is ref


@settings(deadline=None)
@given(st.text(alphabet="ab/@.:-_019AsSh256é ", max_size=20))
def test_str_inverts_parse_and_the_rest_is_refused(text):
    try:
        ref = Ref.parse(text)
    except ValueError:
        return
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    ["", "a/", "/a", "a//b", "../a", "a/..", ".a", "Walker", "walker/3", "3", "a b", "a\x00", "a" * 201, "walker/aliases.json", "wälker", "a."],
)
def test_bad_names(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) if len(text) <= 200 else "has 201 characters"):
        Ref.parse(text)


@pytest.mark.parametrize("text", ["a@", "a@0", "a@03", "a@-1", "a@sha256:xyz", "a@sha256:ab", "a@Best", "a@b@c", "@3", "@best", "a@1234567890"])
def test_bad_versions(text):
    with pytest.raises(ValueError, match=re.escape(text.partition("@")[2] or "'a@'") if text[0] != "@" else "''"):
        Ref.parse(text)


def test_exact():
    assert Ref("a", 3).number == 3
    assert repr(Ref("a/b", 3)) == "Ref('a/b@3')"
    with pytest.raises(ValueError, match="'a@best' is not exact"):
        _ = Ref("a", "best").number
    with pytest.raises(ValueError, match="version 0 of 'a'"):
        Ref("a", 0)


def test_did_you_mean():
    assert did_you_mean("walker/wlak", ["walker/walk", "hopper/hop"]) == "did you mean 'walker/walk'?"
    assert did_you_mean("x", ["walker/walk"]) == "there is 'walker/walk'"
    assert did_you_mean("x", []) == "there is none yet"
    assert str(UnknownRef("no 'x'")) == "no 'x'"
