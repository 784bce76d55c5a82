"""What an agent's stored book comes to at stored prices, and whether it may do what raises its utilization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

from app.db.session import Tx
from app.domain import pending
from app.domain.book import Book, PendingOrder, Side
from app.domain.gates import Refusal, capped, refusal, stale_symbols
from app.domain.money import plain, to_float
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.prices import PriceFinder, StoredPrice
from app.domain.quote import AccountFigures, account_figures
from app.domain.trade import Contract
from app.errors import ConflictError, conflict
from app.services.market_cache import MarketCache, MarketView

ACCOUNTS_REMEMBERED_MAX = 1_024
PENDING_ORDERS_MAX = 100
"""Orders of one account that wait at a venue: each is filled on trial before anything opens."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The market at the moment of a decision, how old a price may be for it, and how large a book.

    It is read after the book is locked: what was posted while a request waited for the lock counts.
    """

    market: MarketView
    now: datetime
    price_age_max: timedelta
    items_max: int

    def figures(self, book: Book) -> AccountFigures:
        """Return what a book comes to. Raises InvalidError for a missing price."""
        view = self.market
        return account_figures(book.quote_terms(view.parameters, view.prices), view.prices, self.now)

    def filled(self, book: Book, orders: Sequence[PendingOrder]) -> Book:
        """Return the book with these pending orders filled at the mark. Raises InvalidError for a missing price."""
        return pending.filled(book, orders, self.market.parameters, self.market.prices, self.now) if orders else book

    def exposed(self, book: Book) -> Book:
        """Return the book that the gates judge: what pending orders may make of it. Raises InvalidError."""
        return pending.exposed(book, self.market.parameters, self.market.prices, self.now) if book.pending else book

    def refusal(self, before: Book, after: Book) -> Refusal | None:
        """Return why the account may not go from one book to the other, or None. Raises InvalidError."""
        return self.judge(self.figures(before), self.figures(after), after)

    def judge(self, before: AccountFigures, after: AccountFigures, book: Book) -> Refusal | None:
        """Return why the account may not go from one standing to the other, or None, by the book after, as exposed."""
        free = book.holding(SETTLEMENT_ASSET).free
        if free < 0:
            detail = f"the allocation takes {plain(-free):f} {SETTLEMENT_ASSET} more than are free"
            return Refusal("insufficient_margin", detail, to_float(-free))
        return refusal(before, after, book.settings.policy(self.market.parameters.policy))

    def crowding(
        self, before: Book, after: Book, figures_before: AccountFigures, figures: AccountFigures
    ) -> Refusal | None:
        """Return why pending orders may not go this far together: hedged ones need little margin, and all may fill.

        The books are as they stand, their figures as exposed.
        """
        if not after.pending:
            return None
        view = self.market
        then, now = (pending.gross_reached(book, view.parameters, view.prices) for book in (before, after))
        policy = after.settings.policy(view.parameters.policy)
        return capped((then, figures_before.equity), (now, figures.equity), policy)

    def require_room(self, book: Book) -> None:
        """Raise ConflictError `account_full` where a book has grown past what is assessed in a moment."""
        items = len(book.positions) + len(book.reservations) + len(book.holdings)
        if items > self.items_max:
            detail = f"an account has at most {self.items_max} open positions, reservations and assets"
            raise conflict("", "account_full", detail)
        if len(book.pending) > PENDING_ORDERS_MAX:
            raise conflict("", "account_full", f"an account has at most {PENDING_ORDERS_MAX} pending orders")

    def require_price(self, pointer: str, asset: str) -> None:
        """Raise InvalidError `missing_price` where an asset has no price."""
        PriceFinder(self.market.parameters, {}, self.market.prices).asset(asset, pointer)

    def worth(self, asset: str, amount: Decimal) -> float:
        """Return the collateral value of units of an asset, after haircut, USD. Raises InvalidError without a price."""
        return to_float(amount) * self.price(asset) * (1.0 - self.market.parameters.asset(asset).haircut)

    def price(self, asset: str) -> float:
        """Return the price of an asset, USD. Raises InvalidError without one."""
        return PriceFinder(self.market.parameters, {}, self.market.prices).asset(asset, "/asset")

    def require_fresh(self, figures: AccountFigures) -> None:
        """Raise ConflictError `stale_price` where a price that the figures depend on is too old to decide by."""
        seconds = self.price_age_max.total_seconds()
        stale = stale_symbols(figures, self.now, seconds)
        if stale:
            detail = (
                f"the price of {stale[0]} is over {seconds:g} s old: nothing that raises utilization is decided on it"
            )
            raise conflict("/market/prices", "stale_price", detail)

    def require_margin(self, before: Book, after: Book, pointer: str) -> None:
        """Check a step that raises utilization: fresh prices, then the gates. Raises ConflictError.

        A book with nothing open and nothing owed depends on no price: what is free may be spent.
        """
        if not after.is_leveraged:
            return
        exposed = self.exposed(after)
        figures, figures_before = self.figures(exposed), self.figures(self.exposed(before))
        self.require_fresh(figures)
        refused = self.judge(figures_before, figures, exposed)
        refused = refused or self.crowding(before, after, figures_before, figures)
        if refused is not None:
            raise refusal_error(refused, pointer)
        if after.settings.margin_mode == "portfolio" and not figures.eligible:
            least = self.market.parameters.models.portfolio_minimum_equity
            detail = f"portfolio margin asks for an equity of {least:,.0f} USD: only what comes in and what reduces"
            raise conflict(pointer, "equity_below_minimum", detail)


class Scenes:
    """Where scenes come from: the market as a transaction sees it, at the database's time."""

    def __init__(self, market: MarketCache, price_age_max: timedelta, items_max: int) -> None:
        self._market = market
        self._price_age_max = price_age_max
        self._items_max = items_max

    async def at(self, tx: Tx) -> Scene:
        """Return the scene of this moment; to be called when the book is locked."""
        view = await self._market.current(tx)
        return Scene(view, view.read_at or tx.now, self._price_age_max, self._items_max)


