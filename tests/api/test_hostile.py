"""Bodies that mean harm: each is refused with a problem document that points at the field, and none breaks us."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.api.bodies import EVERYTHING, LINEAR, OPTION
from tests.api.service import MARGIN, problem

if TYPE_CHECKING:
    from tests.api.service import Service

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEEP = 100_000
SIZE, MARK, EXPIRY = "/positions/0/size", "/positions/0/mark_price", "/positions/0/expiry"


class Case(NamedTuple):
    name: str
    body: bytes
    status: int
    code: str
    pointer: str | None = None


def _positions(*positions: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"positions": positions, **more}).encode()


def _linear(name: str, spelled: str | bytes) -> bytes:
    """Return the body of one linear position in which a field's value is spelled like this."""
    value = spelled if isinstance(spelled, bytes) else spelled.encode()
    return _positions(LINEAR | {name: "SPELLED"}).replace(b'"SPELLED"', value)


def _option(**changes: Any) -> bytes:
    position = {name: value for name, value in (OPTION | changes).items() if value is not None}
    return _positions(position, market={"prices": {"BTC": 61000}})


def _with(spelled: str | bytes) -> bytes:
    """Return a body without positions, and with these members."""
    return b'{"positions":[],' + (spelled if isinstance(spelled, bytes) else spelled.encode()) + b"}"


DOTS = [
    Case("dots for a name", _with('"...":1'), 422, "unknown_field", "/..."),
    Case("dots for a name in an object", _with('"market":{"...":1}'), 422, "unknown_field", "/market/..."),
    Case("dots for a name in a position", _linear("...", "1"), 422, "unknown_field", "/positions/0/..."),
    Case("dots for an asset", _with('"market":{"assets":{"...":{}}}'), 422, "invalid_value", "/market/assets"),
    Case("dots within an entry", _with('"market":{"assets":{"A":{},"B":{"...":1}}}'), 422, "unknown_field",
         "/market/assets/B/..."),
    Case("a name that ends as a path", _with('"x` - at `$.market[...]":1'), 422, "unknown_field"),
    Case("a name that ends as the path of all", _with('"x` - at `$[...]":1'), 422, "unknown_field"),
    Case("a name that ends as a path into a list", _with('"x` - at `$.positions[...]":1'), 422, "unknown_field"),
    Case("a name that holds a path", _linear("x` - at `$.market[...]` - at `$[...]", "1"), 422, "unknown_field"),
    Case("a value that ends as a path", _linear("side", '"x` - at `$.market[...]`"'), 422, "invalid_value",
         "/positions/0/side"),
    Case("a value that is told as a name", _linear("side", '"Object contains unknown field `x`"'), 422, "invalid_value",
         "/positions/0/side"),
    Case("half a pair behind a refusal", _with(r'"market":{"prices":{"A":"x"}},"name":"\ud800"'), 400, "not_json"),
    Case("half a pair for a name", _with(r'"market":{"prices":{"A":"x","\udfff":1}}'), 400, "not_json"),
    Case("half a pair for a name, twice", _with(r'"market":{"prices":{"\ud800":1,"\ud800":1}}'), 400, "not_json"),
    Case("two entries refused", _with('"market":{"prices":{"A":1,"B":0,"C":-1}}'), 422, "invalid_value",
         "/market/prices/B"),
    Case("entries refused for two reasons", _with('"market":{"assets":{"A":{},"B":{"haircut":[]}},"prices":{"B":0}}'),
         422, "invalid_value", "/market/assets/B/haircut"),
    Case("an entry before another refusal", _with('"market":{"prices":{"A":1,"B":1,"C":0}},"as_of":1'), 422,
         "invalid_value", "/market/prices/C"),
]  # fmt: skip
"""Names and values that look like what the decoder says of a path."""
NOT_JSON = [
    Case("not JSON", b"positions=1", 400, "not_json"),
    Case("empty", b"", 400, "not_json"),
    Case("blank", b" \n", 400, "not_json"),
    Case("truncated", _positions(LINEAR)[:-2], 400, "not_json"),
    Case("two documents", b'{"positions":[]}{"positions":[]}', 400, "not_json"),
    Case("trailing comma", b'{"positions":[],}', 400, "not_json"),
    Case("single quotes", b"{'positions':[]}", 400, "not_json"),
    Case("byte order mark", b"\xef\xbb\xbf" + _positions(), 400, "not_json"),
    Case("UTF-16", _positions().decode().encode("utf-16"), 400, "not_json"),
    Case("UTF-16 without its mark", _positions().decode().encode("utf-16-le"), 400, "not_json"),
    Case("invalid UTF-8 in a value", _with(b'"name":"\xff"'), 400, "not_json"),
    Case("invalid UTF-8 in a key", _with(b'"na\xffme":"x"'), 400, "not_json"),
    Case("invalid UTF-8 in an id", _linear("id", b'"\xc3\x28"'), 400, "not_json"),
    Case("overlong UTF-8", _with(b'"name":"\xc0\xaf"'), 400, "not_json"),
    Case("surrogate in UTF-8", _with(b'"name":"\xed\xa0\x80"'), 400, "not_json"),
    Case("lone surrogate", _linear("symbol", r'"\ud800"'), 400, "not_json"),
    Case("lone surrogate as a key", rb'{"\ud800":1}', 400, "not_json"),
    Case("raw control character", _with(b'"name":"a\x01b"'), 400, "not_json"),
    Case("leading zero", _linear("size", "01"), 400, "not_json"),
    Case("hexadecimal", _linear("size", "0x10"), 400, "not_json"),
]

