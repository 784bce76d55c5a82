"""Stored offers, loans and the rates of their markets: the only writer of these tables. What moves is up to `lending`.

Locks are taken in one order: accounts by their ids, then the asset's market (of several, by name), then offers and
loans. Who holds the accounts of both parties and the market may change a loan; who names accounts alone holds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    ScalarSelect,
    Select,
    Text,
    bindparam,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from app.db.lending_tables import lending_markets, lending_rates, loan_offers, loans
from app.db.session import Tx
from app.domain.book import ZERO
from app.domain.lending import (
    LIVE,
    LOW_CLEARED,
    LoanStatus,
    OpenOffer,
    RateChange,
    RateKind,
    accrued_units,
    curve_rate,
    interest_of,
    utilization,
)
from app.domain.parameters import LendingParameters
from app.errors import NotFoundError
from app.services import shards

LOANS_A_PAGE_MAX = 200
LOANS_AN_OFFER_MAX = 100
"""Live loans of one offer: all of them are recalled in one transaction."""
LOANS_OF_OFFERS_MAX = 500
"""Live loans of the offers on one page, more than one offer has: a page is made in a moment."""
LOANS_OF_ONE_MAX = 20
"""Those of them that one borrower has: nobody closes an offer to others by many loans of a trifle."""


@dataclass(frozen=True, slots=True)
class Market:
    """What of an asset is lent or on offer, what of it is borrowed, and the curve's rate at that."""

    asset: str
    supplied: Decimal
    borrowed: Decimal
    rate: Decimal
    changed_at: datetime

    @property
    def utilization(self) -> Decimal:
        """The share of what is supplied that is borrowed."""
        return utilization(self.supplied, self.borrowed)


@dataclass(frozen=True, slots=True)
class Offer:
    """A stored offer; `remaining` of its amount is neither lent nor withdrawn."""

    id: str
    seq: int
    lender_id: str
    asset: str
    amount: Decimal
    remaining: Decimal
    minimum_rate: Decimal
    notice_seconds: int
    created_at: datetime
    withdrawn_at: datetime | None


@dataclass(frozen=True, slots=True)
class Loan:
    """A stored loan. `rate` is the fixed one, or the floor of a floating one; interest is in units of the asset."""

    id: str
    seq: int
    offer_id: str
    lender_id: str
    borrower_id: str
    asset: str
    amount: Decimal
    principal: Decimal
    rate_kind: RateKind
    rate: Decimal
    notice_seconds: int
    collateral_asset: str
    collateral: Decimal
    accrued: Decimal
    accrued_to: datetime
    interest_paid: Decimal
    interest_booked: Decimal
    next_interest_at: datetime
    is_low: bool
    recalled: Decimal
    recalled_at: datetime | None
    due_at: datetime | None
    wanted_by: str | None
    status: LoanStatus
    deficit: Decimal
    opened_at: datetime
    closed_at: datetime | None
    next_action_at: datetime | None

    @property
    def is_live(self) -> bool:
        """Whether it is neither returned nor liquidated."""
        return self.status in LIVE

    def accrue(self, changes: Sequence[RateChange], until: datetime) -> Loan:
        """Return the loan with what accrues until a moment, at these rates of its market from `accrued_to` on."""
        if not self.is_live or until <= self.accrued_to:
            return self
        fixed = self.rate_kind == "fixed"
        rates = [RateChange(self.accrued_to, self.rate)] if fixed else changes
        more = accrued_units(self.principal, rates, ZERO if fixed else self.rate, self.accrued_to, until)
        return replace(self, accrued=self.accrued + more, accrued_to=until)

    def interest(self, decimals: int) -> Decimal:
        """Return the interest that has accrued and is not paid."""
        return max(self.interest_booked, interest_of(self.accrued, decimals) - self.interest_paid)

    def rate_at(self, curve: Decimal) -> Decimal:
        """Return the rate that the loan bears where the curve's is this."""
        return self.rate if self.rate_kind == "fixed" else max(self.rate, curve)


