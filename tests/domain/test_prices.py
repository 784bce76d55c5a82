"""Which price a quote takes, and what it says where there is none."""

from __future__ import annotations

from datetime import timedelta
from weakref import ref

import pytest

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarketParameters
from app.domain.prices import PriceFinder, StoredPrice
from app.domain.quote import QuoteTerms, margin_quote
from app.domain.terms import build_portfolio
from app.errors import InvalidError
from tests.domain.book import NOW, Book, Holding, Row, book, columns, greeks, linear, option

THEN = NOW - timedelta(minutes=1)
STORED = {
    name: StoredPrice(price, THEN) for name, price in {"BTC": 50_000.0, "BTC-PERP": 50_100.0, "ETH": 2_500.0}.items()
}
BTC = linear("BTC-PERP", "long", 1.0)


def notional(
    *rows: Row, prices: dict[str, float] | None = None, stored: dict[str, StoredPrice] = STORED
) -> list[float]:
    values: list[float] = book(*rows, prices=prices or {}).quote(stored=stored).portfolio.notional.tolist()
    return values


def refused(whole: Book, stored: dict[str, StoredPrice] | None = None) -> list[tuple[str, str]]:
    with pytest.raises(InvalidError) as raised:
        whole.quote(stored=stored)
    return [(e.pointer, e.code) for e in raised.value.errors]


def test_order_of_a_marks_sources() -> None:
    assert notional(BTC | {"mark_price": 1.0}, prices={"BTC": 3.0}) == [1.0]
    assert notional(BTC, prices={"BTC-PERP": 2.0, "BTC": 3.0}) == [2.0]
    assert notional(BTC, prices={"BTC": 3.0}) == [3.0]
    assert notional(BTC) == [50_100.0]
    assert notional(BTC, stored={"BTC": STORED["BTC"]}) == [50_000.0]
    assert notional(linear("USDC-PERP", "long", 7.0), stored={}) == [7.0]


def test_order_of_an_assets_sources() -> None:
    call = option("BTC", "call", "long", 1.0, 50_000.0, 30, 0.5)
    marked = BTC | {"mark_price": 51_000.0}
    assert notional(call, marked, prices={"BTC": 52_000.0})[0] == 52_000.0
    assert notional(call, marked)[0] == 51_000.0
    assert notional(call)[0] == 50_000.0


def test_the_assets_own_symbol_goes_before_its_perpetual_and_that_before_others() -> None:
    call = option("BTC", "call", "long", 1.0, 50_000.0, 30, 0.5)
    spot, perpetual, future = (linear(s, "long", 1.0) for s in ("BTC", "BTC-PERP", "BTC-27MAR26"))
    future, perpetual, spot = future | {"mark_price": 1.0}, perpetual | {"mark_price": 2.0}, spot | {"mark_price": 3.0}
    assert notional(call, future, perpetual, spot)[0] == 3.0
    assert notional(call, future, perpetual)[0] == 2.0
    # the mark of a dated future prices its underlying only where nothing else does
    assert notional(call, future)[0] == 50_000.0
    assert Book(rows=(call, future), prices={}).quote().portfolio.notional[0] == 1.0


LOW, HIGH = BTC | {"mark_price": 59_000.0}, BTC | {"mark_price": 61_000.0}
SPOT = linear("BTC", "long", 1.0, mark_price=61_000.0)


@pytest.mark.parametrize(
    "rows",
    [
        (LOW, HIGH),
        (HIGH, BTC, LOW),
        (HIGH, LOW | {"underlying": "BTC"}),
        (HIGH, greeks("BTC-PERP", 1.0, 1.0, mark_price=1.0)),
    ],
)
def test_two_marks_for_one_symbol_are_told(rows: tuple[Row, ...]) -> None:
    whole = Book(rows=rows, prices={}).quote()
    assert [a.code for a in whole.advisories if a.code == "conflicting_marks"] == ["conflicting_marks"]
    given = [row.get("mark_price") for row in rows]
    lowest = min(mark for mark in given if mark is not None)
    # each row keeps its own; one that gives none takes the lowest, in any order of the rows
    assert whole.portfolio.mark.tolist() == [lowest if mark is None else mark for mark in given]


def test_one_mark_given_twice_is_one_mark() -> None:
    assert notional(HIGH, BTC, HIGH, stored={}) == [61_000.0] * 3
    assert notional(HIGH, HIGH | {"underlying": "BTC"}, prices={"BTC-PERP": 61_000.0}) == [61_000.0] * 2