# Either answer is right: a lone surrogate is malformed, and the key or NaN beside it is refused as well.
SURROGATES = [
    Case("lone surrogate twice", rb'{"\ud800":1,"\ud800":2}', 0, ""),
    Case("NaN under a lone surrogate", rb'{"\ud800":NaN}', 0, ""),
    Case("NaN beside a lone surrogate", rb'{"a":{"\udfff":[NaN]}}', 0, ""),
]

NUMBERS = [
    Case("NaN", _linear("mark_price", "NaN"), 422, "not_finite", MARK),
    Case("Infinity", _linear("mark_price", "Infinity"), 422, "not_finite", MARK),
    Case("-Infinity", _linear("size", "-Infinity"), 422, "not_finite", SIZE),
    Case("NaN under a symbol with a slash", _with('"market":{"prices":{"A/B":NaN}}'), 422, "not_finite",
         "/market/prices/A~1B"),
    Case("1e400", _linear("mark_price", "1e400"), 422, "number_out_of_range", MARK),
    Case("-1e400", _linear("size", "-1e400"), 422, "number_out_of_range", SIZE),
    Case("1E+1000000", _linear("mark_price", "1E+1000000"), 422, "number_out_of_range", MARK),
    Case('"1e400"', _linear("mark_price", '"1e400"'), 422, "number_out_of_range", MARK),
    Case('"nan"', _linear("mark_price", '"nan"'), 422, "invalid_value", MARK),
    Case('"NaN" size', _linear("size", '"NaN"'), 422, "invalid_value", SIZE),
    Case('"inf"', _linear("mark_price", '"inf"'), 422, "invalid_value", MARK),
    Case('"-Infinity"', _linear("size", '"-Infinity"'), 422, "invalid_value", SIZE),
    Case("nan haircut", _with('"market":{"assets":{"BTC":{"haircut":"nan"}}}'), 422, "out_of_range",
         "/market/assets/BTC/haircut"),
    Case("inf limit", _with('"market":{"assets":{"BTC":{"concentration_limit":"inf"}}}'), 422, "out_of_range",
         "/market/assets/BTC/concentration_limit"),
    Case("nan correlation", _with('"market":{"correlation":{"BTC":{"ETH":"nan"}}}'), 422, "invalid_value",
         "/market/correlation/BTC/ETH"),
    Case("nan setting", _with('"settings":{"target_utilization":"nan"}'), 422, "out_of_range",
         "/settings/target_utilization"),
    Case("huge integer", _linear("size", "9" * 5_000), 422, "number_out_of_range", SIZE),
    Case("huge integer as a string", _linear("size", '"' + "9" * 5_000 + '"'), 422, "number_out_of_range", SIZE),
    Case("integer past the limit", _linear("size", "1" + "0" * 16), 422, "invalid_value", SIZE),
    Case("a million digits", _linear("size", "9" * 1_000_000), 422, "number_out_of_range", SIZE),
    Case("bool as number", _linear("size", "true"), 422, "invalid_value", SIZE),
    Case("words as number", _linear("size", '"one"'), 422, "invalid_value", SIZE),
    Case("underscores in a number", _linear("size", '"1_000"'), 422, "invalid_value", SIZE),
    Case("blanks around a number", _linear("size", '" 1 "'), 422, "invalid_value", SIZE),
    Case("empty string as number", _linear("size", '""'), 422, "invalid_value", SIZE),
    Case("negative size", _linear("size", "-1"), 422, "invalid_value", SIZE),
    Case("zero price", _linear("mark_price", "0"), 422, "invalid_value", MARK),
    Case("negative price", _linear("entry_price", '"-1"'), 422, "invalid_value", "/positions/0/entry_price"),
    Case("leverage 0", _linear("leverage", "0"), 422, "invalid_value", "/positions/0/leverage"),
    Case("leverage 1e-320", _linear("leverage", "1e-320"), 422, "invalid_value", "/positions/0/leverage"),
    Case("underflow to a price of 0", _linear("mark_price", "1e-400"), 422, "invalid_value", MARK),
]  # fmt: skip

