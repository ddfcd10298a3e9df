"""What benchmarks/bank_fuzz.py asks of every parser, asked of some bytes: it refuses by a ValueError, ends, and keeps what it reads."""

import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.bank_fuzz import SEEDS, checks, quiet


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return checks(tmp_path_factory.mktemp("fuzz"))


def test_the_seeds_are_read(parsers):
    for name, seeds in SEEDS.items():
        for seed in seeds:
            parsers[name](seed)


CHUNKS = st.binary(max_size=6) | st.sampled_from(
    [b'"', b"{", b"}", b"[]", b"null", b"true", b"-1", b"1e999", b"NaN", b"\\u0000", b"..", b"@", b"\xff", b"0" * 30, struct.pack("<Q", 2**63)]
)


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(parsers, name, data):
    text = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 8))] = data.draw(CHUNKS)
    quiet(parsers[name])(bytes(text))


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(data=b"")
def test_any_bytes_are_read_or_refused(parsers, name, data):
    quiet(parsers[name])(data)
