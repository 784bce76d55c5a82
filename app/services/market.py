"""The market's parameters, versioned (`parameter_versions` says how), with their audit trail."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

from sqlalchemy import func, insert, select, union_all
from sqlalchemy.dialects.postgresql import distinct_on

from app.db.lending_tables import lending_parameters
from app.db.tables import (
    OTHER_PAIR,
    PARAMETERS,
    PRICES,
    asset_parameters,
    correlation_parameters,
    instrument_parameters,
    market_changes,
    market_state,
    model_parameters,
)
from app.db.trading_tables import PENDING_STATES, orders, positions
from app.domain.money import to_decimal, to_float
from app.domain.parameters import (
    DEFAULT_ASSET,
    REGIME_CORRELATIONS,
    REGIMES,
    AssetKind,
    AssetParameters,
    ClearingParameters,
    CorrelationTable,
    HealthPolicy,
    InstrumentKind,
    InstrumentParameters,
    LendingParameters,
    MarketParameters,
    ModelParameters,
    Pairs,
    Regime,
)
from app.errors import ConflictError, FieldError, NotFoundError, invalid, pointer_to, pointers_under
from app.services import market_rules as rules
from app.services.parameter_versions import (
    Change,
    ChangeKind,
    Versioned,
    check_expected,
    latest,
    lock_parameters,
    next_version,
    row_at,
    version_of,
    versions_of,
)
from app.services.venue_parameters import stored_venues

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import RowMapping, Table

    from app.db.session import Tx

CHANGES_A_PAGE_MAX = 200
ENTRIES_A_PUT_MAX = 10_000
NAMES_A_CHANGE_MAX = 10
"""Names that a version's line spells out; the rows under the version say the others."""

Matrix = Literal["stress", "hedge"] | Regime
"""The tables of correlations; a regime's lists its own pairs alone, the others follow from the stress table."""
T = TypeVar("T")

_MODEL_NAMES = tuple(field.name for field in fields(ModelParameters))
_POLICY_NAMES = tuple(field.name for field in fields(HealthPolicy))
_CLEARING_NAMES = tuple(field.name for field in fields(ClearingParameters))


class AssetChange(TypedDict, total=False):
    """The fields of an asset to set; one left out keeps its value."""

    kind: AssetKind
    haircut: float
    initial_margin_rate: float
    maintenance_margin_rate: float
    price_range: float
    volatility_range: float
    volatility: float | None
    concentration_limit: float | None


class InstrumentChange(TypedDict, total=False):
    """The fields of an instrument to set; a rate set to None is the underlying's again."""

    underlying: str
    kind: InstrumentKind
    contract_size: float
    initial_margin_rate: float | None
    maintenance_margin_rate: float | None
    price_range: float | None
    volatility: float | None
    expiry: datetime | None


class LendingChange(TypedDict, total=False):
    """The fields of an asset's loans to set; one left out keeps its value."""

    base_rate: float
    slope: float
    steep_slope: float
    target_utilization: float
    minimum_rate: float
    collateral_ratio: float
    low_ratio: float
    liquidation_ratio: float
    decimals: int


class Versions(NamedTuple):
    """How far the two sides of the market have come, and when that was read."""

    parameters: int
    prices: int
    read_at: datetime


class Entry(NamedTuple, Generic[T]):
    """One of many to set: its fields, and the version that it is expected at."""

    change: T
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class BulkPut:
    """The version under which so many entries were changed; where none was, the latest there is."""

    version: int
    changed: int
    unchanged: int


# --- reading


_VERSIONS = select(market_state.c.name, market_state.c.version, func.clock_timestamp().label("read_at"))


async def load_versions(tx: Tx) -> Versions:
    """Return the latest committed versions, and when they were read."""
    rows = (await tx.connection.execute(_VERSIONS)).all()
    versions = {name: version for name, version, _ in rows}
    return Versions(versions[PARAMETERS], versions[PRICES], rows[0].read_at)


async def load_parameters(tx: Tx, at: int | None = None) -> MarketParameters:
    """Return every parameter, current or as of a version; NotFoundError for a version that never was."""
    latest = (await load_versions(tx)).parameters
    version = latest if at is None else at
    if not 1 <= version <= latest:
        raise NotFoundError(f"There is no version {version} of the parameters.", code="version_not_found")
    return await _parameters(tx, version)


