"""The body of a margin quote, and the terms that it asks for. Knows no HTTP: the command line reads it too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from app.api.body import Body, Moment, Request, colons_written, moment
from app.api.venue_wire import VenuesIn, check_venue_lengths, venue_inputs, venue_parameters
from app.domain.collateral import CollateralTerms
from app.domain.computed import computed
from app.domain.margin.result import MarginTerms, SpanCharges
from app.domain.margin.venues.registry import VENUES
from app.domain.margin.venues.unit import UNIT_MILLISECONDS
from app.domain.parameters import (
    AssetKind,
    CorrelationTable,
    HealthPolicy,
    InstrumentKind,
    InstrumentParameters,
    MarginMode,
    MarketParameters,
    ModelParameters,
    Regime,
)
from app.domain.quote import QuoteTerms
from app.domain.record import record
from app.domain.scenarios import NAMED, Scenario
from app.domain.terms import PositionTerms
from app.errors import invalid, pointer_to, pointers_under
from app.services import market_rules
from app.settings import Settings

YEARS_TO_EXPIRY_MAX = 50
MARKET_ENTRIES_MAX = 10_000
OVERRIDES_MAX = 1_000
AS_OF_MIN, AS_OF_MAX = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)

SYMBOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
Symbol = Annotated[str, Meta(pattern=f"^{SYMBOL.pattern}(?!\n)$")]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
"""A symbol that is matched once however many positions carry it."""
Positive = Annotated[float, Meta(ge=1e-12, le=1e15)]
NonNegative = Annotated[float, Meta(ge=0, le=1e15)]
Signed = Annotated[float, Meta(ge=-1e15, le=1e15)]
Move = Annotated[float, Meta(ge=-1, le=100)]
Correlation = Annotated[float, Meta(ge=-1, le=1)]
Text = Annotated[str, Meta(max_length=128)]
MarginModelName = Literal["isolated", "cross", "scenario", "portfolio", "span", "deribit", "okx", "derive", "paradex"]


class PositionIn(Request, kw_only=True, gc=False):
    """One position: linear (symbol, side, size), greeks (symbol, notional, delta) or option (underlying, strike, …).

    The fields stand in the order of `PositionTerms`, so that rows turn into columns in one pass.
    """

    symbol: Name | None = None
    side: Literal["long", "short"] | None = None
    size: NonNegative | None = None
    entry_price: Positive | None = None
    mark_price: Positive | None = None
    leverage: Annotated[float, Meta(ge=0.001, le=1_000)] | None = None
    margin_mode: MarginMode | None = None
    allocated_collateral: NonNegative | None = None
    contract_size: Positive | None = None
    notional: NonNegative | None = None
    delta: Annotated[float, Meta(ge=-1_000, le=1_000)] | None = None
    gamma: Signed | None = None
    vega: Signed | None = None
    underlying: Name | None = None
    type: Literal["call", "put"] | None = None
    strike: Positive | None = None
    expiry: Moment | None = None
    iv: Annotated[float, Meta(ge=0.0001, le=50)] | None = None
    rate: Annotated[float, Meta(ge=-1, le=1)] | None = None
    forward: Positive | None = None
    id: Text | None = None


class DebtIn(Request):
    """Units of an asset owed; the price is the market's if left out."""

    asset: Symbol
    amount: NonNegative
    price: Positive | None = None


class HoldingIn(Request):
    """Units of an asset held; `lent` of them are out on loan; the price is the market's if left out."""

    asset: Symbol
    amount: NonNegative
    price: Positive | None = None
    lent: NonNegative | None = None


class ReservationIn(Request):
    """USD that another service holds in reserve on the account."""

    service: Text
    amount: NonNegative


class ScenarioIn(Request):
    """A joint move; `shocks` are the own moves of single underlyings, `price_move` is everyone else's."""

    price_move: Move | None = None
    vol_move: Annotated[float, Meta(ge=-1, le=100)] | None = None
    shocks: dict[Symbol, Move] | None = None
    weight: Annotated[float, Meta(gt=0, le=1)] | None = None