def test_a_mark_holds_for_its_symbol_with_and_without_its_underlying() -> None:
    stated = BTC | {"underlying": "BTC"}
    assert notional(HIGH, stated, prices={"BTC": 60_990.0}) == [61_000.0] * 2
    assert notional(stated, HIGH, prices={"BTC": 60_990.0}) == [61_000.0] * 2


def priced(*rows: Row, held: float | None = None, owed: float | None = None, **prices: float) -> QuoteTerms:
    """Return a request that gives bitcoin prices beside a holding, beside a debt and as its market's."""
    terms = [CollateralTerms("BTC", 2.0, price) for price in (held, owed)]
    return QuoteTerms(columns(rows), MarginTerms(), terms[:1], terms[1:], prices=prices)


@pytest.mark.parametrize(
    ("terms", "pointer"),
    [
        (priced(held=1.0, owed=2.0), "/liabilities/0/price"),
        (priced(held=1.0, BTC=2.0), "/collateral/0/price"),
        (priced(owed=1.0, BTC=2.0), "/liabilities/0/price"),
    ],
)
def test_two_prices_for_one_asset_are_refused(terms: QuoteTerms, pointer: str) -> None:
    with pytest.raises(InvalidError) as raised:
        margin_quote(terms, STORED, NOW)
    assert [(e.pointer, e.code) for e in raised.value.errors] == [(pointer, "conflicting_price")]


def test_one_price_given_twice_is_one_price() -> None:
    same = priced(SPOT, HIGH, held=61_000.0, owed=61_000.0, BTC=61_000.0)
    assert margin_quote(same, STORED, NOW).prices["BTC"].value == 61_000.0
    # a perpetual's mark is not its asset's price
    assert margin_quote(priced(HIGH, held=60_990.0), STORED, NOW).collateral.price.tolist() == [60_990.0] * 2


def test_a_price_beside_a_holding_or_a_debt_is_told() -> None:
    for terms in (priced(held=5.0), priced(held=5.0, owed=5.0)):
        price = margin_quote(terms, STORED, NOW).prices["BTC"]
        assert (price.value, price.source) == (5.0, "request")


def test_used_prices_are_named() -> None:
    rows = (linear("ETH-PERP", "long", 1.0), linear("BTC-PERP", "long", 1.0, mark_price=51_000.0))
    held = (Holding("BTC", 1.0), Holding("USDC", 1.0), Holding("SOL", 1.0))
    prices = Book(rows=rows, held=held, prices={"SOL": 9.0}).quote(stored=STORED).prices
    found = {name: (p.value, p.source, p.as_of) for name, p in prices.items()}
    assert found["ETH"] == (2_500.0, "stored", THEN)
    assert found["BTC"] == (51_000.0, "position", None)
    assert found["USDC"] == (1.0, "par", None)
    assert found["SOL"] == (9.0, "request", None)


def test_a_depeg_is_a_price_like_any_other() -> None:
    held = (Holding("USDC", 1_000.0),)
    assert Book(held=held, prices={"USDC": 0.9}).quote().equity == pytest.approx(900.0)
    assert Book(held=held, prices={}).quote(stored={"USDC": StoredPrice(0.95, THEN)}).equity == pytest.approx(950.0)


@pytest.mark.parametrize(
    ("whole", "pointer"),
    [
        (book(linear("ETH-PERP", "long", 1.0), linear("NEW-PERP", "long", 1.0)), "/positions/1/mark_price"),
        (book(BTC, option("NEW", "put", "long", 1.0, 1.0, 1, 1.0)), "/positions/1/underlying"),
        (book(held={"USDC": 1.0, "NEW": 1.0}), "/collateral/1/price"),
        (Book(held=(Holding("USDC", 1.0),), owed=(Holding("NEW", 1.0),)), "/liabilities/0/price"),
    ],
)
def test_a_missing_price_is_named(whole: Book, pointer: str) -> None:
    assert refused(whole) == [(pointer, "missing_price")]


def test_a_missing_price_in_units_of_a_limit_is_named() -> None:
    limited = {"NEW": {"concentration_limit": 1.0}}
    assert refused(Book(rows=(greeks("NEW", 1.0, 1.0),), assets=limited, mode="portfolio"))[0][1] == "missing_price"


def test_a_holding_may_carry_its_own_price() -> None:
    terms = QuoteTerms(columns([BTC]), MarginTerms(), [CollateralTerms("BTC", 2.0, 40_000.0)])
    quote = margin_quote(terms, STORED, NOW)
    assert quote.collateral.collateral_value == pytest.approx(2 * 40_000 * 0.9)
    assert quote.portfolio.notional.tolist() == [40_000.0]


