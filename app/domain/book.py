"""An agent's book as stored: settings, holdings, open positions and reservations, and what the risk core reads of it.

Amounts are Decimal; `quote_terms` is where they become floats, by way of `money`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from typing import Literal

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms
from app.domain.money import to_float
from app.domain.moves import Move, net_changes
from app.domain.parameters import HealthPolicy, MarginMode, MarketParameters
from app.domain.prices import PriceFinder, StoredPrice
from app.domain.quote import QuoteTerms
from app.domain.terms import PositionTerms

Side = Literal["long", "short"]
PositionMode = Literal["pooled", "isolated"]
Execution = Literal["book", "venue"]
LadderMode = Literal["off", "notify", "apply"]

ZERO = Decimal(0)

MINIMUM_VIABLE = 4
"""The last rung of the drawdown ladder, on which nothing is opened."""

THRESHOLDS = (
    "target_utilization",
    "gate_utilization",
    "breach_utilization",
    "cure_utilization",
    "stop_utilization",
    "shortfall_utilization",
)
"""Levels of utilization that an account may set for itself, no looser than the market's."""


@dataclass(frozen=True, slots=True)
class AccountSettings:
    """What an agent chose for its account; a threshold left None is the market's."""

    margin_mode: MarginMode = "cross"
    execution: Execution = "book"
    auto_liquidate: bool = True
    notice_delay_seconds: int = 0
    grace_period_seconds: int = 300
    trailing_stop: float | None = None
    drawdown_ladder: LadderMode = "off"
    target_utilization: float | None = None
    gate_utilization: float | None = None
    breach_utilization: float | None = None
    cure_utilization: float | None = None
    stop_utilization: float | None = None
    shortfall_utilization: float | None = None

    @property
    def follows_peak(self) -> bool:
        """Whether the account's highest equity is followed, for its trailing stop or its drawdown ladder."""
        return self.trailing_stop is not None or self.drawdown_ladder != "off"

    def policy(self, market: HealthPolicy) -> HealthPolicy:
        """Return the market's policy with this account's own levels where they are stricter."""
        own = {name: value for name in THRESHOLDS if (value := getattr(self, name)) is not None}
        if not own:
            return market
        return replace(market, **{name: min(value, getattr(market, name)) for name, value in own.items()})


@dataclass(frozen=True, slots=True)
class Holding:
    """Units of one asset by bucket, each >= 0. `owed` and `borrowed` are debts, not part of what is held."""

    free: Decimal = ZERO
    reserved: Decimal = ZERO
    allocated: Decimal = ZERO
    owed: Decimal = ZERO
    offered: Decimal = ZERO
    lent: Decimal = ZERO
    pledged: Decimal = ZERO
    borrowed: Decimal = ZERO

    @property
    def held(self) -> Decimal:
        """All units held, whatever they are kept for, those on loan included."""
        return self.free + self.reserved + self.allocated + self.offered + self.lent + self.pledged

    @property
    def debt(self) -> Decimal:
        """All units owed, to the house and to lenders."""
        return self.owed + self.borrowed

    @property
    def own(self) -> Decimal:
        """Units held less those owed; below zero where more is owed."""
        return self.held - self.debt


@dataclass(frozen=True, slots=True)
class OpenPosition:
    """An open linear position; `entry_price` is its average, `allocated` its own collateral where isolated."""

    id: str
    symbol: str
    side: Side
    size: Decimal
    entry_price: Decimal
    leverage: Decimal | None
    margin_mode: PositionMode
    allocated: Decimal
    realized_pnl: Decimal
    reducible: bool
    opened_at: datetime


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """What a service holds of an agent's wallet; `remaining` of `amount` is neither settled nor released."""

    id: str
    service: str
    asset: str
    amount: Decimal
    remaining: Decimal
    settled: Decimal
    reference: str | None
    reducible: bool
    created_at: datetime
    bound_to: str | None = None
    """The contract that alone may use it."""


@dataclass(frozen=True, slots=True)
class PendingOrder:
    """An order that waits for fills of its venue; `remaining` contracts are still to come.

    `margin_call_id` names the call that asked for it; None: the agent's own.
    """

    id: str
    symbol: str
    side: Literal["buy", "sell"]
    remaining: Decimal
    reduce_only: bool
    leverage: Decimal | None
    margin_mode: PositionMode | None
    margin_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class LentLoan:
    """A loan to another agent that can be had back within a day: units, notice in seconds.

    `asked_back`: all of it is recalled, or about to be.
    """

    id: str
    asset: str
    principal: Decimal
    notice_seconds: int
    asked_back: bool