class AssetIn(Request):
    """Parameters of an asset; those left out stay as they are."""

    kind: AssetKind | UnsetType = UNSET
    haircut: float | UnsetType = UNSET
    initial_margin_rate: float | UnsetType = UNSET
    maintenance_margin_rate: float | UnsetType = UNSET
    price_range: float | UnsetType = UNSET
    volatility_range: float | UnsetType = UNSET
    volatility: float | UnsetType | None = UNSET
    concentration_limit: float | UnsetType | None = UNSET


class InstrumentIn(Request):
    """Parameters of an instrument; those left out stay as they are, a rate set to null is its underlying's.

    `expiry` is a future's; left out, or null, it is what the symbol says, as BTC-28JUN24 does.
    """

    underlying: Symbol | UnsetType = UNSET
    kind: InstrumentKind | UnsetType = UNSET
    contract_size: float | UnsetType = UNSET
    initial_margin_rate: float | UnsetType | None = UNSET
    maintenance_margin_rate: float | UnsetType | None = UNSET
    price_range: float | UnsetType | None = UNSET
    volatility: float | UnsetType | None = UNSET
    expiry: Moment | UnsetType | None = UNSET


class SpanChargesIn(Request):
    """USD charges of one underlying in the SPAN model."""

    intra_commodity: NonNegative | None = None
    delivery: NonNegative | None = None
    inter_commodity_credit: NonNegative | None = None
    short_option_minimum: NonNegative | None = None


class MarketIn(Request):
    """What this quote takes in place of the stored market."""

    prices: dict[Symbol, Positive] | None = None
    assets: dict[Symbol, AssetIn] | None = None
    instruments: dict[Symbol, InstrumentIn] | None = None
    correlation: dict[Symbol, dict[Symbol, Correlation]] | None = None
    hedge_correlation: dict[Symbol, dict[Symbol, Correlation]] | None = None
    span_charges: dict[Symbol, SpanChargesIn] | None = None
    venues: VenuesIn | None = None  # type: ignore[valid-type]

    @property
    def prices_only(self) -> bool:
        """Whether no parameter is overridden."""
        return _overrides(self).count(None) == len(_OVERRIDES)

    @property
    def correlates(self) -> bool:
        """Whether correlations are overridden, so that the matrices of margin may need a repair."""
        return not (self.correlation is None and self.hedge_correlation is None)


_OVERRIDES = tuple(name for name in MarketIn.__struct_fields__ if name != "prices")
_overrides = attrgetter(*_OVERRIDES)
_BY_NAME = tuple(name for name in _OVERRIDES if name != "venues")
_FACTORS = tuple(f.name for cls in (ModelParameters, HealthPolicy) for f in fields(cls))
SettingsIn = msgspec.defstruct(
    "SettingsIn",
    [("margin_mode", MarginMode | None, None), *((name, float | None, None) for name in _FACTORS)],
    bases=(Request,),
)


class MarginQuoteIn(Request, dict=True):
    """POST /api/quotes/margin."""

    positions: list[PositionIn]
    collateral: list[HoldingIn] | None = None
    liabilities: list[DebtIn] | None = None
    reservations: list[ReservationIn] | None = None
    models: list[MarginModelName] | None = None
    scenarios: str | list[ScenarioIn] | None = None
    regime: Regime | None = None
    market: MarketIn | None = None
    settings: SettingsIn | None = None  # type: ignore[valid-type]
    as_of: Moment | None = None
    name: Text | None = None

    @computed
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """The positions' fields, each a column."""
        return _columns(self.positions)

    @computed
    def terms(self) -> PositionTerms:
        """The positions as the risk core reads them. Raises InvalidError for an expiry that is no time."""
        return _terms(self.columns)


