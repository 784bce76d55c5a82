"""`primerisk quote`: every example, every way in, and what it says of a file that is no portfolio."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.flows.process import ROOT, Home, home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


@pytest.fixture(scope="module")
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def test_there_are_examples() -> None:
    assert "pair.json" in [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example(place: Home, path: Path) -> None:
    shown = place.run("quote", str(path))
    assert (shown.returncode, shown.stderr) == (0, b"")
    for word in ("equity", "margin by model", "health", "positions", "liquidation", "parameters: version 0"):
        assert word in shown.stdout.decode()
    reply = json.loads(place.run("quote", "--json", str(path)).stdout)
    assert len(reply["positions"]) == len(json.loads(path.read_text())["positions"])


def test_every_way_in(place: Home) -> None:
    path = ROOT / "examples" / "pair.json"
    reply = json.loads(place.run("quote", "--json", str(path)).stdout)
    piped = json.loads(place.run("quote", "-", "--json", stdin=path.read_bytes()).stdout)
    assert piped.keys() == reply.keys()
    assert piped["models"].keys() == reply["models"].keys()
    assert piped["equity"] == pytest.approx(reply["equity"])  # options lose value between the two


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "truncated"),
        (b'{"positions":[],"x":1}', "/x"),
        (b'{"positions":[{"symbol":"BTC-PERP","side":"long","size":NaN}]}', "/positions/0/size"),
        (b'{"positions":[{"symbol":"BTC-PERP","side":"long","size":1}]}', "/positions/0/mark_price"),
        (b'{"positions":[],"name":"\xff"}', ""),
    ],
)
def test_what_is_no_portfolio_is_one_line(place: Home, content: bytes, word: str) -> None:
    file = place.path / "body.json"
    file.write_bytes(content)
    done = place.run("quote", str(file))
    said = done.stderr.decode()
    assert (done.returncode, done.stdout, said.count("\n")) == (1, b"", 1), said
    assert word in said


def test_files_that_can_not_be_read(place: Home) -> None:
    for name in ("no-such.json", ".", "/dev/zero"):
        done = place.run("quote", name)
        assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1), done.stderr.decode()
        assert name in done.stderr.decode()