async def hold_parameters(tx: Tx, version: int) -> None:
    """Keep the parameters as they are until the transaction ends. Raises ConflictError where they have moved on."""
    state = market_state.c
    query = select(state.version).where(state.name == PARAMETERS).with_for_update(read=True)
    if (await tx.connection.execute(query)).scalar_one() != version:
        detail = "The market's parameters have just changed: try again."
        raise ConflictError(detail, "parameters_changed", (FieldError("", "parameters_changed", detail),))


async def get_asset(tx: Tx, asset: str, at: int | None = None) -> Versioned[AssetParameters]:
    """Return a listed asset, current or as of a version; NotFoundError when it is not listed."""
    row = await row_at(tx, asset_parameters, asset_parameters.c.asset == asset, at)
    if row is None:
        raise NotFoundError(f"There is no asset {asset}.", code="asset_not_found")
    return Versioned(_asset(row), row["version"])


async def stablecoins(tx: Tx, assets: Iterable[str]) -> set[str]:
    """Return which of some assets are stablecoins; of those that are not listed, all or none, as the default is."""
    columns, named = asset_parameters.c, set(assets)
    query = select(columns.asset, columns.kind).ext(distinct_on(columns.asset))
    query = query.where(columns.asset.in_({*named, DEFAULT_ASSET})).order_by(columns.asset, columns.version.desc())
    kinds: dict[str, AssetKind] = {row.asset: row.kind for row in await tx.connection.execute(query)}
    return {asset for asset in named if kinds.get(asset, kinds[DEFAULT_ASSET]) == "stable"}


async def get_instrument(tx: Tx, symbol: str, at: int | None = None) -> Versioned[InstrumentParameters]:
    """Return a listed instrument, current or as of a version; NotFoundError when it is not listed."""
    row = await row_at(tx, instrument_parameters, instrument_parameters.c.symbol == symbol, at)
    if row is None:
        raise NotFoundError(f"There is no instrument {symbol}.", code="instrument_not_found")
    return Versioned(_instrument(row), row["version"])


async def list_changes(tx: Tx, limit: int, before: int | None = None) -> list[Change]:
    """Return the audit trail, newest first, from below the version `before`."""
    query = select(market_changes).order_by(market_changes.c.version.desc())
    if before is not None:
        query = query.where(market_changes.c.version < before)
    rows = await tx.connection.execute(query.limit(min(limit, CHANGES_A_PAGE_MAX)))
    return [Change(**row) for row in rows.mappings()]


# --- writing parameters


async def put_asset(tx: Tx, asset: str, change: AssetChange, expected: int | None = None) -> Versioned[AssetParameters]:
    """Set fields of an asset; a new one starts from the default's. A change of nothing writes nothing.

    Raises ConflictError when the stored version is not the expected one (0: not listed), InvalidError when
    the merged asset, or an instrument that inherits from it, would be out of range.
    """
    rules.check_symbol("/asset", asset)
    parameters = await _locked_parameters(tx)
    stored = await version_of(tx, asset_parameters, asset_parameters.c.asset == asset)
    check_expected(asset, stored, expected)
    merged = replace(parameters.asset(asset), asset=asset, **change)
    if stored and merged == parameters.asset(asset):
        return Versioned(merged, stored)
    rules.check_asset(merged, parameters)
    version = await next_version(tx, "asset", asset)
    await tx.connection.execute(insert(asset_parameters), _stored(merged, version))
    return Versioned(merged, version)


async def put_lending(
    tx: Tx, asset: str, change: LendingChange, expected: int | None = None
) -> Versioned[LendingParameters]:
    """Set fields of an asset's loans; as `put_asset`. Floating rates follow once its market is priced anew."""
    rules.check_symbol("/asset", asset)
    parameters = await _locked_parameters(tx)
    stored = await version_of(tx, lending_parameters, lending_parameters.c.asset == asset)
    check_expected(asset, stored, expected)
    merged = replace(parameters.loans_of(asset), asset=asset, **change)
    if stored and merged == parameters.loans_of(asset):
        return Versioned(merged, stored)
    rules.check_lending(merged)
    version = await next_version(tx, "lending", asset)
    await tx.connection.execute(insert(lending_parameters), _stored(merged, version))
    return Versioned(merged, version)