def _colons(body: MarginQuoteIn) -> int:
    """Return the colons of the body as JSON: the positions, nearly all of it, are not written but counted.

    Each value has the colon of its key, and those of its own text. A time is not read before it is known to stand once.
    """
    if _given(body.columns["expiry"]):
        return colons_written(body)
    terms = body.terms
    count = colons_written(msgspec.structs.replace(body, positions=[]))
    count += len(terms) * len(terms.full)
    for name in (*(terms.given - terms.full), "id"):
        count += len(terms) - body.columns[name].count(None)
    for name in _TEXTS:
        count += "".join(filter(None, body.columns[name])).count(":")
    return count


MARGIN_QUOTE = Body(MarginQuoteIn, _colons)

_TEXTS = frozenset({"symbol", "underlying", "id"})
_FIELDS = tuple(f.name for f in fields(PositionTerms))
_DEFAULT_MODELS = ("isolated", "cross", "portfolio")
_DEFAULT_SCENARIOS = "moderate"


@record(frozen=True, slots=True)
class Limits:
    """The named limits on one portfolio."""

    positions_max: int
    scenarios_max: int
    underlyings_max: int
    quote_milliseconds_max: float

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Return the limits of the settings."""
        return cls(
            settings.positions_max, settings.scenarios_max, settings.underlyings_max, settings.quote_milliseconds_max
        )


def quote_terms(body: MarginQuoteIn, parameters: MarketParameters, limits: Limits, as_of: datetime) -> QuoteTerms:
    """Return what the body asks for at its `quote_time`. Raises InvalidError with pointers."""
    terms = read_terms(body, parameters, limits, as_of)
    repairs = body.market is not None and body.market.correlates
    work = estimated_work(terms.positions, terms.margin.parameters, terms.margin_mode, repairs=repairs)
    if venues := len(VENUES.keys() & set(terms.models)):
        work += venues * venue_work(terms.positions, terms.margin.parameters)
    check_work(work, limits)
    return terms


def read_terms(body: MarginQuoteIn, parameters: MarketParameters, limits: Limits, as_of: datetime) -> QuoteTerms:
    """Return what `quote_terms` does of a body whose work is judged elsewhere. Raises InvalidError with pointers."""
    _check_lengths(body, limits)
    # the struct is made from the parameter classes, so the type checker can't follow it
    own = cast("Struct | None", body.settings)
    settings = {} if own is None else fields_given(own)
    mode = settings.pop("margin_mode", "cross")
    market = body.market
    if settings or not (market is None or market.prices_only):
        parameters = _overridden(parameters, market or MarketIn(), settings)
    scenario_set, scenarios = _scenarios(body.scenarios)
    positions = body.terms
    check_rows(positions, parameters, limits, as_of)
    return QuoteTerms(
        positions=positions,
        collateral=_holdings(body.collateral or ()),
        liabilities=[CollateralTerms(debt.asset, debt.amount, debt.price) for debt in body.liabilities or ()],
        reserved=sum(r.amount for r in body.reservations or ()),
        models=tuple(dict.fromkeys(body.models or _DEFAULT_MODELS)),
        margin_mode=mode,
        prices={} if market is None else market.prices or {},
        margin=MarginTerms(
            parameters=parameters,
            scenarios=scenarios,
            scenario_set=scenario_set,
            regime=body.regime or "normal",
            span_charges=_span_charges(market),
            venues={} if market is None else venue_inputs(market.venues),
        ),
    )


def check_terms(
    terms: PositionTerms,
    parameters: MarketParameters,
    mode: MarginMode,
    limits: Limits,
    now: datetime,
) -> None:
    """Refuse rows past a limit, with names that are none, or that ask for too much work. Raises InvalidError."""
    check_rows(terms, parameters, limits, now)
    check_work(estimated_work(terms, parameters, mode), limits)


def check_rows(terms: PositionTerms, parameters: MarketParameters, limits: Limits, now: datetime) -> None:
    """Refuse rows past a limit or with names that are none. Raises InvalidError."""
    check_length("/positions", terms, limits.positions_max)
    _check_positions(terms, parameters, limits, now)


def position_terms(positions: Sequence[PositionIn]) -> PositionTerms:
    """Return the positions as columns."""
    return _terms(_columns(positions))


def _columns(positions: Sequence[PositionIn]) -> Mapping[str, Sequence[Any]]:
    names = PositionIn.__struct_fields__
    if not positions:
        return dict.fromkeys(names, ())
    return dict(zip(names, zip(*map(msgspec.structs.astuple, positions), strict=True), strict=True))


def _given(column: Sequence[Any]) -> bool:
    return column.count(None) < len(column)


def _terms(columns: Mapping[str, Sequence[Any]]) -> PositionTerms:
    expiry = columns["expiry"]
    if _given(expiry):
        expiry = [None if text is None else moment(text, f"/positions/{i}/expiry") for i, text in enumerate(expiry)]
    return PositionTerms(**{name: columns[name] for name in _FIELDS} | {"expiry": expiry})


def fields_given(struct: Struct) -> dict[str, Any]:
    """Return the fields that the caller set; one without a default always is."""
    names, defaults = struct.__struct_fields__, struct.__struct_defaults__
    padded = zip(names, (msgspec.NODEFAULT,) * (len(names) - len(defaults)) + defaults, strict=True)
    return {name: value for name, default in padded if (value := getattr(struct, name)) is not default}


def _check_lengths(body: MarginQuoteIn, limits: Limits) -> None:
    check_length("/positions", body.positions, limits.positions_max)
    check_length("/collateral", body.collateral, limits.positions_max)
    check_length("/liabilities", body.liabilities, limits.positions_max)
    check_length("/reservations", body.reservations, limits.positions_max)
    if isinstance(body.scenarios, list):
        check_length("/scenarios", body.scenarios, limits.scenarios_max)
    if body.market is None:
        return
    check_length("/market/prices", body.market.prices, MARKET_ENTRIES_MAX)
    if not body.market.prices_only:
        for name in _BY_NAME:
            check_length(f"/market/{name}", getattr(body.market, name), OVERRIDES_MAX)
        check_venue_lengths(body.market.venues)


def _underlyings(terms: PositionTerms, parameters: MarketParameters) -> int:
    _, markets = terms.markets
    return len({u if u is not None else parameters.underlying_of(s or "") for s, u in markets})


def estimated_work(
    terms: PositionTerms, parameters: MarketParameters, mode: MarginMode, *, repairs: bool = False
) -> float:
    """Return roughly the milliseconds of one core that a quote takes, from what was measured on small machines.

    Under portfolio margin every move of the liquidation search is a margin assessment of its own; with correlations of
    the request's own (`repairs`) each may need its matrix repaired.
    """
    options = len(terms) - terms.strike.count(None) if "strike" in terms.given else 0
    once = 0.5 + len(terms) * 0.002 + options * 0.06
    if mode != "portfolio":
        return once
    underlyings = _underlyings(terms, parameters)
    curved = options or any(terms.gamma) or any(terms.vega)
    assessment = 0.25 + len(terms) * 0.0005 + options * 0.002 + underlyings**2 * (0.005 if repairs else 0.0001)
    return once + (underlyings + 1) * (110 if curved else 22) * assessment


def venue_work(terms: PositionTerms, parameters: MarketParameters) -> float:
    """Return roughly the milliseconds that a venue's model takes beyond what every quote does."""
    options = len(terms) - terms.strike.count(None) if "strike" in terms.given else 0
    return UNIT_MILLISECONDS * _underlyings(terms, parameters) + 0.002 * len(terms) + 0.01 * options


