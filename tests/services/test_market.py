from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from app.domain.parameters import AssetParameters, InstrumentParameters, MarketParameters
from app.domain.prices import StoredPrice
from app.errors import ConflictError, InvalidError, NotFoundError, PrimeriskError
from app.services.market import (
    AssetChange,
    InstrumentChange,
    Matrix,
    get_asset,
    get_instrument,
    list_changes,
    load_parameters,
    load_versions,
    put_asset,
    put_correlation,
    put_instrument,
    put_model_parameters,
)
from app.services.market_cache import MarketCache
from app.services.parameter_versions import Versioned
from app.services.prices import PRICES_A_POST_MAX, PostedPrices, load_prices, post_prices
from tests.database import shipped_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from app.db.session import Database

SKEW = timedelta(seconds=5)
BTC = MarketParameters().assets["BTC"]


async def _put_asset(
    database: Database, asset: str, change: AssetChange, expected: int | None = None
) -> Versioned[AssetParameters]:
    async with database.transaction("tester") as tx:
        return await put_asset(tx, asset, change, expected)


async def _put_instrument(
    database: Database, symbol: str, change: InstrumentChange, expected: int | None = None
) -> Versioned[InstrumentParameters]:
    async with database.transaction("tester") as tx:
        return await put_instrument(tx, symbol, change, expected)


async def _put_models(database: Database, changes: Mapping[str, float]) -> int:
    async with database.transaction("tester") as tx:
        return (await put_model_parameters(tx, changes)).version


async def _put_correlation(
    database: Database, matrix: Matrix, pair: tuple[str, str] | None, value: float
) -> Versioned[float]:
    async with database.transaction("tester") as tx:
        return await put_correlation(tx, matrix, pair, value)


async def _post(database: Database, prices: Mapping[str, str], as_of: datetime | None = None) -> PostedPrices:
    async with database.transaction("feed") as tx:
        return await post_prices(tx, {s: Decimal(p) for s, p in prices.items()}, as_of, SKEW)


async def _parameters(database: Database, at: int | None = None) -> MarketParameters:
    async with database.transaction("reader") as tx:
        return await load_parameters(tx, at)


async def _prices(database: Database) -> dict[str, StoredPrice]:
    async with database.transaction("reader") as tx:
        return await load_prices(tx)


async def _now(database: Database) -> datetime:
    async with database.transaction("reader") as tx:
        return tx.now


def _pointers(error: PrimeriskError) -> list[str]:
    return [field.pointer for field in error.errors]


# --- assets


async def test_fields_left_out_keep_their_value(database: Database) -> None:
    put = await _put_asset(database, "BTC", {"haircut": 0.2})
    assert put == Versioned(replace(BTC, haircut=0.2), 2)
    put = await _put_asset(database, "BTC", {"volatility": None, "concentration_limit": 1500})
    assert put == Versioned(replace(BTC, haircut=0.2, volatility=None, concentration_limit=1500), 3)
    parameters = await _parameters(database)
    assert (parameters.version, parameters.asset("BTC")) == (3, put.value)


async def test_a_new_asset_starts_from_the_default(database: Database) -> None:
    await _put_asset(database, "default", {"haircut": 0.6})
    put = await _put_asset(database, "DOGE", {"price_range": 0.5})
    assert put == Versioned(AssetParameters("DOGE", haircut=0.6, price_range=0.5), 3)
    assert (await _parameters(database)).asset("XYZ") == AssetParameters("default", haircut=0.6)


async def test_a_new_asset_may_equal_the_default_and_is_then_fixed(database: Database) -> None:
    assert (await _put_asset(database, "DOGE", {})).version == 2
    await _put_asset(database, "default", {"haircut": 0.6})
    assert (await _parameters(database)).asset("DOGE").haircut == 0.5


async def test_a_change_of_nothing_writes_no_version(database: Database) -> None:
    assert await _put_asset(database, "BTC", {"haircut": 0.10}) == Versioned(BTC, 1)
    assert (await _parameters(database)).version == 1