@pytest.mark.parametrize(
    ("row", "name", "code"),
    [
        ({"symbol": "BTC-PERP", "side": "long"}, "size", "missing"),
        ({"symbol": "BTC-PERP", "size": 1.0}, "side", "missing"),
        ({"symbol": "BTC", "notional": 1.0}, "delta", "missing"),
        (option("BTC", "call", "long", 1.0, 1.0, 1, 1.0) | {"iv": None}, "iv", "missing"),
        (option("BTC", "call", "long", 1.0, 1.0, 1, 1.0) | {"underlying": None}, "underlying", "missing"),
        (option("BTC", "call", "long", 1.0, 1.0, 1, 1.0, leverage=3.0), "leverage", "not_allowed"),
        (linear("BTC-PERP", "long", 1.0, iv=0.5), "iv", "not_allowed"),
        (greeks("BTC", 1.0, 1.0, size=1.0), "size", "not_allowed"),
    ],
)
def test_a_position_of_the_wrong_form_is_refused(row: Row, name: str, code: str) -> None:
    assert (f"/positions/1/{name}", code) in refused(book(BTC, row))


@pytest.mark.parametrize(
    "row",
    [
        linear("BTC-PERP", "long", 1.0, underlying="ETH"),
        linear("BTC", "long", 1.0, underlying="ETH"),
        greeks("BTC-PERP", 1.0, 1.0, underlying="NEW"),
        option("ETH", "call", "long", 1.0, 1.0, 1, 1.0, symbol="BTC-PERP"),
    ],
)
def test_an_underlying_other_than_the_listed_one_is_refused(row: Row) -> None:
    whole = book(BTC, BTC, row)
    for _ in range(2):  # what is remembered of a book must not let it through
        assert refused(whole) == [("/positions/2/underlying", "conflicting_underlying")]


def test_an_underlying_may_be_stated() -> None:
    future = linear("BTC-27MAR26", "long", 1.0, underlying="ETH")  # it is not listed: the caller knows best
    quote = book(BTC | {"underlying": "BTC"}, future).quote()
    assert [quote.portfolio.underlyings.names[j] for j in quote.portfolio.underlying] == ["BTC", "ETH"]


@pytest.mark.parametrize("forward", [29_999.0, 120_001.0])
def test_a_forward_off_the_market_is_refused(forward: float) -> None:
    call = option("BTC", "call", "long", 1.0, 50_000.0, 30, 0.5)
    assert refused(book(BTC, call, call | {"forward": forward})) == [("/positions/2/forward", "forward_off_market")]


def test_a_forward_is_held_to_the_price_that_the_quote_uses() -> None:
    call = option("BTC", "call", "long", 1.0, 50_000.0, 30, 0.5, forward=60_000.0)
    assert book(call | {"forward": 30_000.0}, call | {"forward": 120_000.0}).quote().portfolio.options.forward.tolist()
    whole = Book(rows=(BTC | {"mark_price": 20_000.0}, call), prices={})
    assert refused(whole) == [("/positions/1/forward", "forward_off_market")]


@pytest.mark.parametrize("days", [0.0, -1.0])
def test_an_expired_option_is_refused(days: float) -> None:
    whole = book(BTC, option("BTC", "call", "long", 1.0, 50_000.0, days, 0.5))
    assert refused(whole) == [("/positions/1/expiry", "option_expired")]


def test_a_flat_position_prices_nothing_but_itself() -> None:
    held = (Holding("BTC", 1.0),)
    flat = linear("BTC-PERP", "long", 0.0, mark_price=90_000.0)
    with_flat, without = (Book(rows=rows, held=held, prices={}).quote(stored=STORED) for rows in ((flat,), ()))
    assert with_flat.equity == without.equity


def test_the_mark_of_a_dated_future_does_not_go_before_the_stored_price() -> None:
    made_up = linear("BTC-FOO", "long", 1e-9, mark_price=1e9)
    quote = Book(rows=(made_up,), held=(Holding("BTC", 1.0),), prices={}).quote(stored=STORED)
    assert quote.prices["BTC"].source == "stored"


def test_a_book_on_many_markets_is_not_kept() -> None:
    """Only its caller holds its tables, a correlation for each pair of underlyings among them."""
    shipped = MarketParameters()
    for count, is_kept in ((3, True), (200, False)):
        rows = [linear(f"A{k}-PERP", "long", 1.0, mark_price=100.0) for k in range(count)]
        terms, tables = columns(rows), []
        for _ in range(2):
            table = build_portfolio(terms, shipped, PriceFinder(shipped, {}, {}), NOW).underlyings
            assert table.stress.shape == (count, count)
            tables.append(ref(table))
            del table
        assert [found() is not None for found in tables] == [is_kept, is_kept]