_LESS_WORK = "fewer underlyings and options, or for another settings.margin_mode"


def check_work(milliseconds: float, limits: Limits, pointer: str = "/positions", instead: str = _LESS_WORK) -> None:
    """Refuse what would take too long. Raises InvalidError."""
    if milliseconds > limits.quote_milliseconds_max:
        detail = (
            f"some {milliseconds / 1e3:,.0f} s of work, over the limit of {limits.quote_milliseconds_max / 1e3:g} s: "
            f"ask for {instead}"
        )
        raise invalid(pointer, "too_much_work", detail)


def _check_positions(terms: PositionTerms, parameters: MarketParameters, limits: Limits, now: datetime) -> None:
    _, markets = terms.markets
    # there are no more underlyings than markets
    if len(markets) > limits.underlyings_max and (count := _underlyings(terms, parameters)) > limits.underlyings_max:
        detail = f"at most {limits.underlyings_max} different underlyings a portfolio, not {count}"
        raise invalid("/positions", "too_many_underlyings", detail)
    for field, names in zip(("symbol", "underlying"), zip(*markets, strict=True), strict=False):
        for name in names:
            if name is not None and not _is_symbol(name):
                detail = "a symbol is 1 to 64 letters, digits or . _ : / - and starts with a letter or digit"
                raise invalid(f"/positions/{getattr(terms, field).index(name)}/{field}", "invalid_symbol", detail)
    if "expiry" in terms.given:
        _check_expiries(terms.expiry, now + timedelta(days=365 * YEARS_TO_EXPIRY_MAX))