# --- markets


async def lock_market(tx: Tx, asset: str) -> Market | None:
    """Lock the market of an asset and return it, None where there is none."""
    query = select(lending_markets).where(lending_markets.c.asset == asset).with_for_update()
    row = (await tx.connection.execute(query)).mappings().first()
    return None if row is None else Market(**row)


async def open_market(tx: Tx, asset: str, terms: LendingParameters, now: datetime) -> Market:
    """Open the market of an asset, unless another has done so meanwhile, and return it locked."""
    new = {"asset": asset, "supplied": ZERO, "borrowed": ZERO, "rate": curve_rate(ZERO, terms), "changed_at": now}
    made = await tx.connection.execute(upsert(lending_markets).values(new).on_conflict_do_nothing())
    if made.rowcount:
        await tx.connection.execute(insert(lending_rates).values(new))
    query = select(lending_markets).where(lending_markets.c.asset == asset).with_for_update()
    return Market(**(await tx.connection.execute(query)).mappings().one())


async def change_market(
    tx: Tx, market: Market, terms: LendingParameters, supplied: Decimal, borrowed: Decimal, now: datetime
) -> Market:
    """Add to what is supplied and borrowed in a locked market; from now on its rate is the curve's at that."""
    supplied, borrowed = market.supplied + supplied, market.borrowed + borrowed
    rate = curve_rate(utilization(supplied, borrowed), terms)
    after = Market(market.asset, supplied, borrowed, rate, max(now, market.changed_at))
    statement = update(lending_markets).where(lending_markets.c.asset == market.asset)
    await tx.connection.execute(statement.values(asdict(after)))
    if rate != market.rate:
        await tx.connection.execute(insert(lending_rates).values(asdict(after)))
    return after


async def list_markets(tx: Tx, limit: int, asset: str | None = None, after: str = "") -> list[Market]:
    """Return the markets by the name of their asset, past the name `after`."""
    columns = lending_markets.c
    query = select(lending_markets).where(columns.asset > after).order_by(columns.asset).limit(limit)
    query = query if asset is None else query.where(columns.asset == asset)
    return [Market(**row) for row in (await tx.connection.execute(query)).mappings()]


async def markets_of(tx: Tx, assets: Collection[str]) -> list[Market]:
    """Return the markets of some assets, those that there are."""
    query = select(lending_markets).where(lending_markets.c.asset.in_(assets))
    return [Market(**row) for row in (await tx.connection.execute(query)).mappings()] if assets else []


async def rate_changes(tx: Tx, asset: str, since: datetime) -> list[RateChange]:
    """Return the rates of a market from the one in force at a moment on, in their order."""
    columns = lending_rates.c
    in_force = select(func.max(columns.changed_at)).where(columns.asset == asset, columns.changed_at <= since)
    query = select(columns.changed_at, columns.rate).where(
        columns.asset == asset, columns.changed_at >= func.coalesce(in_force.scalar_subquery(), since)
    )
    rows = await tx.connection.execute(query.order_by(columns.changed_at, columns.id))
    return [RateChange(row.changed_at, row.rate) for row in rows]


async def accrued(tx: Tx, loan: Loan, until: datetime) -> Loan:
    """Return a loan with what accrues until a moment. Its market is locked, or this is for show."""
    is_floating = loan.is_live and loan.rate_kind == "floating"
    changes = await rate_changes(tx, loan.asset, loan.accrued_to) if is_floating else []
    return loan.accrue(changes, until)


async def all_accrued(tx: Tx, found: Sequence[Loan], until: datetime) -> list[Loan]:
    """Return loans with what accrues until a moment, for show: the rates of each market are read once."""
    oldest: dict[str, datetime] = {}
    for loan in found:
        if loan.is_live and loan.rate_kind == "floating":
            oldest[loan.asset] = min(loan.accrued_to, oldest.get(loan.asset, loan.accrued_to))
    changes = {asset: await rate_changes(tx, asset, since) for asset, since in oldest.items()}
    return [loan.accrue(changes.get(loan.asset, ()), until) for loan in found]


