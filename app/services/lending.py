"""Lending: what is offered, and what is taken of it. Each is one transaction under all its locks.

`stage` takes the locks in the one order: accounts by their ids, then the asset's market. What is named before they are
held (whose offers, whose loans) is looked at again under them; where somebody else turns out to be concerned, the
locks are given back to a savepoint and taken anew.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeVar

from app.db.session import Tx
from app.domain.book import ZERO, Book
from app.domain.lending import (
    NOTICE_DEFAULT,
    Match,
    OpenOffer,
    Prices,
    RateKind,
    curve_rate,
    match,
    next_interest,
    shared_out,
)
from app.domain.lending_moves import Parties, pledged
from app.domain.money import checked_amount, plain, to_decimal
from app.domain.moves import Move, agent, pay_in
from app.domain.parameters import LendingParameters
from app.errors import PrimeriskError, conflict, invalid
from app.services import accounts, book, events, holdings, ledger, loans, market_rules
from app.services.holdings import HoldingSettings
from app.services.loans import Loan, Market, Offer, Sought
from app.services.margin import Scene, Scenes
from app.services.wallet import Names, require_delegated, require_uncalled

OFFERS_MAX, LOANS_TAKEN_MAX = 200, 500
"""Open offers, and live loans taken, of one agent."""
SERVICE = "lending"
OFFERS_A_BORROW_MAX = 50
TRIES_MAX = 5
"""How often locks are taken anew because somebody else turned out to be concerned."""
UNWILLING_MAX = 50
"""How often they are because a lender's own gates do not let it lend: each time it is passed over."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage:
    """The locked accounts' books and the locked market of an asset, at the market's prices after that."""

    tx: Tx
    scene: Scene
    asset: str
    books: Mapping[str, Book]
    market: Market

    @property
    def terms(self) -> LendingParameters:
        """What loans of the asset cost and need."""
        return self.scene.market.parameters.loans_of(self.asset)

    def parties(self, loan: Loan) -> Parties:
        """Return the parties of a loan, both of whose books are here."""
        owed = self.books[loan.lender_id].holding(self.asset).owed
        return Parties(loan.lender_id, loan.borrower_id, self.asset, owed)

    async def move_market(self, supplied: Decimal, borrowed: Decimal) -> Market:
        """Add to what is supplied and borrowed, from now on; once a stage."""
        return await loans.change_market(self.tx, self.market, self.terms, supplied, borrowed, self.scene.now)

    async def touch(self) -> None:
        """Count a change of every book here: the screen and whoever watches hear of it by the version."""
        for agent_id in self.books:
            await accounts.lock_account(self.tx, agent_id)


async def stage(tx: Tx, scenes: Scenes, agents: Collection[str], asset: str) -> Stage:
    """Lock accounts and the market of an asset, and return what they are. Raises NotFoundError."""
    books = {agent_id: await book.hold(tx, agent_id) for agent_id in sorted(agents)}
    market = await loans.lock_market(tx, asset)
    if market is None:
        scene = await scenes.at(tx)
        market = await loans.open_market(tx, asset, scene.market.parameters.loans_of(asset), scene.now)
    return Stage(tx, await scenes.at(tx), asset, books, market)


class OthersError(Exception):
    """Accounts are concerned that are not locked."""


class UnwillingError(OthersError):
    """Lenders that were found do not lend now, and are passed over from now on."""