@lru_cache(maxsize=8_192)
def _is_symbol(name: str) -> bool:
    return SYMBOL.fullmatch(name) is not None


def _check_expiries(expiries: Sequence[datetime | None], latest: datetime) -> None:
    for index, expiry in enumerate(expiries):
        if expiry is not None and expiry > latest:
            pointer = f"/positions/{index}/expiry"
            raise invalid(pointer, "expiry_too_far", f"an expiry lies within {YEARS_TO_EXPIRY_MAX} years")


def check_length(pointer: str, items: Sized | None, most: int) -> None:
    """Refuse more items than the limit. Raises InvalidError."""
    if items is not None and len(items) > most:
        raise invalid(pointer, "too_many_items", f"at most {most} items, not {len(items)}")


def _holdings(items: Sequence[HoldingIn]) -> list[CollateralTerms]:
    found = []
    for index, item in enumerate(items):
        lent = item.lent or 0.0
        if lent > item.amount:
            raise invalid(f"/collateral/{index}/lent", "lent_above_amount", "no more can be lent than is held")
        found.append(CollateralTerms(item.asset, item.amount, item.price, lent))
    return found


def _scenarios(given: str | list[ScenarioIn] | None) -> tuple[str, Sequence[Scenario]]:
    if given is None:
        return _DEFAULT_SCENARIOS, NAMED[_DEFAULT_SCENARIOS]
    if isinstance(given, str):
        if given not in NAMED:
            raise invalid("/scenarios", "unknown_scenario_set", f"the named sets are {', '.join(NAMED)}")
        return given, NAMED[given]
    if not given:
        raise invalid("/scenarios", "no_scenarios", "give at least one scenario")
    return "own", tuple(_scenario(index, item) for index, item in enumerate(given))


def _scenario(index: int, item: ScenarioIn) -> Scenario:
    if item.price_move is None and not item.shocks and item.vol_move is None:
        raise invalid(f"/scenarios/{index}", "empty_scenario", "a scenario moves a price or the volatility")
    weight = 1.0 if item.weight is None else item.weight
    return Scenario(item.price_move or 0.0, item.vol_move or 0.0, item.shocks or {}, weight)


def _span_charges(market: MarketIn | None) -> dict[str, SpanCharges]:
    if market is None or market.span_charges is None:
        return {}
    return {name: SpanCharges(**fields_given(charges)) for name, charges in market.span_charges.items()}