async def put_instrument(
    tx: Tx, symbol: str, change: InstrumentChange, expected: int | None = None
) -> Versioned[InstrumentParameters]:
    """Set fields of an instrument; as `put_asset`. A new one may take its underlying from the symbol.

    Underlying, kind, contract size and an expiry that is known say what the contract is, and open positions hold it:
    they never change (ConflictError). Another contract is another symbol.
    """
    rules.check_symbol("/symbol", symbol)
    parameters = await _locked_parameters(tx)
    stored = await version_of(tx, instrument_parameters, instrument_parameters.c.symbol == symbol)
    check_expected(symbol, stored, expected)
    merged = _merged_instrument(parameters, symbol, change)
    if merged == parameters.instruments.get(symbol):
        return Versioned(merged, stored)
    await _check_untraded(tx, parameters, [merged])
    version = await next_version(tx, "instrument", symbol)
    await tx.connection.execute(insert(instrument_parameters), _stored(merged, version))
    return Versioned(merged, version)


async def put_assets(tx: Tx, entries: Mapping[str, Entry[AssetChange]]) -> BulkPut:
    """Set fields of many assets, all or none, under one version; each as `put_asset`.

    Pointers start with /{asset}. New ones start from the default as it was before; what is checked is the market as
    all entries leave it.
    """
    _check_many(entries)
    parameters = await _locked_parameters(tx)
    stored = await versions_of(tx, asset_parameters, asset_parameters.c.asset)
    merged: dict[str, AssetParameters] = {}
    for name, (change, expected) in entries.items():
        with pointers_under(pointer_to(name)):
            rules.check_symbol("", name)
            check_expected(name, stored.get(name, 0), expected)
        asset = replace(parameters.asset(name), asset=name, **change)
        if name not in stored or asset != parameters.asset(name):
            merged[name] = asset
    default = merged.get(DEFAULT_ASSET, parameters.default_asset)
    listed = {**parameters.assets, **{n: a for n, a in merged.items() if n != DEFAULT_ASSET}}
    rules.check_assets(merged, replace(parameters, assets=listed, default_asset=default))
    return await _write_many(tx, "asset", asset_parameters, merged, len(entries), parameters.version)


async def put_instruments(tx: Tx, entries: Mapping[str, Entry[InstrumentChange]]) -> BulkPut:
    """Set fields of many instruments, all or none, under one version; each as `put_instrument`.

    Pointers start with /{symbol}.
    """
    _check_many(entries)
    parameters = await _locked_parameters(tx)
    stored = await versions_of(tx, instrument_parameters, instrument_parameters.c.symbol)
    merged: dict[str, InstrumentParameters] = {}
    for symbol, (change, expected) in entries.items():
        current = parameters.instruments.get(symbol)
        with pointers_under(pointer_to(symbol)):
            rules.check_symbol("", symbol)
            check_expected(symbol, stored.get(symbol, 0), expected)
            instrument = _merged_instrument(parameters, symbol, change)
        if instrument != current:
            merged[symbol] = instrument
    await _check_untraded(tx, parameters, merged.values())
    return await _write_many(tx, "instrument", instrument_parameters, merged, len(entries), parameters.version)


async def put_model_parameters(
    tx: Tx, changes: Mapping[str, float], expected: int | None = None
) -> Versioned[Mapping[str, float]]:
    """Set factors of the models and thresholds of the policy by name, all under one version.

    Returns every value. `expected` is the version of the latest change to any of them.
    """
    unknown = changes.keys() - {*_MODEL_NAMES, *_POLICY_NAMES, *_CLEARING_NAMES}
    rules.refuse(FieldError(pointer_to(n), "unknown_parameter", "There is no such parameter.") for n in sorted(unknown))
    parameters = await _locked_parameters(tx)
    stored = await version_of(tx, model_parameters)
    check_expected("models", stored, expected)
    current: dict[str, float] = asdict(parameters.models) | asdict(parameters.policy) | asdict(parameters.clearing)
    merged = current | dict(changes)
    written = {name: value for name, value in merged.items() if value != current[name]}
    if not written:
        return Versioned(merged, stored)
    rules.check_models(*_models(merged))
    version = await next_version(tx, "model", ",".join(written))
    rows = [{"name": n, "version": version, "value": to_decimal(v)} for n, v in written.items()]
    await tx.connection.execute(insert(model_parameters), rows)
    return Versioned(merged, version)