def by_mark(view: MarketView, symbol: str) -> tuple[Contract, StoredPrice]:
    """Return the contract of a symbol and its mark: its own stored price, else its underlying's.

    Raises InvalidError where there is none.
    """
    return pending.at_mark(view.parameters, view.prices, symbol)


def forced_price(mark: Decimal, side: Side, slippage: Decimal) -> Decimal:
    """Return the mark less the slippage of a forced sale (more, where a short is bought back)."""
    return mark * (1 - slippage if side == "long" else 1 + slippage)


class FiguresCache:
    """The last figures of the accounts that are being watched.

    Who polls an account asks for its balance, its positions and its health in a row: while neither the book nor the
    market has changed they share one assessment. A stored book is linear, so that time alone changes no figure.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Book, tuple[int, int], AccountFigures]] = OrderedDict()

    def figures(self, book: Book, view: MarketView, now: datetime) -> AccountFigures:
        """Return what a book comes to. Raises InvalidError for a missing price."""
        versions = view.parameters.version, view.price_version
        known = self._known.get(book.agent_id)
        if known is not None and known[0] is book and known[1] == versions:
            return replace(known[2], as_of=now)
        figures = account_figures(book.quote_terms(view.parameters, view.prices), view.prices, now)
        self._known[book.agent_id] = book, versions, figures
        if len(self._known) > ACCOUNTS_REMEMBERED_MAX:
            self._known.popitem(last=False)
        return figures


def refusal_error(refused: Refusal, pointer: str, **figures: object) -> ConflictError:
    """Return the problem that tells why, and what is missing."""
    return conflict(pointer, refused.code, refused.detail, shortfall=refused.shortfall, **figures)
