"""Who takes part in the demonstration, and the course of its market."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ASSETS = ("BTC", "ETH", "SOL")
OPENING = (60_000.0, 3_000.0, 150.0)
BETA = (0.9, 1.0, 1.1)
"""How far an asset falls where the market falls by one."""
NOISE = 0.0015
LEVELS = ((0.0, 1.0), (0.15, 1.0), (0.40, 0.76), (0.60, 0.77), (0.75, 0.98), (1.0, 0.985))
"""The market's level at parts of its whole time: calm, a crash, the bottom, a rebound, calm again."""

INITIAL_RATE = 0.30
"""Initial margin of the three markets, as a share of notional: how much a utilization buys."""

Plan = Literal["deposits", "reduces", "waits", "sleeps", "is careful", "is short", "lends", "borrows", "leads", "draws"]


@dataclass(frozen=True, slots=True)
class Member:
    """One agent of the fleet: what it does about a call, how far it levers itself up, how long its grace is.

    `grace` and `notice` are shares of the demonstration's time.
    """

    name: str
    plan: Plan
    utilization: float
    grace: float
    notice: float = 0.0
    side: Literal["buy", "sell"] = "buy"


FLEET = (
    Member("Ada", "deposits", 0.70, 0.4),
    Member("Bela", "deposits", 0.66, 0.4),
    Member("Chen", "deposits", 0.73, 0.4, notice=0.03),
    Member("Dora", "reduces", 0.70, 0.4),
    Member("Emil", "reduces", 0.65, 0.4),
    Member("Faye", "waits", 0.68, 0.9),
    Member("Gus", "waits", 0.64, 0.9, notice=0.03),
    Member("Hana", "sleeps", 0.72, 0.12),
    Member("Ivo", "sleeps", 0.68, 0.15),
    Member("June", "sleeps", 0.74, 0.15),
    Member("Kofi", "is careful", 0.35, 0.4),
    Member("Lena", "is short", 0.50, 0.4, side="sell"),
)
LENDER, BORROWER = Member("Mona", "lends", 0.0, 0.4), Member("Nils", "borrows", 0.0, 0.4)
PAYERS = ("Mara", "Otto")
LEADER = Member("Rosa", "leads", 0.0, 0.4)
WALLET = 16_500
"""USDC of the fleet's master: what its members draw at first is within reach, what they draw in the crash is not."""
DRAWERS = (
    (Member("Sven", "draws", 0.0, 0.6), "pooled", 14_000, 0.35),
    (Member("Tara", "draws", 0.0, 0.15), "isolated", 6_000, 0.25),
)
"""Members of a fleet, how they are delegated to, how much, and the bitcoins that they buy with it."""
LENT, PLEDGED = 5_000, 0.104
"""USDC that the one lends the other, and the bitcoins that secure it: a tenth more than they have to."""
REACTION = 0.03
"""How long an agent takes to answer a call, as a share of the demonstration's time."""
GENEROSITY = 2.5
"""What is deposited for each USDC asked for: the market may fall further."""


def market_path(rng: np.random.Generator, ticks: int) -> NDArray[np.float64]:
    """Return the prices of the assets at each tick, USD, shape (ticks, assets): a given course under a little noise."""
    at, level = (np.array(column) for column in zip(*LEVELS, strict=True))
    course = np.interp(np.linspace(0.0, 1.0, ticks), at, level)
    noise = rng.normal(0.0, NOISE, (ticks, len(ASSETS)))
    falls = 1.0 - (1.0 - course)[:, None] * np.array(BETA)
    prices: NDArray[np.float64] = np.array(OPENING) * falls * (1.0 + noise)
    return prices