async def in_tries(tx: Tx, attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what an attempt gives; where it meets accounts that it has not locked, it is made anew.

    Unwilling lenders cost other tries than accounts that change meanwhile: a few of them do not close the market.
    """
    left = {UnwillingError: UNWILLING_MAX, OthersError: TRIES_MAX}
    while min(left.values()) > 0:
        savepoint = await tx.connection.begin_nested()
        try:
            found = await attempt()
        except OthersError as error:
            await savepoint.rollback()  # gives back the locks too
            left[type(error)] -= 1
            continue
        await savepoint.commit()
        return found
    raise conflict("", "offers_moved", "others change the same offers and loans all the time: try again")


# --- offers


@dataclass(frozen=True, slots=True)
class NewOffer:
    """What a lender offers; what is None is the asset's usual."""

    asset: str
    amount: Decimal
    minimum_rate: Decimal | None = None
    notice: timedelta = NOTICE_DEFAULT


async def offer(tx: Tx, scenes: Scenes, lender_id: str, asked: NewOffer, named: Names) -> tuple[Offer, Market]:
    """Set units aside for whoever borrows them. Raises ConflictError past the holding's ceiling or past the gate."""
    market_rules.check_symbol("/asset", asked.asset)
    on = await stage(tx, scenes, [lender_id], asked.asset)
    held, asset = on.books[lender_id], asked.asset
    amount = checked_amount("/amount", asked.amount, on.terms.decimals)
    require_delegated(held, SERVICE)
    require_uncalled(held)
    if held.opens_nothing is not None:
        raise conflict("/amount", "reduce_only", held.opens_nothing)
    check_free(held, asset, amount, "/amount")
    _check_ceiling(held, asset, amount, await _ceiling(on, lender_id))
    if (await loans.count_open(tx, lender_id))[0] >= OFFERS_MAX:
        raise conflict("", "account_full", f"an agent has at most {OFFERS_MAX} open offers")
    units = agent(lender_id, "free")
    on.scene.require_margin(held, _all_lent(held, asset, amount), "/amount")
    stored = await loans.insert_offer(
        tx,
        {
            "id": f"offer_{secrets.token_hex(10)}",
            "lender_id": lender_id,
            "asset": asset,
            "amount": amount,
            "remaining": amount,
            "minimum_rate": to_decimal(on.terms.minimum_rate) if asked.minimum_rate is None else asked.minimum_rate,
            "notice_seconds": int(asked.notice.total_seconds()),
            "created_at": on.scene.now,
        },
    )
    moves = [Move(asset, amount, units, agent(lender_id, "offered"))]
    await ledger.post(tx, named.occasion(lender_id, SERVICE, "offer", stored.id), moves)
    await on.touch()
    return stored, await on.move_market(amount, ZERO)


def _all_lent(held: Book, asset: str, amount: Decimal) -> Book:
    """Return the book with an amount lent out of what is free, and with it all that is on offer."""
    offered, lent = agent(held.agent_id, "offered"), agent(held.agent_id, "lent")
    before = [Move(name, h.offered, offered, lent) for name, h in held.holdings.items() if h.offered > 0]
    return held.after_moves([*before, Move(asset, amount, agent(held.agent_id, "free"), lent)])


async def _ceiling(on: Stage, lender_id: str) -> Decimal:
    own = (await holdings.of_agent(on.tx, lender_id)).get(on.asset, HoldingSettings())
    return own.ceiling(on.scene.market.parameters.policy.lent_share_max)


def _check_ceiling(held: Book, asset: str, amount: Decimal, ceiling: Decimal) -> None:
    """Refuse to offer more than the ceiling leaves of a holding. Raises ConflictError `lent_share_above_ceiling`."""
    holding = held.holding(asset)
    room = holding.own * ceiling - holding.lent - holding.offered
    if amount > room:
        detail = f"at most {plain(ceiling):f} of a holding may be lent: {plain(max(ZERO, room)):f} {asset} more"
        raise conflict("/amount", "lent_share_above_ceiling", detail, available=plain(max(ZERO, room)))


def check_free(held: Book, asset: str, amount: Decimal, pointer: str) -> None:
    """Refuse an amount past what is free. Raises ConflictError `insufficient_funds`."""
    free = held.holding(asset).free
    if amount > free:
        raise ledger.insufficient_funds(f"{plain(free):f} {asset} are free", pointer, available=plain(free))


async def cancel(tx: Tx, scenes: Scenes, lender_id: str, offer_id: str, named: Names) -> Offer:
    """Withdraw what is not lent of an offer; its loans go on. Raises NotFoundError."""
    found = await loans.find_offer(tx, lender_id, offer_id)
    if found is None:
        raise loans.no_such_loan()
    on = await stage(tx, scenes, [lender_id], found.asset)
    found = await loans.find_offer(tx, lender_id, offer_id) or found
    if found.remaining > 0:
        await on.touch()
        await withdraw(on, found, found.remaining, named)
    return await loans.find_offer(tx, lender_id, offer_id) or found


async def withdraw(on: Stage, found: Offer, amount: Decimal, named: Names) -> None:
    """Take units off what an offer still offers: they are free again, what is owed of the asset paid first."""
    whole = amount == found.remaining
    await loans.shrink_offer(on.tx, found.id, amount, on.scene.now if whole else None)
    moves = _given_back(on.books[found.lender_id], found.asset, amount)
    await ledger.post(on.tx, named.occasion(found.lender_id, SERVICE, "offer_cancelled", found.id), moves)
    await on.move_market(-amount, ZERO)


def _given_back(held: Book, asset: str, amount: Decimal) -> list[Move]:
    return pay_in(held.agent_id, asset, amount, agent(held.agent_id, "offered"), held.holding(asset).owed)


async def cancel_all(tx: Tx, scene: Scene, held: Book, named: Names) -> tuple[Book, list[str]]:
    """Withdraw every open offer of an account that is locked, and return its book and their ids.

    The markets are locked one after the other, by name; each is left after a handful of statements.
    """
    found = await loans.own_offers(tx, held.agent_id)
    for asset, group in groupby(found, attrgetter("asset")):
        total = sum((one.remaining for one in group), ZERO)
        terms = scene.market.parameters.loans_of(asset)
        market = await loans.lock_market(tx, asset) or await loans.open_market(tx, asset, terms, scene.now)
        await loans.withdraw_offers(tx, held.agent_id, asset, scene.now)
        moves = _given_back(held, asset, total)
        await ledger.post(tx, named.occasion(held.agent_id, SERVICE, "offer_cancelled"), moves)
        await loans.change_market(tx, market, terms, -total, ZERO, scene.now)
        held = held.after_moves(moves)
    return held, [one.id for one in found]


# --- loans are taken


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a borrower asks for; `collateral` None is just what the loan needs."""

    asset: str
    amount: Decimal
    collateral_asset: str
    collateral: Decimal | None = None
    rate_kind: RateKind = "floating"
    rate_max: Decimal | None = None
    notice_min: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Priced:
    """What a loan would be made of, and what it would cost and need; `rates` are of the matches."""

    matches: Sequence[Match]
    market: Market
    rates: Sequence[Decimal]
    collateral: Decimal
    prices: Prices

    def by_lender(self) -> dict[str, Decimal]:
        """Return what is taken of each lender, of all its offers together."""
        parts: dict[str, Decimal] = {}
        for m in self.matches:
            parts[m.offer.lender_id] = parts.get(m.offer.lender_id, ZERO) + m.amount
        return parts

    @property
    def rate(self) -> Decimal:
        """The mean of the rates, by what is taken at each."""
        whole = sum((m.amount for m in self.matches), ZERO)
        return sum((m.amount * rate for m, rate in zip(self.matches, self.rates, strict=True)), ZERO) / whole


def prices_of(scene: Scene, asset: str, collateral_asset: str) -> Prices:
    """Return what a loan is valued at. Raises InvalidError `missing_price`, `not_collateral`."""
    parameters, stored = scene.market.parameters, scene.market.prices
    kept = 1 - to_decimal(parameters.asset(collateral_asset).haircut)
    if collateral_asset == asset:
        return Prices(Decimal(1), Decimal(1), kept)
    found = []
    for name, pointer in ((asset, "/asset"), (collateral_asset, "/collateral/asset")):
        price = stored.get(name)
        if price is not None:
            found.append(price.exact)
        elif parameters.asset(name).kind == "stable":
            found.append(Decimal(1))
        else:
            raise invalid(pointer, "missing_price", f"no price for {name}: post it to the market")
    return Prices(found[0], found[1], kept)


def stale_of(scene: Scene, asset: str, collateral_asset: str) -> list[str]:
    """Return those of the two assets whose prices are too old to decide by."""
    if collateral_asset == asset:
        return []
    prices = scene.market.prices
    return [n for n in (asset, collateral_asset) if n in prices and scene.now - prices[n].as_of > scene.price_age_max]


def require_fresh(scene: Scene, asset: str, collateral_asset: str) -> None:
    """Raise ConflictError `stale_price` where a loan is not to be decided on by the prices of now."""
    stale = stale_of(scene, asset, collateral_asset)
    if stale:
        detail = f"the price of {stale[0]} is over {scene.price_age_max.total_seconds():g} s old"
        raise conflict("/market/prices", "stale_price", detail)


def price_loan(scene: Scene, market: Market, wanted: Wanted, offers: Sequence[OpenOffer]) -> Priced:
    """Return what a loan would come to, of these offers, at prices of any age. Raises ConflictError, InvalidError."""
    terms = scene.market.parameters.loans_of(wanted.asset)
    matches = match(offers, wanted.amount)
    found = sum((m.amount for m in matches), ZERO)
    if found < wanted.amount:
        detail = f"{plain(found):f} {wanted.asset} are on offer at these terms"
        raise conflict("/amount", "not_enough_offered", detail, available=plain(found))
    after = replace(market, borrowed=market.borrowed + wanted.amount)
    curve = curve_rate(min(Decimal(1), after.utilization), terms)
    rates = [max(curve, m.offer.minimum_rate) for m in matches]
    if wanted.rate_max is not None and max(rates) > wanted.rate_max:
        raise conflict("/max_rate_apy", "rate_above_limit", f"the rate would be {plain(max(rates)):f}")
    prices = prices_of(scene, wanted.asset, wanted.collateral_asset)
    if prices.kept <= 0:
        raise invalid("/collateral/asset", "not_collateral", f"{wanted.collateral_asset} counts for nothing")
    needed = prices.needed(wanted.amount, to_decimal(terms.collateral_ratio))
    given = needed if wanted.collateral is None else wanted.collateral
    if given < needed:
        detail = f"a loan of that needs {plain(needed):f} {wanted.collateral_asset}"
        raise conflict("/collateral/amount", "insufficient_collateral", detail, needed=plain(needed))
    return Priced(matches, replace(after, rate=curve), rates, given, prices)


async def quote(tx: Tx, scenes: Scenes, borrower_id: str, wanted: Wanted) -> tuple[Scene, Priced]:
    """Return what a loan would come to now. Raises ConflictError, InvalidError."""
    scene = await scenes.at(tx)
    terms = scene.market.parameters.loans_of(wanted.asset)
    wanted = replace(wanted, amount=checked_amount("/amount", wanted.amount, terms.decimals))
    found = await loans.markets_of(tx, [wanted.asset])
    market = found[0] if found else Market(wanted.asset, ZERO, ZERO, ZERO, scene.now)
    return scene, price_loan(scene, market, wanted, await _open_offers(tx, borrower_id, wanted))


async def reprice(tx: Tx, scenes: Scenes, asset: str, terms: LendingParameters) -> None:
    """Let the rate of an asset's market follow a curve that has changed."""
    market = await loans.lock_market(tx, asset)
    if market is not None:
        await loans.change_market(tx, market, terms, ZERO, ZERO, (await scenes.at(tx)).now)


async def borrow(tx: Tx, scenes: Scenes, borrower_id: str, wanted: Wanted, named: Names) -> list[Loan]:
    """Take what is on offer, cheapest first, against collateral that is pledged with it; a loan for each offer.

    Lenders whose own gates do not let them lend any more are passed over. Raises ConflictError, InvalidError.
    """
    for pointer, name in (("/asset", wanted.asset), ("/collateral/asset", wanted.collateral_asset)):
        market_rules.check_symbol(pointer, name)
    checked_amount("/amount", wanted.amount)  # offers are matched before the asset's own decimals are known
    passed_over: set[str] = set()

    async def attempt() -> list[Loan]:
        offers = await _open_offers(tx, borrower_id, wanted, passed_over)
        lenders = {m.offer.lender_id for m in match(offers, wanted.amount)}
        on = await stage(tx, scenes, {borrower_id, *lenders}, wanted.asset)
        asked = _checked(on, wanted)
        offers = await _open_offers(tx, borrower_id, asked, passed_over)
        locked = [o for o in offers if o.lender_id in on.books]
        if _is_enough(offers, asked) and not _is_enough(locked, asked):
            raise OthersError
        priced = price_loan(on.scene, on.market, asked, locked)
        unwilling = [lender for lender, part in priced.by_lender().items() if not _may_lend(on, lender, part)]
        if unwilling:
            passed_over.update(unwilling)
            raise UnwillingError
        return await _take(on, borrower_id, asked, priced, named)

    return await in_tries(tx, attempt)


def _checked(on: Stage, wanted: Wanted) -> Wanted:
    amount = checked_amount("/amount", wanted.amount, on.terms.decimals)
    given = None if wanted.collateral is None else checked_amount("/collateral/amount", wanted.collateral)
    return replace(wanted, amount=amount, collateral=given)


async def _open_offers(tx: Tx, borrower_id: str, wanted: Wanted, not_of: Collection[str] = ()) -> list[OpenOffer]:
    """Return the offers that a loan may be made of: the cheapest, unless as many as that are too little.

    Then those too small for their number are left out, and if that is too little as well, the largest are taken:
    cheap dust hides no offer.
    """
    most = OFFERS_A_BORROW_MAX
    sought = Sought(borrower_id, wanted.asset, int(wanted.notice_min.total_seconds()), not_of)
    found = await loans.open_offers(tx, sought, most)
    if len(found) < most or _is_enough(found, wanted):
        return found
    found = await loans.open_offers(tx, sought, most, least=wanted.amount / most)
    return found if _is_enough(found, wanted) else await loans.largest_offers(tx, sought, most)


def _is_enough(offers: Sequence[OpenOffer], wanted: Wanted) -> bool:
    return sum((o.remaining for o in offers), ZERO) >= wanted.amount


def _may_lend(on: Stage, lender_id: str, amount: Decimal) -> bool:
    """Whether the lender's own gates let so many of its units go, and its fleet's margin call does."""
    held = on.books[lender_id]
    if held.opens_nothing is not None or held.is_in_called_pool:
        return False
    moves = [Move(on.asset, amount, agent(held.agent_id, "offered"), agent(held.agent_id, "lent"))]
    try:
        on.scene.require_margin(held, held.after_moves(moves), "/amount")
    except PrimeriskError:
        return False
    return True


async def _take(on: Stage, borrower_id: str, wanted: Wanted, priced: Priced, named: Names) -> list[Loan]:
    """Check the borrower, then only write."""
    tx, held, now = on.tx, on.books[borrower_id], on.scene.now
    require_fresh(on.scene, wanted.asset, wanted.collateral_asset)
    require_delegated(held, SERVICE)
    if held.opens_nothing is not None:
        raise conflict("/amount", "reduce_only", held.opens_nothing)
    check_free(held, wanted.collateral_asset, priced.collateral, "/collateral/amount")
    if (await loans.count_open(tx, borrower_id))[1] + len(priced.matches) > LOANS_TAKEN_MAX:
        raise conflict("", "account_full", f"an agent has at most {LOANS_TAKEN_MAX} loans")
    moves = pledged(borrower_id, wanted.collateral_asset, priced.collateral)
    for found in priced.matches:
        moves += Parties(found.offer.lender_id, borrower_id, wanted.asset, ZERO).handed_over(found.amount)
    after = held.after_moves(moves)
    on.scene.require_room(after)
    on.scene.require_margin(held, after, "/amount")
    pledges = shared_out(priced.collateral, [m.amount for m in priced.matches])
    taken = []
    for found, rate, pledge in zip(priced.matches, priced.rates, pledges, strict=True):
        values: dict[str, Any] = {
            "id": f"loan_{secrets.token_hex(10)}",
            "offer_id": found.offer.id,
            "lender_id": found.offer.lender_id,
            "borrower_id": borrower_id,
            "asset": wanted.asset,
            "amount": found.amount,
            "principal": found.amount,
            "rate_kind": wanted.rate_kind,
            "rate": rate if wanted.rate_kind == "fixed" else found.offer.minimum_rate,
            "notice_seconds": found.offer.notice_seconds,
            "collateral_asset": wanted.collateral_asset,
            "collateral": pledge,
            "accrued_to": now,
            "next_interest_at": next_interest(now, now),
            "next_action_at": next_interest(now, now),
            "status": "active",
            "opened_at": now,
        }
        nothing = dict.fromkeys(("accrued", "interest_paid", "interest_booked", "recalled", "deficit"), ZERO)
        await loans.shrink_offer(tx, found.offer.id, found.amount)
        taken.append(await loans.insert_loan(tx, values | nothing))
    await ledger.post(tx, named.occasion(borrower_id, SERVICE, "loan_opened", taken[0].id), moves)
    market = await on.move_market(ZERO, wanted.amount)
    await on.touch()
    for loan in taken:
        await tell(tx, "loan.opened", loan, rate_apy=plain(loan.rate_at(market.rate)))
    return taken


# --- what is told


async def tell(tx: Tx, kind: str, loan: Loan, **more: Any) -> None:
    """Write an event of a loan for each of its parties; neither is told who the other is."""
    shared = {
        "loan_id": loan.id,
        "asset": loan.asset,
        "principal": plain(loan.principal),
        "status": loan.status,
        "recall_notice_hours": loan.notice_seconds / 3600,
        "recalled": plain(loan.recalled),
        "due_at": loan.due_at,
        "collateral_asset": loan.collateral_asset,
        "collateral": plain(loan.collateral),
    }
    lender = {"role": "lender", "offer_id": loan.offer_id, **shared, **more}
    await events.emit(tx, kind, loan.lender_id, lender)
    await events.emit(tx, kind, loan.borrower_id, {"role": "borrower", **shared, **more})