# --- offers


async def insert_offer(tx: Tx, values: Mapping[str, Any]) -> Offer:
    """Store an offer."""
    made = await tx.connection.execute(insert(loan_offers).values(values).returning(loan_offers))
    return Offer(**made.mappings().one())


async def shrink_offer(tx: Tx, offer_id: str, amount: Decimal, withdrawn_at: datetime | None = None) -> None:
    """Take units off what remains of an offer: lent, or (with a time) withdrawn. Its lender's account is locked."""
    columns = loan_offers.c
    left: dict[str, Any] = {"remaining": columns.remaining - amount}
    if withdrawn_at is not None:
        left["withdrawn_at"] = withdrawn_at
    await tx.connection.execute(update(loan_offers).where(columns.id == offer_id).values(left))


async def withdraw_offers(tx: Tx, lender_id: str, asset: str, now: datetime) -> None:
    """Withdraw what remains of all offers of an asset of a lender, whose account is locked."""
    columns = loan_offers.c
    open_ones = (columns.lender_id == lender_id, columns.asset == asset, columns.remaining > 0)
    await tx.connection.execute(update(loan_offers).where(*open_ones).values(remaining=ZERO, withdrawn_at=now))


async def find_offer(tx: Tx, lender_id: str, offer_id: str) -> Offer | None:
    """Return an offer of a lender, None where there is none of that id."""
    columns = loan_offers.c
    query = select(loan_offers).where(columns.lender_id == lender_id, columns.id == offer_id)
    row = (await tx.connection.execute(query)).mappings().first()
    return None if row is None else Offer(**row)


def _live_loans(*which: ColumnElement[bool]) -> ScalarSelect[int]:
    of_the_offer = loans.c.offer_id == loan_offers.c.id
    return select(func.count()).where(of_the_offer, loans.c.status.in_(LIVE), *which).scalar_subquery()


@dataclass(frozen=True, slots=True)
class Sought:
    """The offers that a borrower may take: of an asset, with no less notice, and not of some lenders."""

    borrower_id: str
    asset: str
    notice_seconds_min: int
    not_of: Collection[str]


async def open_offers(tx: Tx, sought: Sought, limit: int, least: Decimal = ZERO) -> list[OpenOffer]:
    """Return what is on offer, at least so much each, cheapest first."""
    columns = loan_offers.c
    query = _open(sought).where(columns.remaining >= least).order_by(columns.minimum_rate, columns.seq)
    return [OpenOffer(**row) for row in (await tx.connection.execute(query.limit(limit))).mappings()]


async def largest_offers(tx: Tx, sought: Sought, limit: int) -> list[OpenOffer]:
    """Return what is on offer, the largest first."""
    query = _open(sought).order_by(loan_offers.c.remaining.desc(), loan_offers.c.seq)
    return [OpenOffer(**row) for row in (await tx.connection.execute(query.limit(limit))).mappings()]


def _open(sought: Sought) -> Select[Any]:
    columns = loan_offers.c
    its_own = _live_loans(loans.c.borrower_id == sought.borrower_id)
    return (
        select(*(columns[name] for name in OpenOffer.__slots__))
        .where(columns.asset == sought.asset, columns.remaining > 0, columns.lender_id.not_in(sought.not_of))
        .where(columns.lender_id != sought.borrower_id, columns.notice_seconds >= sought.notice_seconds_min)
        .where(_live_loans() < LOANS_AN_OFFER_MAX, its_own < LOANS_OF_ONE_MAX)
    )


async def cheapest(tx: Tx, assets: Collection[str]) -> dict[str, Decimal]:
    """Return the lowest rates at which assets are on offer, of those that are."""
    columns = loan_offers.c
    query = select(columns.asset, func.min(columns.minimum_rate)).where(columns.asset.in_(assets))
    rows = await tx.connection.execute(query.where(columns.remaining > 0).group_by(columns.asset))
    return {row[0]: row[1] for row in rows}


