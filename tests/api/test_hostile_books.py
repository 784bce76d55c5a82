"""Bodies and addresses that mean harm to a book: each is refused with a name, and nothing is booked."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import pytest_asyncio

from app.db.session import parse_database_url
from tests.api.service import Agent, problem, running
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

ORDER = {"symbol": "BTC-PERP", "side": "buy", "size": 0.001}
DEPOSIT = {"asset": "USDC", "amount": 5}
RESERVE = {"service": "casino", "amount": 5}
SPELLED = "what stands here is spelled by the case"
ORDERS, DEPOSITS, WITHDRAWALS = "/orders", "/wallet/deposits", "/wallet/withdrawals"
RESERVATIONS, SETTINGS = "/reservations", "/account/settings"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rich(postgres_server: str, database_template: str) -> AsyncIterator[Agent]:
    """Yield an agent with money, a position and a reservation."""
    async with (
        fresh_database(postgres_server, database_template) as url,
        running(parse_database_url(url), requests_per_second=0) as service,
    ):
        await service.prices(BTC=60_000, BTC_PERP=60_000)
        agent = await service.agent("rich")
        await agent.deposit(USDC=100_000)
        await agent.order("BTC-PERP", "buy", 1)
        await agent.post(RESERVATIONS, RESERVE | {"reducible": True})
        yield agent


class Case(NamedTuple):
    name: str
    path: str
    body: bytes
    status: int
    code: str
    pointer: str | None = None


def _with(body: dict[str, Any], field: str, spelled: str | bytes) -> bytes:
    value = spelled if isinstance(spelled, bytes) else spelled.encode()
    return json.dumps(body | {field: SPELLED}).encode().replace(json.dumps(SPELLED).encode(), value)


def _amount(name: str, spelled: str, code: str, *, path: str = DEPOSITS) -> Case:
    return Case(name, path, _with(DEPOSIT, "amount", spelled), 422, code, "/amount")


def _size(name: str, spelled: str, code: str) -> Case:
    return Case(name, ORDERS, _with(ORDER, "size", spelled), 422, code, "/size")


def _order(name: str, field: str, spelled: str | bytes, code: str, pointer: str | None = None) -> Case:
    return Case(name, ORDERS, _with(ORDER, field, spelled), 422, code, pointer or f"/{field}")


def _meta(name: str, spelled: str | bytes, code: str, pointer: str = "/meta") -> Case:
    return Case(name, ORDERS, _with(ORDER, "meta", spelled), 422, code, pointer)


NUMBERS = [
    _amount("NaN", "NaN", "not_finite"),
    _amount("Infinity", "Infinity", "not_finite"),
    _amount('"NaN"', '"NaN"', "invalid_value"),
    _amount('"sNaN"', '"sNaN"', "invalid_value"),
    _amount('"-Infinity"', '"-Infinity"', "invalid_value"),
    _amount("1e400", "1e400", "number_out_of_range"),
    _amount("1E+1000000", "1E+1000000", "number_out_of_range"),
    _amount('"1E+999999999999999999"', '"1E+999999999999999999"', "invalid_value"),
    _amount('"1_000"', '"1_000"', "invalid_value"),
    _amount('" 5 "', '" 5 "', "invalid_value"),
    _amount("Arabic digits", '"\u0665"', "invalid_value"),
    _amount("an exponent past Decimal", "1E+9999999999999999999", "invalid_value"),
    _amount("1E-2000000", "1E-2000000", "too_many_decimals"),
    _amount("zero", "0", "not_positive"),
    _amount("minus zero", "-0.0", "not_positive"),
    _amount("negative", "-1", "not_positive"),
    _amount("19 decimals", "0.1234567890123456789", "too_many_decimals"),
    _amount("19 decimals, 31 digits", "100000000000.1234567890123456789", "too_many_decimals"),
    _amount("a million decimals", "1." + "0" * 1_000_000 + "1", "too_many_decimals"),
    _amount("too large", "1000000000000000", "number_out_of_range"),
    _amount("a boolean", "true", "invalid_value"),
    _amount("null", "null", "invalid_value"),
    _amount("words", '"five"', "invalid_value"),
    _amount("withdraw NaN", '"NaN"', "invalid_value", path=WITHDRAWALS),
    _amount("withdraw 1E-2000000", "1E-2000000", "too_many_decimals", path=WITHDRAWALS),
    Case("reserve less than nothing", RESERVATIONS, _with(RESERVE, "amount", "-5"), 422, "not_positive", "/amount"),
    Case("reserve NaN", RESERVATIONS, _with(RESERVE, "amount", "NaN"), 422, "not_finite", "/amount"),
    _size("order of NaN", '"NaN"', "invalid_value"),
    _size("order of nothing", "0", "not_positive"),
    _size("order of less", "-1", "not_positive"),
    _size("order of 1e400", "1e400", "number_out_of_range"),
    _size("order of 19 decimals", "1.1234567890123456789", "too_many_decimals"),
    _order("leverage NaN", "leverage", '"NaN"', "invalid_value"),
    _order("leverage 0", "leverage", "0", "not_positive"),
    _order("leverage -3", "leverage", "-3", "not_positive"),
    _order("leverage 1001", "leverage", "1001", "number_out_of_range"),
    _order("leverage 1e400", "leverage", "1e400", "number_out_of_range"),
    _order("leverage of 20,001 decimals", "leverage", "3." + "0" * 20_000 + "1", "too_many_decimals"),
]

TEXTS = [
    Case(
        "NUL in a reference", DEPOSITS, _with(DEPOSIT, "reference", r'"a\u0000b"'), 422, "invalid_value", "/reference"
    ),
    Case(
        "a long reference", DEPOSITS, _with(DEPOSIT, "reference", f'"{"x" * 201}"'), 422, "invalid_value", "/reference"
    ),
    Case("a reference of 1 MB", DEPOSITS, _with(DEPOSIT, "reference", f'"{"x" * 10**6}"'), 422, "invalid_value"),
    Case("a lone surrogate", DEPOSITS, _with(DEPOSIT, "reference", r'"\ud800"'), 400, "not_json"),
    Case("no UTF-8", DEPOSITS, _with(DEPOSIT, "reference", b'"\xff"'), 400, "not_json"),
    Case("NUL in an asset", DEPOSITS, _with(DEPOSIT, "asset", r'"USDC\u0000"'), 422, "invalid_symbol", "/asset"),
    Case("a line feed after an asset", DEPOSITS, _with(DEPOSIT, "asset", r'"USDC\n"'), 422, "invalid_symbol", "/asset"),
    Case("SQL for an asset", DEPOSITS, _with(DEPOSIT, "asset", '"x\'; DROP TABLE agents"'), 422, "invalid_symbol"),
    Case("an empty asset", DEPOSITS, _with(DEPOSIT, "asset", '""'), 422, "invalid_symbol", "/asset"),
    Case("an asset of 65 letters", DEPOSITS, _with(DEPOSIT, "asset", f'"{"A" * 65}"'), 422, "invalid_symbol", "/asset"),
    Case("an asset that nobody priced", DEPOSITS, _with(DEPOSIT, "asset", '"NOPE"'), 422, "missing_price", "/asset"),
    Case("withdraw a name of 1 MB", WITHDRAWALS, _with(DEPOSIT, "asset", f'"{"A" * 10**6}"'), 422, "invalid_symbol"),
    _order("a symbol of 1 MB", "symbol", f'"{"A" * 10**6}"', "invalid_symbol"),
    _order("a symbol with NUL", "symbol", r'"BTC\u0000"', "invalid_symbol"),
    _order("a symbol without a price", "symbol", '"NOPE-PERP"', "missing_price"),
    _order("the symbol of every pair", "symbol", '"*"', "invalid_symbol"),
    Case(
        "a service of capitals", RESERVATIONS, _with(RESERVE, "service", '"Casino"'), 422, "invalid_service", "/service"
    ),
    Case(
        "a service with NUL", RESERVATIONS, _with(RESERVE, "service", r'"a\u0000"'), 422, "invalid_service", "/service"
    ),
    Case("a line feed after a service", RESERVATIONS, _with(RESERVE, "service", r'"a\n"'), 422, "invalid_service"),
    Case("a service of 33 letters", RESERVATIONS, _with(RESERVE, "service", f'"{"a" * 33}"'), 422, "invalid_service"),
]

METAS = [
    _meta("NUL in meta", r'{"a":"\u0000"}', "invalid_value"),
    _meta("NUL in a key of meta", r'{"a\u0000":1}', "invalid_value"),
    _meta("meta of 100 kB", json.dumps({"a": "x" * 100_000}), "too_long"),
    _meta("meta of 201 levels", '{"a":' + "[" * 200 + "]" * 200 + "}", "nested_too_deeply"),
    _meta("deep meta", '{"a":' + "[" * 700 + "]" * 700 + "}", "nested_too_deeply"),
    _meta("meta of 100,000 levels", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "nested_too_deeply", ""),
    _meta("meta is a text", '"a"', "invalid_value"),
    _meta("meta is a list", "[]", "invalid_value"),
    _meta("NaN in meta", '{"a":NaN}', "not_finite", "/meta/a"),
    _meta("1e400 in meta", '{"a":1e400}', "number_out_of_range", "/meta/a"),
    _meta("a key twice in meta", '{"a":1,"a":2}', "duplicate_key", "/meta/a"),
]

SHAPES = [
    Case("no body", DEPOSITS, b"", 400, "not_json"),
    Case("an array", DEPOSITS, b"[]", 422, "invalid_value", ""),
    Case("nothing given", DEPOSITS, b"{}", 422, "missing_field", "/asset"),
    Case("no amount", DEPOSITS, b'{"asset":"USDC"}', 422, "missing_field", "/amount"),
    Case("an amount twice", DEPOSITS, b'{"asset":"USDC","amount":1,"amount":2}', 422, "duplicate_key", "/amount"),
    Case("another's wallet", DEPOSITS, _with(DEPOSIT, "agent_id", '"x"'), 422, "unknown_field", "/agent_id"),
    Case("a field that is not known", RESERVATIONS, _with(RESERVE, "reducable", "true"), 422, "unknown_field"),
    Case("reducible in words", RESERVATIONS, _with(RESERVE, "reducible", '"perhaps"'), 422, "invalid_value"),
    _order("a side that is none", "side", '"long"', "invalid_value"),
    _order("a limit order", "order_type", '"limit"', "invalid_value"),
    _order("a price", "price", "1", "unknown_field"),
    _order("no such mode", "margin_mode", '"pooled"', "invalid_value"),
    _order("reduce_only twice", "reduce_only", 'true,"reduce_only":false', "duplicate_key"),
]


@pytest.mark.parametrize("case", NUMBERS + TEXTS + METAS + SHAPES, ids=lambda case: case.name)
async def test_refused(rich: Agent, case: Case) -> None:
    before = await rich.get("/account")
    answer = await rich.ask(case.path, content=case.body)
    problem(answer, case.status, case.code, case.pointer)
    after = await rich.get("/account")
    assert (after["version"], after["balances"]) == (before["version"], before["balances"])


REDUCTIONS = {
    "0": "not_positive",
    "-0.5": "not_positive",
    "1.0000001": "number_out_of_range",
    "25": "number_out_of_range",
    "1e400": "number_out_of_range",
    "1E+1000000": "number_out_of_range",
    '"NaN"': "invalid_value",
    "NaN": "not_finite",
    "-Infinity": "not_finite",
    "1E-19": "too_many_decimals",
    "1E-2000000": "too_many_decimals",
    "0." + "1" * 30: "too_many_decimals",
    "true": "invalid_value",
    "null": "invalid_value",
    '"half"': "invalid_value",
    '0.5,"reduce_pct":1': "duplicate_key",
}


@pytest.mark.parametrize("spelled", REDUCTIONS)
async def test_a_fraction_that_is_none(rich: Agent, spelled: str) -> None:
    rows = (await rich.get("/portfolio/positions"))["positions"]
    assert [row["service"] for row in rows] == ["trading", "casino"]
    for row in rows:
        answer = await rich.ask(f"/positions/{row['id']}/reduce", content=f'{{"reduce_pct":{spelled}}}'.encode())
        problem(answer, 422, REDUCTIONS[spelled], "/reduce_pct")
    assert (await rich.get("/portfolio/positions"))["positions"] == rows


@pytest.mark.parametrize("part", ["release", "settle"])
@pytest.mark.parametrize(
    ("spelled", "status", "code"),
    [
        ("NaN", 422, "not_finite"),
        ('"Infinity"', 422, "invalid_value"),
        ("0", 422, "not_positive"),
        ("-5", 422, "not_positive"),
        ("1E-19", 422, "too_many_decimals"),
        ("1e400", 422, "number_out_of_range"),
        ("5.000000000000000001", 409, "amount_above_reservation"),
    ],
)
async def test_a_part_of_a_reservation_that_is_none(
    rich: Agent, part: str, spelled: str, status: int, code: str
) -> None:
    [held] = (await rich.get(RESERVATIONS))["reservations"]
    answer = await rich.ask(f"{RESERVATIONS}/{held['id']}/{part}", content=f'{{"amount":{spelled}}}'.encode())
    problem(answer, status, code, "/amount")
    assert (await rich.get(RESERVATIONS))["reservations"] == [held]


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ('{"margin_mode":"pooled"}', "invalid_value", "/margin_mode"),
        ('{"margin_mode":null}', "invalid_value", "/margin_mode"),
        ('{"grace_period_seconds":-1}', "invalid_value", "/grace_period_seconds"),
        ('{"grace_period_seconds":86401}', "invalid_value", "/grace_period_seconds"),
        ('{"notice_delay_seconds":1e400}', "number_out_of_range", "/notice_delay_seconds"),
        ('{"notice_delay_seconds":0.5}', "invalid_value", "/notice_delay_seconds"),
        ('{"trailing_stop":1}', "invalid_value", "/trailing_stop"),
        ('{"trailing_stop":NaN}', "not_finite", "/trailing_stop"),
        ('{"target_utilization":"nan"}', "invalid_value", "/target_utilization"),
        ('{"target_utilization":0}', "invalid_value", "/target_utilization"),
        ('{"thresholds":{"gate_utilization":1.5}}', "invalid_value", "/thresholds/gate_utilization"),
        ('{"thresholds":{"gate":0.5}}', "unknown_field", "/thresholds/gate"),
        ('{"thresholds":null}', "invalid_value", "/thresholds"),
        ('{"execution":"moon"}', "invalid_value", "/execution"),
        ('{"version":7}', "unknown_field", "/version"),
        ('{"margin_mode":"cross","margin_mode":"portfolio"}', "duplicate_key", "/margin_mode"),
    ],
)
async def test_settings_that_are_none(rich: Agent, body: str, code: str, pointer: str) -> None:
    before = await rich.get(SETTINGS)
    problem(await rich.send("PATCH", SETTINGS, content=body), 422, code, pointer)
    assert await rich.get(SETTINGS) == before


async def test_meta_of_any_depth_has_an_answer(rich: Agent) -> None:
    """Where the decoder, the encoder and the driver each give up at a depth of their own, none gives a 500."""
    for depth in [1, 198, 199, 200, *range(300, 1_100, 7), *range(880, 1_010)]:
        body = _with(ORDER, "meta", '{"a":' + "[" * depth + "]" * depth + "}")
        answer = await rich.ask(ORDERS, content=body)
        assert (answer.status_code == 200) == (depth < 200), (depth, answer.text[:200])
        assert answer.status_code in (200, 422), (depth, answer.text[:200])


async def test_meta_comes_back_as_it_was_sent(rich: Agent) -> None:
    meta = {"a": [1, 2.5, None, True, {"é": "☃"}], "large": 10**30, "text": "it's \\ \" 100 %", "": {}}
    sent = await rich.post(ORDERS, ORDER | {"meta": meta})
    stored = await rich.send("GET", f"/orders/{sent['order_id']}")
    assert stored.json()["meta"] == meta


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        ("/wallet/ledger?cursor=" + "9" * 5_000, "/cursor"),
        ("/orders?cursor=%00", "/cursor"),
        ("/orders?limit=0", "/limit"),
        ("/positions?limit=201", "/limit"),
        ("/positions?limit=1e2", "/limit"),
        ("/reservations?status=lost", "/status"),
        ("/reservations?limit=", "/limit"),
    ],
)
async def test_pages_that_are_none(rich: Agent, path: str, pointer: str) -> None:
    problem(await rich.send("GET", path), 422, "invalid_parameter", pointer)


@pytest.mark.parametrize("cursor", ["-1", "9223372036854775808", "NaN", "1e3", "0x10", "'", "%20"])
async def test_cursors_that_are_none(rich: Agent, cursor: str) -> None:
    for path in ("/wallet/ledger", "/orders", "/positions", "/reservations"):
        problem(await rich.send("GET", f"{path}?cursor={cursor}"), 422, "invalid_cursor", "/cursor")


@pytest.mark.parametrize("named", ["%00", "a%00b", "%ED%A0%80", "x" * 65, "%20", "", "agent_%0A"])
async def test_an_agent_that_can_not_be(rich: Agent, named: str) -> None:
    for path in ("/account", "/wallet/ledger", "/orders/x"):
        for key in (rich.key, "settings", "admin"):
            problem(await rich.send("GET", f"{path}?agent_id={named}", key=key), 404, "agent_not_found")
        problem(await rich.send("GET", f"{path}?agent_id={named}", key=""), 401, "no_key")
    for path in ("/keys", "/audit"):
        for key in (rich.key, "admin"):
            answer = await rich.send("GET", f"{path}?agent_id={named}", key=key)
            assert (answer.status_code, answer.json()["code"]) in {(404, "agent_not_found"), (422, "invalid_parameter")}


async def test_ids_that_can_not_be(rich: Agent) -> None:
    for name in ("%00", "x%0A", "..%2F..%2Fadmin", "x" * 10_000, "'%20OR%201=1", "%F0%9F%92%A9"):
        for path in (f"/orders/{name}", f"/positions/{name}", f"/reservations/{name}"):
            assert (await rich.send("GET", path)).status_code == 404, path


# --- amounts of which each is good, and the sum is not


async def test_a_balance_has_an_end(rich: Agent) -> None:
    agent = await rich.service.agent("a hoarder")
    await agent.deposit(USDC="999999999999999")
    refused = await agent.ask(DEPOSITS, DEPOSIT | {"amount": 1})
    problem(refused, 422, "number_out_of_range", "/amount")
    await agent.deposit(USDC="0.999999999999999999")
    assert (await agent.get("/wallet/balance"))["balances"][0]["amount"] == Decimal(
        "999999999999999.999999999999999999"
    )
    problem(await agent.ask(DEPOSITS, DEPOSIT | {"amount": "1E-18"}), 422, "number_out_of_range", "/amount")
    entries = (await agent.get("/wallet/ledger"))["entries"]
    assert len(entries) == 2


async def test_a_position_has_an_end(rich: Agent) -> None:
    await rich.service.prices(DUST=1e-15, DUST_PERP=1e-15)
    agent = await rich.service.agent("a collector")
    await agent.deposit(USDC=1_000)
    await agent.order("DUST-PERP", "buy", "999999999999999")
    more = {"symbol": "DUST-PERP", "side": "buy", "size": 1}
    problem(await agent.ask(ORDERS, more), 422, "number_out_of_range", "/size")
    await agent.order("DUST-PERP", "buy", "0.5")
    assert (await agent.order("DUST-PERP", "sell", "999999999999999.5", reduce_only=True))["position"] is None


async def test_a_gain_past_all_balances_is_refused_by_name(rich: Agent) -> None:
    """Nobody has 10^15 USDC to pay it with."""
    await rich.service.prices(X=1, X_PERP=1)
    agent = await rich.service.agent("a prophet")
    await agent.deposit(X="900000000000000")
    await agent.order("X-PERP", "buy", "100000000000000")
    await rich.service.prices(X=100, X_PERP=100)
    sell = {"symbol": "X-PERP", "side": "sell", "size": "100000000000000"}
    problem(await agent.ask(ORDERS, sell), 422, "number_out_of_range")
    assert (await agent.order("X-PERP", "sell", "1000000000000"))["realized_pnl"] == 99_000_000_000_000
