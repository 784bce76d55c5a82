"""`primerisk report`: every example to a file, with and without history, and what it says of what it can't read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.flows.process import ROOT
from tests.report.pages import Page, closes

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))
PAIR = ROOT / "examples" / "pair.json"


def run(place: Path, *arguments: str, stdin: bytes = b"", **given: str) -> subprocess.CompletedProcess[bytes]:
    """Run `primerisk report` of this tree in a directory, where no settings lie about."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    # one home for all: matplotlib looks for fonts when it finds none noted there, which takes longer than to draw
    environment = kept | {"PYTHONPATH": str(ROOT), "HOME": str(place.parent)} | given
    command = [sys.executable, "-m", "app.cli", "report", *arguments]
    return subprocess.run(
        command, check=False, cwd=place, env=environment, input=stdin, capture_output=True, timeout=120
    )


@pytest.fixture
def history(tmp_path: Path) -> Path:
    found = closes("BTC", "ETH", days=90)
    lines = [f"{day},{found['BTC'][day]:.6f},{found['ETH'][day]:.6f}" for day in found["BTC"]]
    file = tmp_path / "closes.csv"
    file.write_text("\n".join(["date,BTC,ETH", *lines]))
    return file


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_without_history(tmp_path: Path, path: Path) -> None:
    done = run(tmp_path, str(path))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith("report.html: Monte Carlo VaR, ")
    page = Page((tmp_path / "report.html").read_text())
    assert json.loads(path.read_text())["name"] in page.text
    assert len(page.pictures) >= 5


def test_history_and_a_file_of_its_own(tmp_path: Path, history: Path) -> None:
    done = run(tmp_path, str(PAIR), "--history", str(history), "--out", "mine.html")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"mine.html: historical VaR over 89 days, 2024-01-02 to 2024-03-30\n"
    assert "Historical: today's account" in (tmp_path / "mine.html").read_text().replace("&#x27;", "'")


def test_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    body = json.dumps(json.loads(PAIR.read_text()) | {"as_of": "2026-01-01T00:00:00Z"}).encode()
    made = []
    for hashes in ("1", "2"):
        done = run(tmp_path, "-", "--out", f"{hashes}.html", "--seed", "3", stdin=body, PYTHONHASHSEED=hashes)
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / f"{hashes}.html").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "truncated"),
        (b'{"positions":[],"x":1}', "/x"),
        (b'{"positions":[{"symbol":"BTC-PERP","side":"long","size":1}]}', "/positions/0/mark_price"),
    ],
)
def test_what_is_no_portfolio_is_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    done = run(tmp_path, "-", stdin=content)
    said = done.stderr.decode()
    assert (done.returncode, done.stdout, said.count("\n")) == (1, b"", 1), said
    assert word in said
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ("date,BTC\n2024-01-01,0", "a close is above 0"),
        ("date,BTC\n2024-01-01,-3", "a close is above 0"),
        ("date,BTC\nyesterday,3", "no day"),
        ("", "the first line"),
    ],
)
def test_what_is_no_history_is_one_line(tmp_path: Path, lines: str, word: str) -> None:
    file = tmp_path / "closes.csv"
    file.write_text(lines)
    done = run(tmp_path, str(PAIR), "--history", str(file))
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n")) == (1, 1), said
    assert word in said


def test_files_that_can_not_be_read_or_written(tmp_path: Path) -> None:
    for arguments, name in (
        (["no-such.json"], "no-such.json"),
        ([str(PAIR), "--history", "no-such.csv"], "no-such.csv"),
        ([str(PAIR), "--out", "no-such/report.html"], "no-such/report.html"),
    ):
        done = run(tmp_path, *arguments)
        assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1), done.stderr.decode()
        assert name in done.stderr.decode()