DUPLICATES = [
    Case("key twice", b'{"positions":[],"positions":[]}', 422, "duplicate_key", "/positions"),
    Case("key twice in a position", _linear("size", '1,"size":2'), 422, "duplicate_key", SIZE),
    Case("key twice in prices", _with('"market":{"prices":{"BTC":1,"BTC":2}}'), 422, "duplicate_key",
         "/market/prices/BTC"),
    Case("key twice, one escaped", _with(r'"market":{"prices":{"BTC":1,"B\u0054C":2}}'), 422, "duplicate_key",
         "/market/prices/BTC"),
    Case("key with a slash twice", _with('"market":{"prices":{"A/B":1,"A/B":2}}'), 422, "duplicate_key",
         "/market/prices/A~1B"),
    Case("key twice with a null", _linear("size", 'null,"size":2'), 422, "duplicate_key", SIZE),
    Case("key twice in a shock", _with('"scenarios":[{"shocks":{"BTC":0.1,"BTC":-0.1}}]'), 422, "duplicate_key",
         "/scenarios/0/shocks/BTC"),
    Case("keys twice behind an epoch", _option(expiry="7").replace(b': "7"', b':1829000000,"size":2,"iv":1'), 422,
         "invalid_value", EXPIRY),
    Case("key twice behind a zone", _option().replace(b'00Z"', b'00+0530","size":2'), 422, "duplicate_key"),
]  # fmt: skip

BEHIND_A_REFUSED_ENTRY = b'{"positions":[],"market":{"prices":{"A":-1}}'
REFUSED_ENTRIES = [
    Case("an entry, then nothing", BEHIND_A_REFUSED_ENTRY + b",", 400, "not_json"),
    Case("an entry, then its object again", BEHIND_A_REFUSED_ENTRY + b',"market":{"prices":{}}}', 422, "duplicate_key"),
    Case("an entry, then null for it", BEHIND_A_REFUSED_ENTRY + b',"market":null}', 422, "duplicate_key"),
    Case("an entry, then no UTF-8", BEHIND_A_REFUSED_ENTRY + b',"\xff":1}', 400, "not_json"),
    Case("an entry, then 5,000 digits", BEHIND_A_REFUSED_ENTRY + b',"x":' + b"9" * 5_000 + b"}", 400, "not_json"),
    Case("an entry", BEHIND_A_REFUSED_ENTRY + b"}", 422, "invalid_value", "/market/prices/A"),
]