async def test_every_version_stays_readable(database: Database) -> None:
    await _put_asset(database, "BTC", {"haircut": 0.2})
    await _put_asset(database, "ETH", {"haircut": 0.3})
    assert await _parameters(database, at=1) == shipped_parameters()
    second = await _parameters(database, at=2)
    assert (second.asset("BTC").haircut, second.asset("ETH").haircut) == (0.2, 0.12)
    async with database.transaction("reader") as tx:
        assert await get_asset(tx, "BTC", at=1) == Versioned(BTC, 1)
        assert (await get_asset(tx, "BTC")).version == 2
        assert (await get_asset(tx, "BTC", at=3)).version == 2


@pytest.mark.parametrize("at", [0, 2, -1])
async def test_a_version_that_never_was_is_not_found(database: Database, at: int) -> None:
    with pytest.raises(NotFoundError):
        await _parameters(database, at)


async def test_what_is_not_listed_is_not_found(database: Database) -> None:
    async with database.transaction("reader") as tx:
        with pytest.raises(NotFoundError):
            await get_asset(tx, "DOGE")
        with pytest.raises(NotFoundError):
            await get_instrument(tx, "DOGE-PERP")


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({"haircut": 1.01}, ["/haircut"]),
        ({"haircut": -0.01, "price_range": 1.0}, ["/haircut", "/price_range"]),
        ({"haircut": float("nan")}, ["/haircut"]),
        ({"volatility": float("inf")}, ["/volatility"]),
        ({"concentration_limit": 1e15}, ["/concentration_limit"]),
        ({"volatility_range": 0}, ["/volatility_range"]),
        ({"maintenance_margin_rate": 0.31}, ["/maintenance_margin_rate"]),
        ({"initial_margin_rate": 0.14}, ["/maintenance_margin_rate"]),
    ],
)
async def test_an_asset_out_of_range_is_refused(database: Database, change: AssetChange, pointers: list[str]) -> None:
    with pytest.raises(InvalidError) as caught:
        await _put_asset(database, "BTC", change)
    assert _pointers(caught.value) == pointers
    assert (await _parameters(database)).version == 1


@pytest.mark.parametrize("asset", ["", "*", " BTC", "BTC\n", "B" * 65, "B\0"])
async def test_a_name_that_is_no_symbol_is_refused(database: Database, asset: str) -> None:
    with pytest.raises(InvalidError):
        await _put_asset(database, asset, {})


async def test_the_expected_version_must_be_the_stored_one(database: Database) -> None:
    assert (await _put_asset(database, "BTC", {"haircut": 0.2}, expected=1)).version == 2
    with pytest.raises(ConflictError, match="at version 2, not 1"):
        await _put_asset(database, "BTC", {"haircut": 0.3}, expected=1)
    with pytest.raises(ConflictError):
        await _put_asset(database, "ETH", {"haircut": 0.3}, expected=0)
    assert (await _put_asset(database, "DOGE", {}, expected=0)).version == 3


async def test_changes_at_once_are_all_kept(database: Database) -> None:
    fields: list[AssetChange] = [
        {"haircut": 0.2},
        {"volatility": 0.7},
        {"price_range": 0.25},
        {"concentration_limit": 9.0},
        {"initial_margin_rate": 0.4},
        {"maintenance_margin_rate": 0.1},
    ]
    puts = await asyncio.gather(*(_put_asset(database, "BTC", change) for change in fields))
    assert sorted(put.version for put in puts) == [2, 3, 4, 5, 6, 7]
    merged: AssetChange = {}
    for change in fields:
        merged.update(change)
    assert (await _parameters(database)).asset("BTC") == replace(BTC, **merged)


async def test_one_of_two_with_the_same_expectation_wins(database: Database) -> None:
    puts = (_put_asset(database, "BTC", {"haircut": h}, expected=1) for h in (0.2, 0.3, 0.4))
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["ConflictError"] * 2 + ["Versioned"]
    assert (await _parameters(database)).version == 2