async def own_offers(tx: Tx, lender_id: str) -> list[Offer]:
    """Return a lender's offers of which something remains, by asset."""
    columns = loan_offers.c
    query = select(loan_offers).where(columns.lender_id == lender_id, columns.remaining > 0)
    rows = await tx.connection.execute(query.order_by(columns.asset, columns.seq))
    return [Offer(**row) for row in rows.mappings()]


async def list_offers(tx: Tx, lender_id: str, limit: int, before: int | None = None) -> tuple[list[Offer], int | None]:
    """Return a lender's offers that are open or have a live loan, newest first, from below the number `before`.

    Less than `limit` of them where they have more than LOANS_OF_OFFERS_MAX live loans. The number is that below which
    there may be more.
    """
    columns, live = loan_offers.c, _live_loans()
    query = select(loan_offers, live.label("live")).where(
        columns.lender_id == lender_id, (columns.remaining > 0) | (live > 0)
    )
    query = query if before is None else query.where(columns.seq < before)
    rows = await tx.connection.execute(query.order_by(columns.seq.desc()).limit(min(limit, LOANS_A_PAGE_MAX)))
    found: list[Offer] = []
    shown = 0
    for row in rows.mappings():
        shown += row["live"]
        if shown > LOANS_OF_OFFERS_MAX:
            return found, found[-1].seq
        found.append(Offer(**{name: row[name] for name in Offer.__slots__}))
    return found, found[-1].seq if len(found) == limit else None


# --- loans

_CHANGING = (
    *("principal", "collateral", "accrued", "accrued_to", "interest_paid", "interest_booked", "next_interest_at"),
    *("is_low", "recalled", "recalled_at", "due_at", "wanted_by", "status", "deficit", "closed_at", "next_action_at"),
)


async def insert_loan(tx: Tx, values: Mapping[str, Any]) -> Loan:
    """Store a loan."""
    made = await tx.connection.execute(insert(loans).values(values).returning(loans))
    return Loan(**made.mappings().one())


async def store(tx: Tx, loan: Loan) -> Loan:
    """Write what may change of a loan, and return it. Both parties' accounts and the market are locked."""
    values = {name: getattr(loan, name) for name in _CHANGING}
    await tx.connection.execute(update(loans).where(loans.c.id == loan.id).values(values))
    return loan


async def get(tx: Tx, loan_id: str) -> Loan | None:
    """Return a loan, whoever's it is, None where there is none."""
    row = (await tx.connection.execute(select(loans).where(loans.c.id == loan_id))).mappings().first()
    return None if row is None else Loan(**row)


async def of_party(tx: Tx, agent_id: str, loan_id: str) -> Loan:
    """Return a loan that an agent has given or taken. Raises NotFoundError."""
    found = await get(tx, loan_id)
    if found is None or agent_id not in (found.lender_id, found.borrower_id):
        raise no_such_loan()
    return found


def no_such_loan() -> NotFoundError:
    """Return the refusal of a loan or offer that is not there, or not the caller's."""
    return NotFoundError("There is no such loan.", code="loan_not_found")


async def of_offers(tx: Tx, offer_ids: Sequence[str], *, live: bool = True) -> list[Loan]:
    """Return the loans of some offers, oldest first."""
    query = select(loans).where(loans.c.offer_id.in_(offer_ids)).order_by(loans.c.seq)
    query = query.where(loans.c.status.in_(LIVE)) if live else query
    return [Loan(**row) for row in (await tx.connection.execute(query)).mappings()]