PAYING_SERVICES = ("escrow", "lending", "netting")
"""What may end with money in another's hands: a member of a fleet has to be permitted each of them by name."""


@dataclass(frozen=True, slots=True)
class Delegation:
    """What a member of a fleet may use of its master's wallet, USDC: `drawn` so far, of at most `max_margin`."""

    fleet_id: str
    master_id: str
    max_margin: Decimal
    drawn: Decimal
    services: Sequence[str]
    """Those that it may book for; none: every one that pays nobody else."""
    reduce_only: bool
    delegation: Literal["pooled", "isolated"]
    fleet_call: str | None = None
    """The state of the margin call that the fleet as one is under."""
    fleet_in_doubt: bool = False
    """Whether that waits for prices."""
    fleet_call_is_spent: bool = False
    """Whether it has sold all that it will: it goes on, and holds nobody back any more."""

    @property
    def is_pooled(self) -> bool:
        """Whether the member is part of its fleet's pool; else it is contained."""
        return self.delegation == "pooled"

    @property
    def waits_for_fleet(self) -> bool:
        """Whether a call of the fleet's decides what of the member is sold, in place of the member's own.

        One that stays expired has a master that is not liquidated: its members are by themselves. So they are while the
        pool can't be judged: a stale price of one holds up no other.
        """
        return self.is_pooled and self.fleet_call in ("noticed", "open", "liquidating") and not self.fleet_in_doubt

    @property
    def opens_nothing(self) -> bool:
        """Whether the fleet's call has run out: what would be opened now would be sold again."""
        return self.is_pooled and self.fleet_call in ("expired", "liquidating")

    def permits(self, service: str) -> bool:
        """Whether the member may book for a service."""
        return permits(self.services, service)


def permits(services: Sequence[str], service: str) -> bool:
    """Whether a list of permitted services has this one; an empty one has all that pay nobody else."""
    return service in services if services else service not in PAYING_SERVICES


@dataclass(frozen=True, slots=True)
class Book:
    """Everything that an agent's margin depends on, but for the market."""

    agent_id: str
    settings: AccountSettings
    version: int
    holdings: Mapping[str, Holding]
    positions: Sequence[OpenPosition]
    reservations: Sequence[OpenReservation]
    live_call: str | None = None
    """The state of the margin call that the account is under, as the book was read."""
    rung: int = 0
    """The rung of the drawdown ladder that was last told."""
    pending: Sequence[PendingOrder] = ()
    """Orders at a venue, oldest first. They weigh on what the gates allow, not on the account's own figures."""
    loans: Sequence[LentLoan] = ()
    """What a margin call would recall first."""
    delegation: Delegation | None = None
    """What the agent has of a fleet, where it is a member of one."""
    leads: str | None = None
    """The fleet whose master it is."""
    live_cause: str | None = None
    """What the margin call was made for that the account is under."""

    def holding(self, asset: str) -> Holding:
        """Return the units of an asset, none where it is not held."""
        return self.holdings.get(asset, _NOTHING)

    def position(self, symbol: str) -> OpenPosition | None:
        """Return the open position in a symbol."""
        return next((p for p in self.positions if p.symbol == symbol), None)

    @property
    def opens_nothing(self) -> str | None:
        """Why the account may only reduce, whatever it is worth; None where it may open."""
        if self.live_call in ("expired", "liquidating"):
            return "a margin call has expired: reduce only until it is cured"
        if self.rung == MINIMUM_VIABLE and self.settings.drawdown_ladder == "apply":
            return "equity has fallen too far from its peak: reduce only, on the last rung of the drawdown ladder"
        if self.delegation is not None and self.delegation.reduce_only:
            return "the fleet's coordinator has it reduce only: more is drawn than is delegated"
        if self.delegation is not None and self.delegation.opens_nothing:
            return "the fleet's margin call has expired: reduce only until it is cured"
        return None

    @property
    def is_in_called_pool(self) -> bool:
        """Whether the account is in a fleet's pool that is under a margin call, and held in it: a master always is.

        Members are not by a call that is spent: it would hold what is their own for as long as nobody cures it.
        """
        of = self.delegation
        if self.leads is not None:
            return self.live_cause == "fleet"
        return of is not None and of.is_pooled and of.fleet_call is not None and not of.fleet_call_is_spent

    @property
    def is_leveraged(self) -> bool:
        """Whether anything is open, about to open or owed, so that its prices decide what may be spent."""
        waits = any(not order.reduce_only for order in self.pending)
        return bool(self.positions) or waits or any(h.debt > 0 for h in self.holdings.values())

    def requested(self, call_id: str) -> list[PendingOrder]:
        """Return the liquidation orders of a call that wait for fills."""
        return [order for order in self.pending if order.margin_call_id == call_id]

    def without_pending(self, ids: Collection[str]) -> Book:
        """Return the book without these orders."""
        return replace(self, pending=[order for order in self.pending if order.id not in ids])

    def after_moves(self, moves: Sequence[Move]) -> Book:
        """Return the book after moves that concern this agent, as the ledger would leave it."""
        holdings = dict(self.holdings)
        for (owner, asset, bucket), change in net_changes(moves).items():
            if owner == self.agent_id:
                known = holdings.get(asset, _NOTHING)
                holdings[asset] = replace(known, **{bucket: getattr(known, bucket) + change})
        return replace(self, holdings=holdings)

    def with_position(self, before: OpenPosition | None, after: OpenPosition | None) -> Book:
        """Return the book with one position replaced, removed (None after) or added (None before)."""
        kept = [p for p in self.positions if before is None or p.id != before.id]
        return replace(self, positions=kept if after is None else [*kept, after])

    def bound(self, contract: str, asset: str) -> OpenReservation | None:
        """Return what a contract holds of an asset."""
        return next((r for r in self.reservations if r.bound_to == contract and r.asset == asset), None)

    def with_reservation(self, reservation: OpenReservation) -> Book:
        """Return the book with one reservation added, or replaced by id; gone where nothing remains."""
        kept = [r for r in self.reservations if r.id != reservation.id]
        return replace(self, reservations=[*kept, reservation] if reservation.remaining > 0 else kept)

    def quote_terms(self, parameters: MarketParameters, stored: Mapping[str, StoredPrice]) -> QuoteTerms:
        """Return what the risk core assesses. Raises InvalidError for a reserved asset without a price."""
        return QuoteTerms(
            positions=position_terms(self.positions),
            margin=MarginTerms(parameters=self._parameters(parameters)),
            collateral=[
                CollateralTerms(a, to_float(h.held), lent=to_float(h.lent))
                for a, h in self.holdings.items()
                if h.held > 0
            ],
            liabilities=[CollateralTerms(a, to_float(h.debt)) for a, h in self.holdings.items() if h.debt > 0],
            margin_mode=self.settings.margin_mode,
            reserved=reserved_value(self.reservations, parameters, stored),
        )

    def _parameters(self, parameters: MarketParameters) -> MarketParameters:
        policy = self.settings.policy(parameters.policy)
        if policy is parameters.policy:
            return parameters
        return parameters.remembered(("policy", policy), lambda: replace(parameters, policy=policy))