async def test_a_rolled_back_change_leaves_no_gap(database: Database) -> None:
    async with database.transaction("tester") as tx:
        await put_asset(tx, "BTC", {"haircut": 0.2})
        await tx.connection.rollback()
    assert (await _put_asset(database, "BTC", {"haircut": 0.3})).version == 2


async def test_the_audit_trail_names_who_and_what(database: Database) -> None:
    await _put_asset(database, "BTC", {"haircut": 0.2})
    await _put_instrument(database, "BTC-PERP", {"price_range": 0.2})
    await _put_models(database, {"scenario_factor": 1.3, "zone_red": 0.9})
    await _put_correlation(database, "hedge", ("ETH", "BTC"), 0.5)
    async with database.transaction("reader") as tx:
        changes = await list_changes(tx, limit=10)
        assert await list_changes(tx, limit=2, before=3) == changes[3:]
    assert [(c.version, c.changed_by, c.kind, c.name) for c in changes] == [
        (5, "tester", "correlation", "hedge:BTC:ETH"),
        (4, "tester", "model", "scenario_factor,zone_red"),
        (3, "tester", "instrument", "BTC-PERP"),
        (2, "tester", "asset", "BTC"),
        (1, "migration", "seed", "defaults"),
    ]


# --- instruments


async def test_a_new_instrument_takes_its_underlying_from_its_symbol(database: Database) -> None:
    put = await _put_instrument(database, "DOGE-PERP", {"initial_margin_rate": 0.4})
    assert put == Versioned(InstrumentParameters("DOGE-PERP", "DOGE", initial_margin_rate=0.4), 2)
    async with database.transaction("reader") as tx:
        assert await get_instrument(tx, "DOGE-PERP") == put


async def test_a_rate_set_to_none_is_the_underlyings_again(database: Database) -> None:
    await _put_instrument(database, "BTC-PERP", {"initial_margin_rate": 0.4})
    await _put_instrument(database, "BTC-PERP", {"initial_margin_rate": None})
    assert (await _parameters(database)).instruments == MarketParameters().instruments


@pytest.mark.parametrize("change", [{"underlying": "ETH"}, {"kind": "future"}])
async def test_what_a_contract_is_never_changes(database: Database, change: InstrumentChange) -> None:
    with pytest.raises(ConflictError) as caught:
        await _put_instrument(database, "BTC-PERP", change)
    assert _pointers(caught.value) == [f"/{next(iter(change))}"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"initial_margin_rate": 0.1}, "/maintenance_margin_rate"),  # below BTC's maintenance .15
        ({"maintenance_margin_rate": 0.35}, "/maintenance_margin_rate"),  # above BTC's initial .30
        ({"contract_size": 0}, "/contract_size"),
        ({"contract_size": float("nan")}, "/contract_size"),
        ({"price_range": 1}, "/price_range"),
        ({"volatility": 101}, "/volatility"),
    ],
)
async def test_an_instrument_out_of_range_is_refused(
    database: Database, change: InstrumentChange, pointer: str
) -> None:
    with pytest.raises(InvalidError) as caught:
        await _put_instrument(database, "BTC-PERP", change)
    assert _pointers(caught.value) == [pointer]


@pytest.mark.parametrize(("symbol", "asset"), [("BTC-PERP", "BTC"), ("DOGE-PERP", "default")])
async def test_an_asset_may_not_break_an_instrument_that_inherits_from_it(
    database: Database, symbol: str, asset: str
) -> None:
    await _put_instrument(database, symbol, {"initial_margin_rate": 0.2})
    with pytest.raises(InvalidError, match=symbol):
        await _put_asset(database, asset, {"maintenance_margin_rate": 0.25})


# --- models and correlations


async def test_model_parameters_are_set_by_name(database: Database) -> None:
    assert await _put_models(database, {"scenario_factor": 1.3, "zone_red": 0.9}) == 2
    assert await _put_models(database, {"scenario_factor": 1.3}) == 2
    parameters = await _parameters(database)
    assert parameters.models == replace(MarketParameters().models, scenario_factor=1.3)
    assert parameters.policy == replace(MarketParameters().policy, zone_red=0.9)