SHAPES = [
    Case("null", b"null", 422, "invalid_value", ""),
    Case("array", b"[]", 422, "invalid_value", ""),
    Case("string", b'"positions"', 422, "invalid_value", ""),
    Case("no positions", b"{}", 422, "missing_field", "/positions"),
    Case("null positions", b'{"positions":null}', 422, "invalid_value", "/positions"),
    Case("positions as an object", b'{"positions":{}}', 422, "invalid_value", "/positions"),
    Case("a position that is null", b'{"positions":[null]}', 422, "invalid_value", "/positions/0"),
    Case("a side that is a number", _linear("side", "1"), 422, "invalid_value", "/positions/0/side"),
    Case("unknown side", _linear("side", '"buy"'), 422, "invalid_value", "/positions/0/side"),
    Case("deep arrays", b"[" * DEEP + b"]" * DEEP, 422, "invalid_value", ""),
    Case("deep positions", b'{"positions":' + b"[" * DEEP + b"]" * DEEP + b"}", 422, "invalid_value", "/positions/0"),
    Case("deep objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP, 422, "unknown_field", "/a"),
    Case("deep in an unknown field", _with(b'"x":' + b"[" * DEEP + b"]" * DEEP), 422, "unknown_field", "/x"),
    Case("deep behind NaN", b'{"positions":NaN,"x":' + b"[" * DEEP + b"]" * DEEP + b"}", 422, "nested_too_deeply"),
    Case("deep and open", b"[" * DEEP, 422, "invalid_value", ""),
    Case("unknown field", _with('"positionz":[]'), 422, "unknown_field", "/positionz"),
    Case("unknown field of a position", _linear("lever", "3"), 422, "unknown_field", "/positions/0/lever"),
    Case("unknown field with marks", _with('"a`b~c/d":1'), 422, "unknown_field", "/a`b~0c~1d"),
    Case("unknown field of 1 MB", _with('"' + "x" * 1_000_000 + '":1'), 422, "unknown_field"),
    Case("unknown model", _with('"models":["var"]'), 422, "invalid_value", "/models/0"),
    Case("unknown regime", _with('"regime":"calm"'), 422, "invalid_value", "/regime"),
    Case("unknown scenario set", _with('"scenarios":"mild"'), 422, "unknown_scenario_set", "/scenarios"),
    Case("unknown setting", _with('"settings":{"nope":1}'), 422, "unknown_field", "/settings/nope"),
    Case("no scenario", _with('"scenarios":[]'), 422, "no_scenarios", "/scenarios"),
    Case("empty scenario", _with('"scenarios":[{}]'), 422, "empty_scenario", "/scenarios/0"),
    Case("symbol with a NUL", _linear("symbol", r'"BTC\u0000"'), 422, "invalid_symbol", "/positions/0/symbol"),
    Case("symbol with a line feed", _linear("symbol", r'"BTC-PERP\n"'), 422, "invalid_symbol", "/positions/0/symbol"),
    Case("symbol of a script", _linear("symbol", '"<b>"'), 422, "invalid_symbol", "/positions/0/symbol"),
    Case("symbol of 1 MB", _linear("symbol", '"' + "x" * 1_000_000 + '"'), 422, "invalid_value", "/positions/0/symbol"),
    Case("empty symbol", _linear("symbol", '""'), 422, "invalid_value", "/positions/0/symbol"),
    Case("SQL as a symbol", _linear("symbol", '"x; DROP TABLE api_keys"'), 422, "invalid_symbol",
         "/positions/0/symbol"),
    Case("collateral with a line feed", _with(r'"collateral":[{"asset":"USDC\n","amount":1}]'), 422, "invalid_value",
         "/collateral/0/asset"),
    Case("price of a name with a line feed", _with(r'"market":{"prices":{"BTC\n":1}}'), 422, "invalid_value",
         "/market/prices"),
]  # fmt: skip

LIMITS = [
    Case("1,001 scenarios", _positions(scenarios=[{"price_move": 0.1}] * 1_001), 422, "too_many_items", "/scenarios"),
    Case("5,001 positions", _positions(*[LINEAR] * 5_001), 422, "too_many_items", "/positions"),
    Case("5,001 holdings", _positions(collateral=[{"asset": "USDC", "amount": 1}] * 5_001), 422, "too_many_items",
         "/collateral"),
    Case("5,001 debts", _positions(liabilities=[{"asset": "USDC", "amount": 1}] * 5_001), 422, "too_many_items",
         "/liabilities"),
    Case("501 underlyings", _positions(*[LINEAR | {"symbol": f"A{i}-PERP"} for i in range(501)]), 422,
         "too_many_underlyings", "/positions"),
]  # fmt: skip

MEANING = [
    Case("naive expiry", _option(expiry="2027-06-25T08:00:00"), 422, "invalid_value", EXPIRY),
    Case("expired option", _option(expiry="2020-06-25T08:00:00Z"), 422, "option_expired", EXPIRY),
    Case("expiry in the year 9999", _option(expiry="9999-12-31T23:59:59Z"), 422, "expiry_too_far", EXPIRY),
    Case("expiry past the year 9999", _option(expiry="9999-12-31T23:59:59-10:00"), 422, "expiry_too_far", EXPIRY),
    Case("expiry before the year 1", _option(expiry="0001-01-01T00:00:00+10:00"), 422, "option_expired", EXPIRY),
    Case("expiry of nothing", _option(expiry=""), 422, "invalid_value", EXPIRY),
    Case("expiry of nothing, of a linear position", _linear("expiry", '""'), 422, "invalid_value", EXPIRY),
    Case("expiry on no day", _option(expiry="2027-02-30T00:00:00Z"), 422, "invalid_value", EXPIRY),
    Case("as_of in the year 9999", _positions(LINEAR, as_of="9999-12-31T00:00:00Z"), 422, "invalid_as_of", "/as_of"),
    Case("as_of before the year 1", _positions(LINEAR, as_of="0001-01-01T00:00:00+10:00"), 422, "invalid_as_of",
         "/as_of"),
    Case("naive as_of", _positions(LINEAR, as_of="2027-01-01T00:00:00"), 422, "invalid_value", "/as_of"),
    Case("no mark", _positions({k: v for k, v in LINEAR.items() if k != "mark_price"}), 422, "missing_price", MARK),
    Case("no price of an underlying", _positions(OPTION), 422, "missing_price", "/positions/0/underlying"),
    Case("no price of collateral", _positions(collateral=[{"asset": "BTC", "amount": 1}]), 422, "missing_price",
         "/collateral/0/price"),
    Case("no iv", _option(iv=None), 422, "invalid_position", "/positions/0/iv"),
    Case("no strike", _option(strike=None), 422, "invalid_position", "/positions/0/strike"),
    Case("iv null", _option().replace(b"0.45", b"null"), 422, "invalid_position", "/positions/0/iv"),
    Case("empty position", _positions({}), 422, "invalid_position", "/positions/0/symbol"),
    Case("option with a notional", _option(notional=5), 422, "invalid_position", "/positions/0/notional"),
    Case("linear with an iv", _linear("iv", "0.5"), 422, "invalid_position", "/positions/0/iv"),
    Case("greeks with a size", _positions(LINEAR | {"delta": 1}), 422, "invalid_position", "/positions/0/size"),
    Case("correlation twice", _with('"market":{"correlation":{"BTC":{"ETH":0.9},"ETH":{"BTC":0.8}}}'), 422,
         "not_symmetric", "/market/correlation/ETH/BTC"),
    Case("own correlation not 1", _with('"market":{"correlation":{"A/B":{"A/B":0.9}}}'), 422, "not_a_correlation",
         "/market/correlation/A~1B/A~1B"),
    Case("correlation above 1", _with('"market":{"correlation":{"BTC":{"ETH":1.1}}}'), 422, "invalid_value",
         "/market/correlation/BTC/ETH"),
    Case("MM above IM of an asset", _with('"market":{"assets":{"BTC":{"maintenance_margin_rate":0.31}}}'), 422,
         "out_of_order", "/market/assets/BTC/maintenance_margin_rate"),
    Case("MM above IM of an instrument", _with('"market":{"instruments":{"A/B:C":{"initial_margin_rate":0.1}}}'), 422,
         "out_of_order", "/market/instruments/A~1B:C/maintenance_margin_rate"),
    Case("settings out of order", _with('"settings":{"zone_yellow":0.8}'), 422, "out_of_order",
         "/settings/zone_yellow"),
    Case("more lent than held", _with('"collateral":[{"asset":"USDC","amount":1,"lent":2}]'), 422,
         "lent_above_amount", "/collateral/0/lent"),
    Case("negative holding", _with('"collateral":[{"asset":"USDC","amount":-1}]'), 422, "invalid_value",
         "/collateral/0/amount"),
    Case("two prices of a holding", _positions(collateral=[{"asset": "BTC", "amount": 1, "price": p} for p in (5, 6)]),
         422, "conflicting_price", "/collateral/1/price"),
    Case("a debt's price against a holding's", _positions(collateral=[{"asset": "BTC", "amount": 1, "price": 5}],
         liabilities=[{"asset": "BTC", "amount": 1, "price": 6}]), 422, "conflicting_price", "/liabilities/0/price"),
    Case("an underlying other than the listed one", _linear("underlying", '"ETH"'), 422, "conflicting_underlying",
         "/positions/0/underlying"),
    Case("a forward off the market", _option(forward=122_001), 422, "forward_off_market", "/positions/0/forward"),
    Case("a debt that is lent out", _with('"liabilities":[{"asset":"USDC","amount":2,"lent":1}]'), 422,
         "unknown_field", "/liabilities/0/lent"),
    Case("price below -100 %", _with('"scenarios":[{"price_move":-1.01}]'), 422, "invalid_value",
         "/scenarios/0/price_move"),
]  # fmt: skip

TABLE = [*NOT_JSON, *DOTS, *NUMBERS, *DUPLICATES, *REFUSED_ENTRIES, *SHAPES, *LIMITS, *MEANING]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
async def test_refused(shared: Service, case: Case) -> None:
    answer = await shared.post(MARGIN, content=case.body)
    document = problem(answer, case.status, case.code, case.pointer)
    assert shared.keys["agent"] not in answer.text
    assert bool(document["errors"]) == (case.status == 422)


@pytest.mark.parametrize("case", SURROGATES, ids=lambda case: case.name)
async def test_lone_surrogates_break_no_reply(shared: Service, case: Case) -> None:
    answer = await shared.post(MARGIN, content=case.body)
    assert answer.status_code in (400, 422)
    problem(answer, answer.status_code, answer.json()["code"])


async def test_what_is_odd_but_valid_is_taken(shared: Service) -> None:
    """The refusals above are for their spoilt part: the same bodies unspoilt pass."""
    for body in (
        _positions(),
        _positions(LINEAR),
        _positions(*[LINEAR] * 2, name="twice the same"),
        _option(),
        _linear("size", '"1.50"'),
        _linear("size", "1e0"),
        _linear("size", "0"),
        _linear("leverage", "null"),
        _linear("symbol", r'"BTC\u002dPERP"'),
        _linear("symbol", '"BTC/USDT:USDT"'),
        _with('"models":[]'),
        _with(r'"name":"a\u0000\ud83d\ude00"'),
        json.dumps(EVERYTHING).encode(),
        json.dumps(EVERYTHING, indent=9).encode(),
        _positions(*[LINEAR | {"symbol": f"A{i}-PERP"} for i in range(500)]),
        _positions(scenarios=[{"price_move": 0.1}] * 1_000),
    ):
        answer = await shared.post(MARGIN, content=body)
        assert answer.status_code == 200, (body[:200], answer.text[:300])


@pytest.mark.parametrize("length", [b"2000001", b"100000000", b"9" * 40, b"9" * 5_000])
async def test_declared_length_over_the_limit(shared: Service, length: bytes) -> None:
    answer = await shared.post(MARGIN, content=b"{}", headers={"Content-Length": length.decode()})
    problem(answer, 413, "body_too_large")


async def test_body_over_the_limit_with_and_without_its_length(shared: Service) -> None:
    async def chunks() -> Any:
        for _ in range(21):
            yield b" " * 100_000

    problem(await shared.post(MARGIN, content=b" " * 2_000_001), 413, "body_too_large")
    problem(await shared.post(MARGIN, content=chunks()), 413, "body_too_large")


async def test_a_body_of_just_the_limit_is_read(shared: Service) -> None:
    answer = await shared.post(MARGIN, content=_positions().ljust(2_000_000))
    assert answer.status_code == 200


async def test_work_past_the_limit_is_refused(shared: Service) -> None:
    """A few kilobytes can ask for minutes of work under portfolio margin: they are refused before any is done."""
    options = [OPTION | {"underlying": f"A{i}"} for i in range(200)]
    prices = {f"A{i}": 61_000 for i in range(200)}
    body = _positions(*options, market={"prices": prices}, settings={"margin_mode": "portfolio"})
    problem(await shared.post(MARGIN, content=body), 422, "too_much_work", "/positions")


async def test_options_of_one_underlying_are_one_underlying(shared: Service) -> None:
    options = [OPTION | {"symbol": f"BTC-{i}"} for i in range(501)]
    answer = await shared.post(MARGIN, content=_positions(*options, market={"prices": {"BTC": 61_000}}))
    assert answer.status_code == 200


async def test_a_cursor_is_text(shared: Service) -> None:
    problem(await shared.get("/api/market/prices?cursor=%00"), 422, "invalid_parameter", "/cursor")


async def test_a_refusal_costs_little_time(shared: Service) -> None:
    """A second look at a doubtful body of the largest size takes no longer than a quote does."""
    keys = ",".join(f'"A{i}":1' for i in range(120_000))
    body = b'{"positions":[],"market":{"prices":{' + keys.encode() + b',"A B":0}}}'
    answer = await shared.post(MARGIN, content=body)
    assert answer.status_code == 422
    assert answer.elapsed.total_seconds() < 3
