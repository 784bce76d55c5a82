"""Loans of an asset from one agent to another: what they cost, what secures them, and what is due next. Pure.

Rates are simple annual ones on principal, never compounded, accrued by the microsecond on actual/365. What has accrued
is kept undivided, as principal x rate x microseconds, which is exact; it is divided and rounded up, to the asset's last
digit, only to be charged, and what was charged before is taken off: any split into steps comes to the same total.
Amounts and rates are Decimal; source: docs/lending.md, "Lending".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from app.domain.book import ZERO, LentLoan
from app.domain.money import DECIMALS_MAX, round_owed, round_owned, to_decimal, to_float
from app.domain.parameters import LendingParameters

RateKind = Literal["floating", "fixed"]
LoanStatus = Literal["active", "recalled", "returned", "liquidated"]

LIVE: tuple[LoanStatus, ...] = ("active", "recalled")
RATE_DECIMALS = 8
"""Of a rate as a fraction; the curve's is rounded up to them."""
INTEREST_EVERY = timedelta(days=1)
NOTICE_MAX = timedelta(days=7)
NOTICE_DEFAULT = timedelta(hours=24)
CALL_NOTICE_MAX = timedelta(hours=24)
"""Loans with a longer notice are not recalled by a margin call."""
RETRY = timedelta(seconds=1)
"""When a loan is looked at again that waits for a fresh price."""
LOW_CLEARED = Decimal("0.01")
"""How far above the warning's level the ratio has to be before the next warning."""