async def put_correlation(
    tx: Tx, matrix: Matrix, pair: tuple[str, str] | None, value: float, expected: int | None = None
) -> Versioned[float]:
    """Set one pair's correlation, in either order, or (pair None) that of every pair that is not listed.

    Raises InvalidError `pair_needed` for the latter of a regime.
    """
    if pair is None and matrix in REGIMES:
        raise invalid("/pair", "pair_needed", "What other pairs have in a regime follows from the stress matrix.")
    a, b = _sorted_pair(pair)
    if value not in rules.CORRELATION:
        raise invalid("/value", "out_of_range", f"A correlation must be {rules.CORRELATION}.")
    await _locked_parameters(tx)
    columns = correlation_parameters.c
    key = (columns.matrix == matrix) & (columns.a == a) & (columns.b == b)
    row = await row_at(tx, correlation_parameters, key)
    stored = row["version"] if row else 0
    check_expected(f"{matrix} {a}-{b}", stored, expected)
    if row and to_float(row["value"]) == value:
        return Versioned(value, stored)
    version = await next_version(tx, "correlation", f"{matrix}:{a}:{b}")
    values = {"matrix": matrix, "a": a, "b": b, "version": version, "value": to_decimal(value)}
    await tx.connection.execute(insert(correlation_parameters), values)
    return Versioned(value, version)


# --- versions and rows


async def _locked_parameters(tx: Tx) -> MarketParameters:
    """Take the writers' lock, then read what the last writer left."""
    return await _parameters(tx, await lock_parameters(tx))


def _check_many(entries: Mapping[str, object]) -> None:
    if len(entries) > ENTRIES_A_PUT_MAX:
        raise invalid("", "too_many", f"At most {ENTRIES_A_PUT_MAX} entries a request.")


async def _write_many(
    tx: Tx,
    kind: ChangeKind,
    table: Table,
    merged: Mapping[str, AssetParameters | InstrumentParameters],
    entries: int,
    latest: int,
) -> BulkPut:
    if not merged:
        return BulkPut(latest, 0, entries)
    names = sorted(merged)
    more = f" and {len(names) - NAMES_A_CHANGE_MAX} more" if len(names) > NAMES_A_CHANGE_MAX else ""
    version = await next_version(tx, kind, ",".join(names[:NAMES_A_CHANGE_MAX]) + more)
    await tx.connection.execute(insert(table), [_stored(merged[name], version) for name in names])
    return BulkPut(version, len(names), entries - len(names))


def _merged_instrument(parameters: MarketParameters, symbol: str, change: InstrumentChange) -> InstrumentParameters:
    """Return the instrument with the change; refuse one that is out of range, or no longer the same contract."""
    current = parameters.instruments.get(symbol)
    merged = replace(current or InstrumentParameters(symbol, parameters.underlying_of(symbol)), **change)
    if merged != current:
        rules.check_instrument(merged, parameters.asset(merged.underlying))
        if current is not None:
            _check_same_contract(current, merged)
    return merged


def _check_same_contract(current: InstrumentParameters, merged: InstrumentParameters) -> None:
    fixed = ["underlying", "kind", "contract_size", *(["expiry"] if current.expiry is not None else [])]
    for name in fixed:
        if getattr(current, name) != getattr(merged, name):
            detail = f"The {name} of {current.symbol} never changes: positions hold it. Use another symbol."
            raise ConflictError(detail, "contract_fixed", (FieldError(f"/{name}", "contract_fixed", detail),))


async def _check_untraded(tx: Tx, parameters: MarketParameters, merged: Iterable[InstrumentParameters]) -> None:
    """Refuse to list, as another contract, what is traded already as the perpetual that its name implies."""
    implied = InstrumentParameters("", "").contract_size
    new = [i for i in merged if i.symbol not in parameters.instruments]
    other = [i.symbol for i in new if (i.contract_size, i.underlying) != (implied, parameters.underlying_of(i.symbol))]
    is_open = select(positions.c.symbol).where(positions.c.symbol.in_(other), positions.c.closed_at.is_(None))
    waits = select(orders.c.symbol).where(orders.c.symbol.in_(other), orders.c.status.in_(PENDING_STATES))
    query = union_all(is_open, waits).limit(1)
    found = (await tx.connection.execute(query)).scalar_one_or_none() if other else None
    if found is not None:
        detail = f"Positions are open in {found}, as a perpetual of size {implied:g}. Use another symbol."
        raise ConflictError(detail, "contract_fixed", (FieldError("/contract_size", "contract_fixed", detail),))