async def list_borrowed(
    tx: Tx, borrower_id: str, limit: int, before: int | None = None, *, live: bool = True
) -> list[Loan]:
    """Return a borrower's loans, newest first, from below the number `before`."""
    columns = loans.c
    query = select(loans).where(columns.borrower_id == borrower_id).order_by(columns.seq.desc())
    query = query if before is None else query.where(columns.seq < before)
    query = query.where(columns.status.in_(LIVE)) if live else query
    rows = await tx.connection.execute(query.limit(min(limit, LOANS_A_PAGE_MAX)))
    return [Loan(**row) for row in rows.mappings()]


async def count_open(tx: Tx, agent_id: str) -> tuple[int, int]:
    """Return how many offers of an agent are open, and how many live loans it has taken."""
    offered = select(func.count()).where(loan_offers.c.lender_id == agent_id, loan_offers.c.remaining > 0)
    taken = select(func.count()).where(loans.c.borrower_id == agent_id, loans.c.status.in_(LIVE))
    row = (await tx.connection.execute(select(offered.scalar_subquery(), taken.scalar_subquery()))).one()
    return row[0], row[1]


_NOT_ALL_RECALLED = loans.c.status.in_(LIVE) & (loans.c.recalled < loans.c.principal)


async def want_back(tx: Tx, lender_id: str, loan_ids: Collection[str], call_id: str, now: datetime) -> None:
    """Note which loans a margin call of their lender wants back: each is due at once, and recalled when it is its turn.

    The lender's account is locked, the borrowers' are not: events to them are for whoever locks both.
    """
    columns = loans.c
    chosen = (columns.lender_id == lender_id, columns.id.in_(loan_ids), _NOT_ALL_RECALLED)
    await tx.connection.execute(update(loans).where(*chosen).values(wanted_by=call_id, next_action_at=now))


async def any_wanted(tx: Tx, lender_id: str) -> bool:
    """Whether a loan is still to be recalled for a margin call of its lender."""
    columns = loans.c
    query = select(columns.id).where(columns.lender_id == lender_id, _NOT_ALL_RECALLED, columns.wanted_by.is_not(None))
    return (await tx.connection.execute(query.limit(1))).first() is not None


# --- which are due


async def due(tx: Tx, limit: int, within: Collection[int] = shards.ALL) -> list[str]:
    """Return the loans whose timers are due, of borrowers in these shards, the longest due first."""
    columns = loans.c
    query = (
        select(columns.id)
        .where(columns.status.in_(LIVE), columns.next_action_at <= tx.now, shards.within(columns.borrower_id, within))
        .order_by(columns.next_action_at)
        .limit(limit)
    )
    return list((await tx.connection.execute(query)).scalars())


async def put_off(tx: Tx, loan_id: str, until: datetime) -> None:
    """Let a loan's timer wait: what can't be decided on now does not hold up the others that are due."""
    columns = loans.c
    again = func.greatest(columns.next_action_at, until)
    live = (columns.id == loan_id, columns.status.in_(LIVE))
    await tx.connection.execute(update(loans).where(*live).values(next_action_at=again))


async def pairs(tx: Tx) -> list[tuple[str, str]]:
    """Return the different pairs of borrowed asset and collateral of live loans."""
    query = select(loans.c.asset, loans.c.collateral_asset).where(loans.c.status.in_(LIVE)).distinct()
    return [(row[0], row[1]) for row in await tx.connection.execute(query)]


