"""`primerisk history import`: both shapes of a file, what is asked about, and what is no file of closes."""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING

import pytest

from app.db import embedded
from tests.flows.process import Home, home

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def place() -> Iterator[Home]:
    """Yield a home whose server runs all the while: the commands join it."""
    with home() as made, embedded.start(made.data):
        yield made


def _file(place: Home, *lines: str, name: str = "closes.csv") -> str:
    file: Path = place.path / name
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def _days(count: int) -> list[str]:
    return [str(date(2024, 1, 1) + timedelta(days=k)) for k in range(count)]


def _words(done: subprocess.CompletedProcess[bytes], start: str) -> list[str]:
    """Return the figures of a line of the table."""
    return next(line.split() for line in done.stdout.decode().splitlines() if line.split()[:1] == [start])


def test_an_import_from_first_to_last(place: Home) -> None:
    wide = ["Date,BTC,ETH", *(f"{d},{100 + k % 3},{'' if k == 4 else 50 + k % 2}" for k, d in enumerate(_days(40)))]
    done = place.run("history", "import", _file(place, *wide))
    assert done.returncode == 0, done.stderr.decode()
    assert _words(done, "BTC") == ["BTC", "40", "0", "0", "0", "0"]
    assert _words(done, "ETH") == ["ETH", "39", "0", "0", "0", "1"]
    assert "ETH: no close from 2024-01-05 to 2024-01-05" in done.stdout.decode()

    again = place.run("history", "import", _file(place, *wide))
    assert (again.returncode, _words(again, "BTC")) == (0, ["BTC", "0", "0", "40", "0", "0"])

    long = ["asset,date,close", "BTC,2024-01-03,103.5", "BTC,2024-02-10,1000", "SOL,2024-01-01,9"]
    asked = place.run("history", "import", _file(place, *long))
    assert asked.returncode == 1
    shown = " ".join(asked.stdout.decode().split())
    assert "close_changed: BTC on 2024-01-03 is stored as 102, and would become 103.5" in shown
    assert "close_off_history: BTC at 1000 on 2024-02-10" in shown
    assert asked.stderr.decode().count("\n") == 1
    assert "2 closes are flagged" in asked.stderr.decode()

    kept = place.run("history", "import", _file(place, *long), "--confirm")
    assert kept.returncode == 0, kept.stderr.decode()
    assert _words(kept, "BTC") == ["BTC", "1", "1", "0", "2", "0"]
    assert _words(kept, "SOL") == ["SOL", "1", "0", "0", "0", "0"]  # it was not stored with what was asked about


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], ["first line"]),
        (["BTC,ETH", "1,2"], ["first line"]),
        (["date"], ["first line"]),
        (["date,BTC,btc", "2024-01-01,1,2"], ["first line"]),
        (["date,BTC", "01/02/2024,1"], ["line 2", "01/02/2024"]),
        (["date,BTC", "2024-02-30,1"], ["line 2", "2024-02-30"]),
        (["date,BTC", "2024-01-01,1", "2024-01-02,x"], ["line 3", "BTC", "'x'"]),
        (["date,BTC", "2024-01-01,NaN"], ["line 2", "NaN"]),
        (["date,BTC", "2024-01-01,1_0"], ["line 2", "1_0"]),
        (["date,BTC", "2024-01-01,1,2"], ["line 2", "3 cells"]),
        (["date,BTC", "2024-01-01,1", "2024-01-01,2"], ["BTC", "2024-01-01", "twice"]),
        (['date,BTC\n"2024-01-01'], ["CSV"]),
    ],
)
def test_what_is_no_file_of_closes(place: Home, lines: list[str], words: list[str]) -> None:
    done = place.run("history", "import", _file(place, *lines))
    said = done.stderr.decode()
    assert (done.returncode, done.stdout, said.count("\n")) == (1, b"", 1), said
    for word in ("closes.csv", *words):
        assert word in said


def test_files_that_can_not_be_read(place: Home) -> None:
    (place.path / "latin.csv").write_bytes(b"date,B\xe9\n")
    for name, word in (("no-such.csv", "No such file"), (".", "directory"), ("latin.csv", "UTF-8")):
        done = place.run("history", "import", str(place.path / name))
        assert (done.returncode, word in done.stderr.decode()) == (1, True), done.stderr.decode()


@pytest.mark.parametrize(("row", "word"), [("2024-01-01,0", "price"), ("2999-01-01,5", "2999-01-01")])
def test_what_is_no_close(place: Home, row: str, word: str) -> None:
    done = place.run("history", "import", _file(place, "date,DOGE", row))
    assert (done.returncode, done.stdout) == (1, b"")
    assert word in done.stderr.decode()
