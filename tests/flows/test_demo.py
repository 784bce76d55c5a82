"""`primerisk demo` as a process: its story, and that it leaves nothing behind."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from app.demo.fleet import ASSETS, market_path
from tests.flows.process import PRIMERISK, ROOT, START_SECONDS_MAX, Home, home

SECONDS = 10


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@contextmanager
def _shown(place: Home) -> Iterator[subprocess.Popen[str]]:
    """Run the demonstration with its temporary directory in ours, so that what it leaves is found."""
    process = subprocess.Popen(
        [PRIMERISK, "demo", "--seconds", str(SECONDS)],
        cwd=place.path,
        env=place.environment(PYTHONPATH=str(ROOT), TMPDIR=str(place.path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _check_nothing_left(place: Home) -> None:
    assert [process.cmdline() for process in place.servers()] == []
    assert list(place.path.glob("primerisk-demo-*")) == []


def test_the_story_has_every_kind_of_end(place: Home) -> None:
    with _shown(place) as process:
        said, _ = process.communicate(timeout=START_SECONDS_MAX + 3 * SECONDS)
        assert process.returncode == 0, said
    _check_nothing_left(place)
    cured = {how: {line.split()[2] for line in said.splitlines() if f"by {how}" in line and " s  " in line}
             for how in ("a deposit", "the price", "orders of its own")}  # fmt: skip
    assert all(cured.values()), said
    assert len(set.union(*cured.values())) == sum(map(len, cured.values())), "each agent keeps to its plan"
    sleepers = re.findall(r"(\w+) +call expired", said)
    assert sleepers, said
    for name in sleepers:
        told = [word for who, word in re.findall(r"s +(\w+) +([a-z]+(?: [a-z]+)?) ", said) if who == name]
        story = [word for word in told if word in ("margin call", "call expired", "liquidated", "completed")]
        assert story[:3] == ["margin call", "call expired", "liquidated"], said
        assert story[-1] == "completed", said
    lent = re.findall(r"(Mona|Nils) +(lends|borrows) ", said)
    assert {("Mona", "lends"), ("Nils", "borrows")} <= set(lent), said
    assert re.search(r"Rosa +leads +2 members have drawn 13,500.00 of 16,500 USDC", said), said
    assert re.search(r"Rosa +fleet (YELLOW|ORANGE|RED) ", said), said
    assert re.search(r"Sven +margin call ", said), said
    assert said.count("loan is low") == 2, said
    assert said.count("loan is closed") == 2, said
    assert re.search(r"Otto +is paid +10,000.00 USDC, fee 100.00", said), said
    assert re.search(r"20 obligations: 1 payment of 100.00 USDC, 19 payments and 18.90 of fees spared", said), said
    assert re.search(r"\d+ calls: \d+ cured by a deposit, .* liquidated", said)


def test_an_interrupt_leaves_nothing_running(place: Home) -> None:
    with _shown(place) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "market" in line and "BTC" in line:
                break
        assert place.servers() != []
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=START_SECONDS_MAX)
        assert process.returncode == 128 + signal.SIGINT, said
        assert "Traceback" not in said
    _check_nothing_left(place)


def test_the_market_is_drawn_from_its_seed() -> None:
    path = market_path(np.random.default_rng(1), 144)
    assert path.shape == (144, len(ASSETS))
    np.testing.assert_array_equal(path, market_path(np.random.default_rng(1), 144))
    assert not np.array_equal(path, market_path(np.random.default_rng(2), 144))
    # a fall of a fifth and more, and most of the way back
    moves = path / path[0]
    assert (moves.min(axis=0) < 0.80).all()
    assert (moves[-1] > 0.95).all()