_NOTHING = Holding()


def reserved_value(
    reservations: Sequence[OpenReservation], parameters: MarketParameters, stored: Mapping[str, StoredPrice]
) -> float:
    """Return what reservations require, USD: the collateral value of what they hold, after haircut."""
    return sum(reserved_by_asset(reservations, parameters, stored).values())


def reserved_by_asset(
    reservations: Sequence[OpenReservation], parameters: MarketParameters, stored: Mapping[str, StoredPrice]
) -> dict[str, float]:
    """Return what reservations of each asset require, USD, as `reserved_value` adds it up."""
    prices = PriceFinder(parameters, {}, stored)
    found: dict[str, float] = {}
    for r in reservations:
        price = prices.asset(r.asset, "/market/prices")
        worth = to_float(r.remaining) * price * (1.0 - parameters.asset(r.asset).haircut)
        found[r.asset] = found.get(r.asset, 0.0) + worth
    return found


_COLUMNS = tuple(field.name for field in fields(PositionTerms))


def position_terms(positions: Sequence[OpenPosition]) -> PositionTerms:
    """Return positions as the columns that the risk core reads; marks are left to the market."""
    nothing = (None,) * len(positions)
    columns: dict[str, Sequence[object]] = dict.fromkeys(_COLUMNS, nothing)
    columns["symbol"] = [p.symbol for p in positions]
    columns["side"] = [p.side for p in positions]
    columns["size"] = [to_float(p.size) for p in positions]
    columns["entry_price"] = [to_float(p.entry_price) for p in positions]
    columns["leverage"] = [None if p.leverage is None else to_float(p.leverage) for p in positions]
    if any(p.margin_mode == "isolated" for p in positions):
        columns["margin_mode"] = ["isolated" if p.margin_mode == "isolated" else None for p in positions]
        columns["allocated_collateral"] = [
            to_float(p.allocated) if p.margin_mode == "isolated" else None for p in positions
        ]
    return PositionTerms(**columns)  # type: ignore[arg-type]