def _overridden(parameters: MarketParameters, market: MarketIn, settings: Mapping[str, float]) -> MarketParameters:
    """Return the parameters with the request's own, held to the rules that stored ones are held to."""
    assets = dict(parameters.assets)
    for name, asset in (market.assets or {}).items():
        assets[name] = replace(parameters.asset(name), asset=name, **fields_given(asset))
    changed = replace(parameters, assets=assets)
    for name in market.assets or {}:
        with pointers_under(pointer_to("market", "assets", name)):
            market_rules.check_asset(assets[name], changed)
    changed = replace(changed, instruments=_instruments(changed, market.instruments or {}))
    models, policy = _factors(changed, settings)
    return replace(
        changed,
        models=models,
        policy=policy,
        stress=correlation_table(changed.stress, market.correlation, "/market/correlation"),
        hedge=correlation_table(changed.hedge, market.hedge_correlation, "/market/hedge_correlation"),
        venues=venue_parameters(changed, market.venues),
    )


def _instruments(parameters: MarketParameters, given: Mapping[str, InstrumentIn]) -> Mapping[str, InstrumentParameters]:
    instruments = dict(parameters.instruments)
    for symbol, change in given.items():
        known = instruments.get(symbol) or InstrumentParameters(symbol, parameters.underlying_of(symbol))
        with pointers_under(pointer_to("market", "instruments", symbol)):
            instruments[symbol] = replace(known, **instrument_fields(change))
            market_rules.check_instrument(instruments[symbol], parameters.asset(instruments[symbol].underlying))
    return instruments


def instrument_fields(change: InstrumentIn) -> dict[str, Any]:
    """Return the fields of an instrument that the caller set. Raises InvalidError for an expiry that is no time."""
    given = fields_given(change)
    if isinstance(given.get("expiry"), str):
        given["expiry"] = moment(given["expiry"], "/expiry").astimezone(UTC)
    return given


def _factors(parameters: MarketParameters, settings: Mapping[str, float]) -> tuple[ModelParameters, HealthPolicy]:
    if not settings:
        return parameters.models, parameters.policy
    own = {f.name for f in fields(ModelParameters)}
    models = replace(parameters.models, **{k: v for k, v in settings.items() if k in own})
    policy = replace(parameters.policy, **{k: v for k, v in settings.items() if k not in own})
    with pointers_under("/settings"):
        market_rules.check_models(models, policy, parameters.clearing)
    return models, policy


def correlation_table(
    table: CorrelationTable, given: Mapping[str, Mapping[str, float]] | None, pointer: str
) -> CorrelationTable:
    """Return the table with the pairs given in place of its own. Raises InvalidError with the pointer."""
    if given is None:
        return table
    pairs = dict(table.pairs)
    seen: dict[tuple[str, str], float] = {}
    for a, b, rho in chain.from_iterable(((a, b, rho) for b, rho in row.items()) for a, row in given.items()):
        key = (a, b) if a < b else (b, a)
        if a == b and rho != 1.0:
            raise invalid(pointer + pointer_to(a, b), "not_a_correlation", "an asset's correlation with itself is 1")
        if seen.setdefault(key, rho) != rho:
            raise invalid(pointer + pointer_to(a, b), "not_symmetric", f"{a} with {b} is given twice, differently")
    pairs.update({key: rho for key, rho in seen.items() if key[0] != key[1]})
    return replace(table, pairs=pairs)


def quote_time(body: MarginQuoteIn, now: datetime) -> datetime:
    """Return the moment that the quote is for: the request's own, else now. Raises InvalidError."""
    if body.as_of is None:
        return now
    as_of = moment(body.as_of, "/as_of")
    if not AS_OF_MIN <= as_of <= AS_OF_MAX:
        raise invalid("/as_of", "invalid_as_of", f"as_of lies between {AS_OF_MIN:%Y} and {AS_OF_MAX:%Y}")
    return as_of.astimezone(UTC)
