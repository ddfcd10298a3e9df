"""Random bytes for everything that reads bytes of strangers, led by what they make it do; needs atheris (`pip install skillbank[fuzz]`, Linux).

python -m benchmarks.bank_fuzz                      every parser for a minute; stored in benchmarks/results/bank_fuzz.jsonl
python -m benchmarks.bank_fuzz card --seconds 600   one of them for longer; stores nothing
python -m benchmarks.bank_fuzz --from-results       the stored table

A parser may refuse with a ValueError or a FileNotFoundError, and with nothing else; it ends in seconds; what it reads it writes again and reads as
the same. `tests/test_fuzz.py` asks the same of fewer bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks import stored

RESULTS = Path(__file__).parent / "results" / "bank_fuzz.jsonl"
END = b'\n  "seal": "%s"\n}'
BREAK = b"\0\0"
Check = Callable[[bytes], None]

CARD = b"""{"base": {"fingerprint": null, "hash": "ab", "name": null, "ref": "base@1"}, "conf": {"lora": {"rank": 4}}, "created": "", "data": {},
"files": {"adapter_config.json": {"sha256": "ab", "size": 2}, "adapter_model.safetensors": {"sha256": "ab", "size": 2}}, "format": 1, "hash": "ab",
"kind": "skill", "license": null, "metrics": {"return": 1.5e2}, "notes": "", "parents": [{"hash": "ab", "ref": "walk@1", "weight": 0.5}],
"tags": ["a"], "tools": {"torch": "2"},"""
MOVES = b'{"format": 2, "moves": [{"alias": "best", "protected": false, "version": 1, "when": ""}],'
TOMBSTONE = b'{"format": 1, "hash": "ab", "kind": "skill", "reason": "", "when": "",'
COMPOSITION = b'{"base": {"hash": "ab", "ref": "base@1"}, "gate": null, "merge": {"weights": [1]}, "skills": [{"hash": "ab", "ref": "walk@1"}]}'
CONFIG = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"^c": 1, ".*b": 2}, "alpha_pattern": {"a|b": 1}, "bias": "none"}'
HEADER = (
    b'{"a.lora_A.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, '
    b'"a.lora_B.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [24, 32]}}'
)
SEEDS: Mapping[str, list[bytes]] = {
    "ref": [b"walker/walk@3", b"walk@best", b"@sha256:abcd", b"walk@sha256:ab12"],
    "where": [b"metrics.return > 600", b"tags ~ dmc", b"base.ref = 'walk@1'", b"conf.lora.rank != 4"],
    "card": [CARD],
    "moves": [MOVES, b'{"aliases": {"best": 1}, "format": 1,'],
    "tombstone": [TOMBSTONE],
    "composition": [COMPOSITION],
    "adapter": [CONFIG + BREAK + HEADER + BREAK + b"\0" * 32],
}
"""What fuzzing starts from. What is sealed has its last brace and its seal added."""


def sealed(text: bytes) -> bytes:
    """JSON whose beginning is given, with its seal."""
    return text + END % hashlib.sha256(text + END % (b"0" * 64)).hexdigest().encode()


def checks(folder: Path) -> dict[str, Check]:
    """What is asked of every parser: it refuses what it cannot read by a ValueError, and keeps what it can."""
    return {**_of_texts(), **_of_sealed(), **_of_files(folder)}


def _of_texts() -> dict[str, Check]:
    from skillbank.bank.card import Card
    from skillbank.bank.query import Where
    from skillbank.bank.refs import Ref

    example = Card.from_bytes(sealed(CARD))

    def ref(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        found = Ref.parse(text)
        assert str(found) == text
        assert Ref.parse(str(found)) == found

    def where(data: bytes) -> None:
        assert isinstance(Where.parse(data.decode(errors="surrogateescape"))(example), bool)

    return {"ref": ref, "where": where}


def _of_sealed() -> dict[str, Check]:
    from skillbank.bank.aliases import parse_moves, table, to_bytes
    from skillbank.bank.card import Card
    from skillbank.bank.refs import Ref
    from skillbank.bank.removal import parse_tombstone

    def card(data: bytes) -> None:
        found = Card.from_bytes(data)
        assert Card.from_bytes(found.to_bytes()) == found
        assert all(str(Ref.parse(each)) == each for each in found.stands_on)

    def moves(data: bytes) -> None:
        found = parse_moves(data)
        assert parse_moves(to_bytes(found)) == found
        assert all(Ref("a", each.version).number == each.version for each in table(found).values())

    def tombstone(data: bytes) -> None:
        assert {"kind", "hash", "reason", "when"} < set(parse_tombstone(data))

    def resealed(check: Check) -> Check:
        def run(data: bytes) -> None:
            quiet(check)(data)
            check(sealed(data))

        return run

    return {"card": resealed(card), "moves": resealed(moves), "tombstone": resealed(tombstone)}


def _of_files(folder: Path) -> dict[str, Check]:
    from skillbank.adapter import read_adapter, write_adapter
    from skillbank.bank.records import Composition, read_payload

    def composition(data: bytes) -> None:
        (folder / "composition.json").write_bytes(data)
        assert isinstance(read_payload("composition", folder), Composition)

    def adapter(data: bytes) -> None:
        config, header, tensors = [*data.split(BREAK, 2), b"", b""][:3]
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + tensors)
        found = read_adapter(folder)
        with tempfile.TemporaryDirectory(dir=folder) as again:
            write_adapter(found, again)
            assert read_adapter(again).fingerprint == found.fingerprint

    return {"composition": composition, "adapter": adapter}


def quiet(check: Check) -> Check:
    """The same check, where a refusal is an answer too."""

    def run(data: bytes) -> None:
        with suppress(ValueError, FileNotFoundError):
            check(data)

    return run


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one parser in this process; ends the process."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    with atheris.instrument_imports(include=["skillbank"]):
        check = quiet(checks(folder)[name])
    limits = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=4096", f"-artifact_prefix={folder}/found-", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *limits, f"-max_total_time={seconds}", str(corpus)], check)
    atheris.Fuzz()


def study(name: str, seconds: int) -> dict[str, object]:
    """Row of one parser, fuzzed in a process of its own; what was found is printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.bank_fuzz", name, "--seconds", str(seconds), "--in", folder]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        found = sorted(Path(folder).glob("found-*"))
        runs = re.findall(r"^(?:Done |#)(\d+)", done.stderr, re.MULTILINE)
        for path in found:
            print(name, path.name, path.read_bytes(), done.stderr[-3000:], sep="\n")
        if done.returncode and not found:
            raise SystemExit(done.stderr[-3000:])
        return {"parser": name, "seconds": seconds, "runs": int(runs[-1]), "findings": len(found)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PARSER", help=f"of {', '.join(SEEDS)}; all where none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--from-results", action="store_true", help="print what is stored and run nothing")
    parser.add_argument("--in", type=Path, dest="folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if set(options.names) - set(SEEDS):
        parser.error(f"no parser {' '.join(options.names)}: there is {', '.join(SEEDS)}")
    if options.folder is not None:
        fuzz(options.names[0], options.seconds, options.folder)
    from importlib.util import find_spec

    from skillbank.report import markdown

    if options.from_results:
        rows = stored.load(RESULTS)
    elif find_spec("atheris") is None:
        raise SystemExit("atheris is not installed: pip install 'skillbank[fuzz]' (there are wheels for Linux)")
    else:
        rows = [study(name, options.seconds) for name in options.names or SEEDS]
        if not options.names:
            stored.store(RESULTS, rows)
    print(markdown(rows))
    if any(row["findings"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