@pytest.mark.parametrize(
    ("changes", "pointers"),
    [
        ({"no_such": 1.0, "nor_this": 2.0}, ["/no_such", "/nor_this"]),
        ({"scenario_factor": 0.0}, ["/scenario_factor"]),
        ({"scenario_factor": float("nan")}, ["/scenario_factor"]),
        ({"maintenance_fraction": 1.1}, ["/maintenance_fraction"]),
        ({"breach_utilization": 0.7}, ["/gate_utilization", "/cure_utilization"]),
        ({"zone_yellow": 0.8}, ["/zone_yellow"]),
        ({"var_window_days": 59.0}, ["/var_window_days"]),
        ({"var_degrees": 2.0}, ["/var_degrees"]),
        ({"var_age_decay": 1.0}, ["/var_age_decay"]),
    ],
)
async def test_model_parameters_out_of_range_are_refused(
    database: Database, changes: dict[str, float], pointers: list[str]
) -> None:
    with pytest.raises(InvalidError) as caught:
        await _put_models(database, changes)
    assert _pointers(caught.value) == pointers


async def test_a_correlation_is_set_in_either_order(database: Database) -> None:
    assert await _put_correlation(database, "hedge", ("ETH", "BTC"), 0.5) == Versioned(0.5, 2)
    assert await _put_correlation(database, "hedge", ("BTC", "ETH"), 0.5) == Versioned(0.5, 2)
    assert await _put_correlation(database, "stress", ("DOGE", "BTC"), -0.1) == Versioned(-0.1, 3)
    assert await _put_correlation(database, "stress", None, 0.75) == Versioned(0.75, 4)
    parameters = await _parameters(database)
    assert parameters.hedge.between("ETH", "BTC") == 0.5
    assert parameters.stress.between("BTC", "DOGE") == -0.1
    assert parameters.stress.between("X", "Y") == 0.75
    assert (parameters.stress.between("BTC", "ETH"), parameters.hedge.other) == (0.95, 0.40)


async def test_a_regime_has_pairs_of_its_own_and_nothing_for_the_others(database: Database) -> None:
    assert await _put_correlation(database, "sell_off", ("ETH", "BTC"), 0.99) == Versioned(0.99, 2)
    assert await _put_correlation(database, "normal", ("DOGE", "BTC"), 0.6) == Versioned(0.6, 3)
    regimes = (await _parameters(database)).regimes
    assert regimes["sell_off"] == {("BTC", "ETH"): 0.99, ("BTC", "SOL"): 0.90, ("ETH", "SOL"): 0.92}
    assert regimes["normal"]["BTC", "DOGE"] == 0.6
    with pytest.raises(InvalidError) as caught:
        await _put_correlation(database, "sideways", None, 0.5)
    assert caught.value.code == "pair_needed"


@pytest.mark.parametrize(
    ("pair", "value"),
    [(("BTC", "ETH"), 1.01), (("BTC", "ETH"), float("nan")), (("BTC", "BTC"), 1.0), (("*", "BTC"), 0.5)],
)
async def test_a_correlation_out_of_range_is_refused(database: Database, pair: tuple[str, str], value: float) -> None:
    with pytest.raises(InvalidError):
        await _put_correlation(database, "stress", pair, value)


# --- prices


async def test_prices_keep_their_digits_and_their_time(database: Database) -> None:
    as_of = await _now(database)
    assert await _post(database, {"BTC": "88500.10", "ETH": "2840.000000000000000001"}, as_of) == (PostedPrices(2, 0))
    assert await _prices(database) == {"BTC": StoredPrice(88500.1, as_of), "ETH": StoredPrice(2840.0, as_of)}
    async with database.transaction("reader") as tx:
        query = text("SELECT symbol, price::text FROM market_prices ORDER BY symbol")
        rows = [tuple(row) for row in await tx.connection.execute(query)]
    assert rows == [("BTC", "88500.10"), ("ETH", "2840.000000000000000001")]