_MICROSECOND = timedelta(microseconds=1)
_YEAR = Decimal(timedelta(days=365) // _MICROSECOND)


# --- rates


def utilization(supplied: Decimal, borrowed: Decimal) -> Decimal:
    """Return the share of what is supplied, lent or still on offer, that is borrowed; 0 where nothing is supplied."""
    return ZERO if supplied == 0 else borrowed / supplied


def curve_rate(used: Decimal, terms: LendingParameters) -> Decimal:
    """Return the borrow rate at a utilization in [0, 1], on two slopes, rounded up to RATE_DECIMALS."""
    base, slope, steep = to_decimal(terms.base_rate), to_decimal(terms.slope), to_decimal(terms.steep_slope)
    target = to_decimal(terms.target_utilization)
    rate = base + slope * min(used, target) / target + steep * max(ZERO, used - target) / (1 - target)
    return rate.quantize(Decimal(1).scaleb(-RATE_DECIMALS), ROUND_CEILING)


@dataclass(frozen=True, slots=True)
class RateChange:
    """The curve's rate of an asset from a moment on."""

    at: datetime
    rate: Decimal


def accrued_units(
    principal: Decimal, changes: Sequence[RateChange], floor: Decimal, since: datetime, until: datetime
) -> Decimal:
    """Return principal x rate x microseconds over [since, until), at each change's rate or the floor if that is more.

    `changes` are in the order of their times; before the first, its rate holds. Nothing accrues backwards.
    """
    total = ZERO
    for k, change in enumerate(changes):
        start = since if k == 0 else max(since, change.at)
        end = min(until, changes[k + 1].at) if k + 1 < len(changes) else until
        if end > start:
            total += max(change.rate, floor) * ((end - start) // _MICROSECOND)
    return principal * total


def interest_of(units: Decimal, decimals: int) -> Decimal:
    """Return what accrued units come to, rounded up to the asset's last digit."""
    whole, rest = divmod(units.scaleb(decimals), _YEAR)
    return (whole + (rest > 0)).scaleb(-decimals)


def interest_for(principal: Decimal, rate: Decimal, time: timedelta, decimals: int) -> Decimal:
    """Return the interest of a loan over a time at one rate, rounded up to the asset's last digit."""
    return interest_of(principal * rate * (time // _MICROSECOND), decimals)


# --- what secures a loan


@dataclass(frozen=True, slots=True)
class Prices:
    """USD a unit of the borrowed asset and of the collateral, and the share of the latter that counts, in (0, 1]."""

    asset: Decimal
    collateral: Decimal
    kept: Decimal

    def ratio(self, collateral: Decimal, debt: Decimal) -> Decimal:
        """Return the value of collateral after haircut over that of a debt > 0."""
        return collateral * self.collateral * self.kept / (debt * self.asset)

    def needed(self, debt: Decimal, ratio: Decimal) -> Decimal:
        """Return the units of collateral that secure a debt at a ratio, rounded up."""
        return round_owed(debt * self.asset * ratio / (self.collateral * self.kept), DECIMALS_MAX)


@dataclass(frozen=True, slots=True)
class Purchase:
    """Collateral sold for units of the borrowed asset; `missing` of them it did not pay for."""

    sold: Decimal
    bought: Decimal
    missing: Decimal


def purchase(wanted: Decimal, collateral: Decimal, prices: Prices, slippage: Decimal, decimals: int) -> Purchase:
    """Return what of the collateral is sold, at its mark less the slippage, to have `wanted` units at theirs.

    All of it where that is not enough: what is bought is then rounded down, what is missing thus up.
    """
    received = prices.collateral * (1 - slippage)
    sold = round_owed(wanted * prices.asset / received, DECIMALS_MAX)
    if sold <= collateral:
        return Purchase(sold, wanted, ZERO)
    bought = min(wanted, round_owned(collateral * received / prices.asset, decimals))
    return Purchase(collateral, bought, wanted - bought)


# --- matching


@dataclass(frozen=True, slots=True)
class OpenOffer:
    """Units that a lender offers, at no less than a rate, to be had back after a notice; `seq` is its place in time."""

    id: str
    seq: int
    lender_id: str
    asset: str
    remaining: Decimal
    minimum_rate: Decimal
    notice_seconds: int


@dataclass(frozen=True, slots=True)
class Match:
    """So much of an offer."""

    offer: OpenOffer
    amount: Decimal


def match(offers: Sequence[OpenOffer], amount: Decimal) -> list[Match]:
    """Return what is taken of which offers, cheapest first, of equals the oldest; less than the amount if need be."""
    found: list[Match] = []
    left = amount
    for offer in sorted(offers, key=lambda o: (o.minimum_rate, o.seq)):
        if left == 0:
            break
        part = min(left, offer.remaining)
        found.append(Match(offer, part))
        left -= part
    return found


def shared_out(total: Decimal, parts: Sequence[Decimal]) -> list[Decimal]:
    """Return a total > 0 shared out in proportion to parts > 0; the last takes what rounding leaves."""
    whole = sum(parts, ZERO)
    shares = [round_owned(total * part / whole, DECIMALS_MAX) for part in parts[:-1]]
    return [*shares, total - sum(shares, ZERO)]


def recalls_for(loans: Sequence[LentLoan], prices: Mapping[str, float], shortfall: float) -> list[LentLoan]:
    """Return the loans to recall: by value smallest first, until together they are worth the shortfall, USD.

    Those that were asked back before count first. `prices` are of all their assets.
    """
    worth = {loan.id: to_float(loan.principal) * prices[loan.asset] for loan in loans}
    shortfall -= sum(worth[loan.id] for loan in loans if loan.asked_back)
    chosen: list[LentLoan] = []
    for loan in sorted(loans, key=lambda loan: (worth[loan.id], loan.id)):
        if shortfall <= 0.0:
            break
        if loan.asked_back:
            continue
        chosen.append(loan)
        shortfall -= worth[loan.id]
    return chosen


# --- what is due


@dataclass(frozen=True, slots=True)
class Situation:
    """What the next step hangs on. `ratio` is None where a price is missing or stale: nothing is sold then."""

    ratio: Decimal | None
    is_low: bool
    due_at: datetime | None
    next_interest_at: datetime
    is_wanted_back: bool = False
    """Whether a margin call of the lender wants it back, and not all of it is recalled yet."""


Step = Literal["liquidate", "buy in", "recall", "pay interest", "warn", "note well"]


def next_step(loan: Situation, terms: LendingParameters, now: datetime) -> Step | None:  # noqa: PLR0911  one a step
    """Return what is due of a live loan at its figures, the gravest first; None: nothing."""
    low = to_decimal(terms.low_ratio)
    if loan.ratio is not None:
        if loan.ratio < to_decimal(terms.liquidation_ratio):
            return "liquidate" if loan.is_low else "warn"  # both in one decision, where the price leaves no time
        if loan.due_at is not None and loan.due_at <= now:
            return "buy in"
    if loan.is_wanted_back:
        return "recall"
    if loan.next_interest_at <= now:
        return "pay interest"
    if loan.ratio is not None and not loan.is_low and loan.ratio < low:
        return "warn"
    if loan.ratio is not None and loan.is_low and loan.ratio >= low + LOW_CLEARED:
        return "note well"
    return None


def next_look(loan: Situation, now: datetime) -> datetime:
    """Return when a loan of which nothing is due now is to be looked at again, whatever becomes of prices."""
    if loan.due_at is None:
        return loan.next_interest_at
    if loan.due_at <= now:  # it waits for a price
        return now + RETRY
    return min(loan.next_interest_at, loan.due_at)


def next_interest(since: datetime, now: datetime) -> datetime:
    """Return the first moment after `now` at which interest is paid, every INTEREST_EVERY after `since`."""
    return since + ((now - since) // INTEREST_EVERY + 1) * INTEREST_EVERY