def _sorted_pair(pair: tuple[str, str] | None) -> tuple[str, str]:
    if pair is None:
        return OTHER_PAIR, OTHER_PAIR
    for index, name in enumerate(pair):
        rules.check_symbol(f"/pair/{index}", name)
    a, b = min(pair), max(pair)
    if a == b:
        raise invalid("/pair/1", "same_asset", "The correlation of an asset with itself is 1.")
    return a, b


async def _parameters(tx: Tx, version: int) -> MarketParameters:
    """Return the parameters as of a version; no lock is needed, since rows under it never change."""
    assets = {a.asset: a for a in map(_asset, await latest(tx, asset_parameters, ("asset",), version))}
    instruments = map(_instrument, await latest(tx, instrument_parameters, ("symbol",), version))
    values = await latest(tx, model_parameters, ("name",), version)
    correlations = await latest(tx, correlation_parameters, ("matrix", "a", "b"), version)
    models, policy, clearing = _models({row["name"]: to_float(row["value"]) for row in values})
    lending = {p.asset: p for p in map(_lending, await latest(tx, lending_parameters, ("asset",), version))}
    return MarketParameters(
        version=version,
        default_asset=assets.pop(DEFAULT_ASSET),
        assets=MappingProxyType(assets),
        instruments=MappingProxyType({i.symbol: i for i in instruments}),
        stress=_correlations(correlations, "stress"),
        hedge=_correlations(correlations, "hedge"),
        regimes=MappingProxyType({regime: _regime_pairs(correlations, regime) for regime in REGIMES}),
        models=models,
        policy=policy,
        default_lending=lending.pop(DEFAULT_ASSET),
        lending=MappingProxyType(lending),
        clearing=clearing,
        venues=await stored_venues(tx, version),
    )


def _models(values: Mapping[str, float]) -> tuple[ModelParameters, HealthPolicy, ClearingParameters]:
    """Return the three groups; a name that the database does not hold yet has its default."""
    models = {name: values[name] for name in _MODEL_NAMES if name in values}
    policy = {name: values[name] for name in _POLICY_NAMES if name in values}
    clearing = {name: values[name] for name in _CLEARING_NAMES if name in values}
    return ModelParameters(**models), HealthPolicy(**policy), ClearingParameters(**clearing)


def _correlations(rows: Iterable[RowMapping], matrix: Matrix) -> CorrelationTable:
    pairs = _pairs(rows, matrix)
    other = pairs.pop((OTHER_PAIR, OTHER_PAIR))
    return CorrelationTable(MappingProxyType(pairs), other)


def _regime_pairs(rows: Iterable[RowMapping], regime: Regime) -> Pairs:
    """Return a regime's own pairs, those of the package where the database does not hold any yet."""
    return MappingProxyType(_pairs(rows, regime) or dict(REGIME_CORRELATIONS[regime]))


def _pairs(rows: Iterable[RowMapping], matrix: Matrix) -> dict[tuple[str, str], float]:
    return {(r["a"], r["b"]): to_float(r["value"]) for r in rows if r["matrix"] == matrix}


def _asset(row: RowMapping) -> AssetParameters:
    return AssetParameters(**_plain(row))


def _lending(row: RowMapping) -> LendingParameters:
    return LendingParameters(**_plain(row))


def _instrument(row: RowMapping) -> InstrumentParameters:
    return InstrumentParameters(**_plain(row))


def _plain(row: RowMapping) -> dict[str, Any]:
    return {k: to_float(v) if isinstance(v, Decimal) else v for k, v in row.items() if k != "version"}


def _stored(value: AssetParameters | InstrumentParameters | LendingParameters, version: int) -> dict[str, object]:
    row = {k: to_decimal(v) if isinstance(v, int | float) else v for k, v in asdict(value).items()}
    return row | {"version": version}