async def test_the_newer_time_wins_per_symbol(database: Database) -> None:
    now = await _now(database)
    await _post(database, {"BTC": "2"}, now)
    posted = await _post(database, {"BTC": "1", "ETH": "3"}, now - timedelta(seconds=1))
    assert posted == PostedPrices(1, 1)
    assert {s: p.value for s, p in (await _prices(database)).items()} == {"BTC": 2.0, "ETH": 3.0}


async def test_a_post_sent_twice_is_answered_alike(database: Database) -> None:
    now = await _now(database)
    for _ in range(2):
        assert await _post(database, {"BTC": "2.0", "ETH": "3"}, now) == PostedPrices(2, 0)
    assert await _post(database, {"BTC": "2.5", "ETH": "3"}, now) == PostedPrices(1, 1)
    assert (await _prices(database))["BTC"].value == 2.0


async def test_no_time_means_now(database: Database) -> None:
    before = await _now(database)
    await _post(database, {"BTC": "1"})
    assert before < (await _prices(database))["BTC"].as_of <= await _now(database)


async def test_no_prices_are_no_change(database: Database) -> None:
    assert await _post(database, {}) == PostedPrices(0, 0)


async def test_a_time_too_far_ahead_is_refused(database: Database) -> None:
    now = await _now(database)
    assert (await _post(database, {"BTC": "1"}, now + SKEW)).accepted == 1
    with pytest.raises(InvalidError) as caught:
        await _post(database, {"BTC": "1"}, now + SKEW + timedelta(seconds=5))
    assert _pointers(caught.value) == ["/as_of"]
    with pytest.raises(InvalidError):
        await _post(database, {"BTC": "1"}, now.replace(tzinfo=None))


@pytest.mark.parametrize("price", ["0", "-1", "NaN", "sNaN", "Infinity", "1e15", "1e400", "1E+1000000", "1e-19"])
async def test_a_price_out_of_bounds_is_refused_and_none_is_stored(database: Database, price: str) -> None:
    with pytest.raises(InvalidError) as caught:
        await _post(database, {"BTC": "1", "A/B": price})
    assert _pointers(caught.value) == ["/prices/A~1B"]
    assert await _prices(database) == {}


@pytest.mark.parametrize("symbol", ["", "BTC\0", "B" * 65, "Ƀ", "\ud800"])
async def test_a_symbol_that_is_none_is_refused(database: Database, symbol: str) -> None:
    with pytest.raises(InvalidError):
        await _post(database, {symbol: "1"})


async def test_ten_thousand_prices_are_one_post(database: Database) -> None:
    prices = {f"S{n}": f"{n + 1}.5" for n in range(PRICES_A_POST_MAX)}
    assert await _post(database, prices) == PostedPrices(PRICES_A_POST_MAX, 0)
    assert (await _prices(database))["S9999"].value == 10_000.5
    with pytest.raises(InvalidError, match="10000"):
        await _post(database, prices | {"ONE-MORE": "1"})


async def test_an_older_price_never_overwrites_a_newer_one(database: Database) -> None:
    """Thirty posts at once, in every order of symbols and times: each symbol ends at its newest price."""
    now = await _now(database)
    symbols = [f"S{n}" for n in range(50)]

    async def post(n: int) -> PostedPrices:
        order = symbols if n % 2 else symbols[::-1]
        return await _post(database, dict.fromkeys(order, str(n + 1)), now + timedelta(microseconds=n))

    posted = await asyncio.gather(*(post((n * 7) % 30) for n in range(30)))
    assert all(p.accepted in (0, 50) for p in posted)
    newest = StoredPrice(30.0, now + timedelta(microseconds=29))
    assert await _prices(database) == dict.fromkeys(symbols, newest)


# --- the view in memory


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110  the cache has no event to wait for
            await asyncio.sleep(0.01)


