"""The lines of the README and of its pages, as they stand, in a shell, against a real server."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.flows.process import Serving, home, serving
from tests.manual import PAGES, README, shell_lines

WHERE = "API=http://127.0.0.1:8000/api; ADMIN='Authorization: Bearer pr_…'\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with home() as place, serving(place, PRIMERISK_PORT="0") as running:
        yield running


def said_by(served: Serving, lines: str) -> str:
    """Return what the lines print. Fails where one does, or where a reply is a problem."""
    lines = lines.replace("http://127.0.0.1:8000", served.greeting.address).replace("pr_…", served.greeting.key)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "problem" not in done.stdout, done.stdout
    assert '"status":4' not in done.stdout, done.stdout
    return done.stdout


def test_a_day_of_an_agent(served: Serving) -> None:
    said = said_by(served, shell_lines(README, "API="))
    assert '"equity":20000' in said
    assert '"utilization":0.50' in said  # 30,500 at a third, of 20,000


def test_deribit_and_paradex(served: Serving) -> None:
    said = said_by(served, shell_lines(PAGES["quotes"].partition("### Deribit")[2]))
    assert '"initial_margin_coin":0.12286134' in said
    said = said_by(served, shell_lines(PAGES["quotes"].partition("### Paradex")[2]))
    assert '"initial_margin":11221' in said
    assert '"maintenance_margin":5621' in said


def test_okx_and_derive(served: Serving) -> None:
    said = said_by(served, shell_lines(PAGES["quotes"].partition("### OKX")[2]))
    assert '"maintenance_margin":1208.82073' in said
    said = said_by(served, shell_lines(PAGES["quotes"].partition("### Derive")[2]))
    assert '"net_initial":-608' in said


def test_an_agents_book(served: Serving) -> None:
    said = said_by(served, shell_lines(PAGES["book"], "API="))
    assert '"accepted":true' in said


def test_lending(served: Serving) -> None:
    said = said_by(served, WHERE + shell_lines(PAGES["lending"]))
    assert '"lent":200' in said


def test_a_fleet(served: Serving) -> None:
    said = said_by(served, WHERE + shell_lines(PAGES["fleets"]))
    assert '"available":80000' in said  # of 100,000, 15,000 are dry powder and 5,000 drawn


def test_clearing(served: Serving) -> None:
    said = said_by(served, shell_lines(PAGES["clearing"]))
    assert re.findall(r'"state":"(\w+)"', said) == ["accepted", "released", "active", "open", "active", "open"], said
    assert '"fee":100' in said
    assert '"movements_saved":0' in said
    assert '"outcome":"settled"' in said