# In floats, and with interest since it was last accrued at the market's rate of now: this names loans, decides nothing.
_BELOW = text(
    """
    SELECT l.id FROM loans l
    JOIN unnest(:assets, :collaterals, :worth, :liquidated, :low)
        AS t (asset, collateral, worth, liquidated, low) ON (l.asset, l.collateral_asset) = (t.asset, t.collateral)
    JOIN lending_markets m ON m.asset = l.asset
    CROSS JOIN LATERAL (
        SELECT l.collateral::float8 * t.worth / (l.principal::float8
            + greatest(l.interest_booked::float8, l.accrued::float8 / 31536000e6 - l.interest_paid::float8)
            + l.principal::float8 * greatest(l.rate, CASE l.rate_kind WHEN 'floating' THEN m.rate ELSE 0 END)::float8
            * greatest(0, extract(epoch FROM :now - l.accrued_to)::float8) / 31536000) AS ratio) AS r
    WHERE l.status IN ('active', 'recalled') AND l.id <> ALL (:but)
      AND (hashtextextended(l.borrower_id, 0) & :mask) = ANY (:shards)
      AND (r.ratio < t.liquidated OR (NOT l.is_low AND r.ratio < t.low) OR (l.is_low AND r.ratio >= t.low + :cleared))
    ORDER BY r.ratio - t.liquidated LIMIT :most
    """
).bindparams(
    *(bindparam(name, type_=ARRAY(Text)) for name in ("assets", "collaterals", "but")),
    *(bindparam(name, type_=ARRAY(Double)) for name in ("worth", "liquidated", "low")),
    bindparam("now", type_=DateTime(timezone=True)),
    bindparam("mask", type_=Integer),
    bindparam("cleared", type_=Double),
    bindparam("shards", type_=ARRAY(Integer)),
    bindparam("most", type_=Integer),
)


@dataclass(frozen=True, slots=True)
class MarketTotal:
    """A market, its live loans counted, and of them the earliest that is due back and the earliest timer."""

    market: Market
    active: int
    recalled: int
    due_at: datetime | None
    next_action_at: datetime | None


async def totals(tx: Tx) -> list[MarketTotal]:
    """Return every market, those first of which the most loans are live."""
    columns = loans.c
    counts = [func.count().filter(columns.status == status).label(status) for status in LIVE]
    times = [func.min(column).label(column.name) for column in (columns.due_at, columns.next_action_at)]
    live = select(columns.asset, *counts, *times).where(columns.status.in_(LIVE)).group_by(columns.asset).subquery()
    active, recalled = func.coalesce(live.c.active, 0), func.coalesce(live.c.recalled, 0)
    query = select(
        lending_markets, active.label("active"), recalled.label("recalled"), live.c.due_at, live.c.next_action_at
    ).outerjoin(live, live.c.asset == lending_markets.c.asset)
    rows = await tx.connection.execute(query.order_by((active + recalled).desc(), lending_markets.c.asset))
    names = Market.__slots__
    return [
        MarketTotal(
            Market(**{n: row[n] for n in names}), row["active"], row["recalled"], row["due_at"], row["next_action_at"]
        )
        for row in rows.mappings()
    ]


async def losses(tx: Tx) -> dict[str, tuple[int, Decimal]]:
    """Return by asset for how many loans the house had to make the lender whole, and the units that it advanced."""
    columns = loans.c
    query = select(columns.asset, func.count(), func.sum(columns.deficit)).where(columns.deficit > text("0"))
    rows = await tx.connection.execute(query.group_by(columns.asset))
    return {asset: (count, amount) for asset, count, amount in rows}


@dataclass(frozen=True, slots=True)
class Levels:
    """Of a pair: USD that a unit of collateral counts for over USD a unit of debt, and the ratios that matter."""

    asset: str
    collateral_asset: str
    worth: float
    liquidated: float
    low: float


async def below(
    tx: Tx, levels: Sequence[Levels], now: datetime, within: Collection[int], limit: int, but: Collection[str] = ()
) -> list[str]:
    """Return loans of borrowers in these shards that are past a level that they were not told of, the worst first.

    Those in `but` are left out: what can't be decided on does not hide the others.
    """
    if not levels:
        return []
    given = {
        "assets": [level.asset for level in levels],
        "collaterals": [level.collateral_asset for level in levels],
        "worth": [level.worth for level in levels],
        "liquidated": [level.liquidated for level in levels],
        "low": [level.low for level in levels],
        "but": list(but),
    }
    more = {"now": now, "mask": shards.SHARDS - 1, "shards": sorted(within), "most": limit}
    more["cleared"] = float(LOW_CLEARED)
    return list((await tx.connection.execute(_BELOW, given | more)).scalars())