async def test_the_cache_starts_from_the_packages_defaults(database: Database) -> None:
    cache = MarketCache(database)
    assert cache.view.parameters == MarketParameters()
    age_before = cache.age_seconds
    view = await cache.refresh()
    assert age_before is None
    assert view is cache.view
    assert view.parameters == shipped_parameters()
    assert cache.age_seconds is not None
    assert view.read_at is not None


async def test_a_refresh_after_the_commit_sees_it(database: Database) -> None:
    cache = MarketCache(database)
    await cache.refresh()
    await _put_asset(database, "BTC", {"haircut": 0.2})
    await _post(database, {"BTC": "60000", "ETH-PERP": "3001"})
    await _post(database, {"ETH": "3000"})
    view = await cache.refresh()
    assert view.parameters.asset("BTC").haircut == 0.2
    values = {s: p.value for s in ("BTC", "ETH-PERP", "ETH") if (p := view.prices.get(s))}
    assert values == {"BTC": 60000.0, "ETH-PERP": 3001.0, "ETH": 3000.0}
    assert view.prices.get("DOGE") is None


async def test_what_did_not_change_is_not_read_again(database: Database) -> None:
    cache = MarketCache(database)
    await _post(database, {"BTC": "60000"})
    first = await cache.refresh()
    second = await cache.refresh()
    assert second.parameters is first.parameters
    assert second.prices is first.prices
    assert first.read_at is not None
    assert second.read_at is not None
    assert second.read_at > first.read_at


async def test_no_price_is_missed_however_commits_and_refreshes_interleave(database: Database) -> None:
    cache = MarketCache(database)

    async def write(n: int) -> None:
        await _post(database, {f"S{n}": str(n + 1)})
        assert (await cache.refresh()).prices[f"S{n}"].value == n + 1

    await asyncio.gather(*(write(n) for n in range(60)))
    assert dict(cache.view.prices) == await _prices(database)


async def test_an_uncommitted_price_is_neither_seen_nor_skipped(database: Database) -> None:
    cache = MarketCache(database)
    async with database.transaction("feed") as slow:
        await post_prices(slow, {"BTC": Decimal(1)}, None, SKEW)
        quick = asyncio.create_task(_post(database, {"ETH": "2"}))
        await asyncio.sleep(0.1)
        assert dict((await cache.refresh()).prices) == {}
        assert not quick.done()
    await quick
    assert set((await cache.refresh()).prices) == {"BTC", "ETH"}


async def test_callers_at_once_share_a_read(database: Database) -> None:
    cache = MarketCache(database)
    views = await asyncio.gather(*(cache.refresh() for _ in range(20)))
    assert len({view.read_at for view in views}) <= 2


async def test_the_loop_survives_an_outage_and_says_so_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="app.services.market_cache")
    await _post(database, {"BTC": "1"})
    cache = MarketCache(database)
    loop = asyncio.create_task(cache.run(0.01))
    await _until(lambda: "BTC" in cache.view.prices)
    async with database.transaction("vandal") as tx:
        await tx.connection.execute(text("ALTER TABLE market_state RENAME TO gone"))
    await _until(lambda: bool(caplog.messages))
    await asyncio.sleep(0.1)
    assert len(caplog.messages) == 1
    assert cache.view.prices["BTC"].value == 1.0
    assert (cache.age_seconds or 0) > 0.05
    async with database.transaction("vandal") as tx:
        await tx.connection.execute(text("ALTER TABLE gone RENAME TO market_state"))
    await _post(database, {"BTC": "2"})
    await _until(lambda: cache.view.prices["BTC"].value == 2.0)
    assert caplog.messages[1:] == ["the market is read again"]
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_versions_only_grow(database: Database) -> None:
    async with database.transaction("reader") as tx:
        assert (await load_versions(tx))[:2] == (1, 0)
    await _post(database, {"BTC": "1"})
    await _put_asset(database, "BTC", {"haircut": 0.2})
    async with database.transaction("reader") as tx:
        assert (await load_versions(tx))[:2] == (2, 1)
