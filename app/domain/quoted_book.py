"""A request's own portfolio as a book, so that plans made for stored accounts can be worked out on it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal

from app.domain.book import ZERO, AccountSettings, Book, Holding, OpenPosition
from app.domain.book import position_terms as terms_of
from app.domain.collateral import CollateralTerms
from app.domain.deleverage import planned_order
from app.domain.liquidate import Slice, Target
from app.domain.money import to_decimal, to_float
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.portfolio import Portfolio
from app.domain.prices import StoredPrice
from app.domain.quote import AccountFigures, QuoteTerms, account_figures, read_account
from app.domain.terms import PositionTerms
from app.domain.trade import Contract, plan
from app.errors import invalid

_OF_OTHERS = tuple(f.name for f in fields(PositionTerms) if f.name in ("notional", "delta", "gamma", "vega", "strike"))


@dataclass(frozen=True, slots=True)
class _Row:
    """What of a request's position a stored one leaves to the market: its mark and its contract."""

    mark: float
    contract_size: float
    contract: Contract


@dataclass(frozen=True, eq=False)
class QuotedBook:
    """A request's linear positions and wallet as `book`, assessed and reduced at the request's own marks.

    A position's id is its place among the request's, as text. Flat positions are left out.
    """

    book: Book
    terms: QuoteTerms
    stored: Mapping[str, StoredPrice]
    now: datetime
    rows: Mapping[str, _Row]
    prices: Mapping[str, float]

    def assess(self, held: Book) -> AccountFigures:
        """Return what a book that came of this one comes to, as a quote of it would. Raises InvalidError."""
        return account_figures(self.terms_of(held), self.stored, self.now)

    def terms_of(self, held: Book) -> QuoteTerms:
        """Return the request that a book that came of this one is."""
        own = [self.rows[p.id] for p in held.positions]
        return replace(
            self.terms,
            positions=replace(
                terms_of(held.positions),
                mark_price=[row.mark for row in own],
                contract_size=[row.contract_size for row in own],
            ),
            collateral=[
                CollateralTerms(asset, to_float(h.held), self.prices.get(asset), to_float(h.lent))
                for asset, h in held.holdings.items()
                if h.held > 0
            ],
            liabilities=[
                CollateralTerms(asset, to_float(h.debt), self.prices.get(asset))
                for asset, h in held.holdings.items()
                if h.debt > 0
            ],
        )

    def reduce(self, held: Book, target: Target, size: Decimal) -> Book:
        """Return the book after closing so much of a position at its mark, its profit or loss paid in USDC."""
        position = next(p for p in held.positions if p.id == target.item.id)
        row = self.rows[position.id]
        order = planned_order(Slice(replace(target, item=position), size)).order
        # alone, so that of two positions in one symbol this one is meant
        alone = replace(held, positions=[position])
        left = plan(alone, order, row.contract, to_decimal(row.mark), "", self.now).book
        others = [p for p in held.positions if p.id != position.id]
        return replace(left, positions=[*others, *left.positions])


def quoted_book(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime) -> QuotedBook:
    """Return the book of a request's portfolio.

    Raises InvalidError as `account_figures` does; `linear_only` for an option or a position of greeks, which is no
    number of contracts to close; `allocated_above_collateral` where isolated positions hold more USDC than there is.
    """
    _check_linear(terms.positions)
    account = read_account(terms, stored, now)
    portfolio = account.portfolio
    open_rows = [i for i, notional in enumerate(portfolio.notional.tolist()) if notional > 0.0]
    positions = [_position(terms.positions, portfolio, i, now) for i in open_rows]
    allocated = sum((p.allocated for p in positions), ZERO)
    book = Book(
        agent_id="quote",
        settings=AccountSettings(margin_mode=terms.margin_mode),
        version=0,
        holdings=_holdings(terms, allocated),
        positions=positions,
        reservations=(),
    )
    return QuotedBook(
        book=book,
        terms=terms,
        stored=stored,
        now=now,
        rows={str(i): _row(terms, portfolio, i) for i in open_rows},
        prices={t.asset: t.price for t in (*terms.collateral, *terms.liabilities) if t.price is not None},
    )


def _check_linear(terms: PositionTerms) -> None:
    for name in _OF_OTHERS:
        for i, value in enumerate(getattr(terms, name)):
            if value is not None:
                detail = "a plan closes contracts of linear positions: options and greeks are not covered"
                raise invalid(f"/positions/{i}/{name}", "linear_only", detail)


def _position(terms: PositionTerms, portfolio: Portfolio, i: int, now: datetime) -> OpenPosition:
    mark = float(portfolio.mark[i])
    entry, leverage = terms.entry_price[i], terms.leverage[i]
    isolated = bool(portfolio.isolated[i])
    return OpenPosition(
        id=str(i),
        symbol=portfolio.symbols[i],
        side="long" if terms.side[i] == "long" else "short",
        size=to_decimal(terms.size[i] or 0.0),
        entry_price=to_decimal(mark if entry is None else entry),
        leverage=None if leverage is None else to_decimal(leverage),
        margin_mode="isolated" if isolated else "pooled",
        allocated=to_decimal(float(portfolio.allocated[i])) if isolated else ZERO,
        realized_pnl=ZERO,
        reducible=True,
        opened_at=now,
    )


def _row(terms: QuoteTerms, portfolio: Portfolio, i: int) -> _Row:
    symbol, own = portfolio.symbols[i], terms.positions.contract_size[i]
    market = terms.margin.parameters.market(symbol, portfolio.underlyings.names[int(portfolio.underlying[i])])
    size = market.contract_size if own is None else own
    contract = Contract(to_decimal(size), to_decimal(market.initial_margin_rate))
    return _Row(float(portfolio.mark[i]), size, contract)


def _holdings(terms: QuoteTerms, allocated: Decimal) -> dict[str, Holding]:
    """Return the wallet by asset: what is lent is not free, what isolated positions hold is USDC."""
    held, lent = _by_asset(terms.collateral, "amount"), _by_asset(terms.collateral, "lent")
    owed = _by_asset(terms.liabilities, "amount")
    money = to_decimal(held.get(SETTLEMENT_ASSET, 0.0)) - to_decimal(lent.get(SETTLEMENT_ASSET, 0.0))
    if allocated > money:
        detail = f"isolated positions hold {allocated:f} {SETTLEMENT_ASSET} of their own, of which there are {money:f}"
        raise invalid("/collateral", "allocated_above_collateral", detail)
    found = {}
    for asset in dict.fromkeys([*held, *owed, SETTLEMENT_ASSET]):
        out, own = to_decimal(lent.get(asset, 0.0)), allocated if asset == SETTLEMENT_ASSET else ZERO
        free = to_decimal(held.get(asset, 0.0)) - out - own
        found[asset] = Holding(free=free, lent=out, allocated=own, owed=to_decimal(owed.get(asset, 0.0)))
    return found


def _by_asset(items: Sequence[CollateralTerms], name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in items:
        found[item.asset] = found.get(item.asset, 0.0) + float(getattr(item, name))
    return found
