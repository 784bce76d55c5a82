"""Daily closes of assets, the history that risk is estimated from: posted, checked against what is there, read in bulk.

A post is all or nothing. A close that is off its history, or that takes the place of another one, is stored when the
caller confirms it, and is named until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from itertools import groupby
from typing import Literal

import numpy as np
from sqlalchemy import ARRAY, BigInteger, Date, DateTime, Numeric, Text, bindparam, func, select, text, tuple_

from app.db.session import Tx
from app.db.tables import HISTORY, daily_closes, market_state
from app.domain.closes import DEVIATIONS_MAX, Close, Gap, Outlier, missing_days, outliers
from app.domain.money import plain, to_float
from app.domain.panel import Panel
from app.errors import ConflictError, FieldError, InvalidError, invalid
from app.services import audit
from app.services import market_rules as rules
from app.services.parameter_versions import bump_version, hold_version

CLOSES_A_POST_MAX = 20_000
CLOSES_A_PAGE_MAX = 200
DAYS_A_POST_MAX = 1_000_000
"""Days of all assets together that a post may ask to compare with: the span of each, and what surrounds it."""
AROUND = timedelta(days=180)
"""How far around what is posted the history is read that it is compared with."""
DAY_MIN = date(1970, 1, 1)
ERRORS_SHOWN_MAX = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """A posted close that asks for confirmation; `row` is its place in the post."""

    row: int
    asset: str
    day: date
    code: Literal["close_off_history", "close_changed"]
    detail: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What a post comes to, before anything is stored. `gaps` are days missing between the closes around the posted."""

    fresh: Sequence[Close]
    changed: Sequence[Close]
    unchanged: int
    findings: Sequence[Finding]
    gaps: Sequence[Gap]


@dataclass(frozen=True, slots=True)
class Posted:
    """What was stored, under which version of the history; with nothing to store that is the latest."""

    version: int
    stored: int
    changed: int
    unchanged: int
    flagged: Sequence[Finding]
    gaps: Sequence[Gap]


async def post_closes(
    tx: Tx, closes: Sequence[Close], *, confirm: bool = False, deviations_max: float = DEVIATIONS_MAX
) -> Posted:
    """Store closes, all or none; those that are stored already are left as they are.

    Raises InvalidError for what is no close, ConflictError `confirmation_needed` for closes that are off their history
    or differ from what is stored, unless they are confirmed.
    """
    examined = await examine(tx, closes, deviations_max)
    if examined.findings and not confirm:
        raise _unconfirmed(examined.findings)
    return await store(tx, examined)


async def examine(tx: Tx, closes: Sequence[Close], deviations_max: float = DEVIATIONS_MAX) -> Examined:
    """Compare closes with what is stored, which nobody else changes until the transaction ends.

    Raises InvalidError for names, days and prices that are none, a day that stands twice, and too many of them.
    """
    _check(closes, tx.now.date())
    version = await hold_version(tx, HISTORY)
    rows = sorted(range(len(closes)), key=lambda i: (closes[i].asset, closes[i].day))
    by_asset = {asset: list(own) for asset, own in groupby(rows, key=lambda i: closes[i].asset)}
    stored = await _around(tx, closes, by_asset) if version else {}
    fresh: list[Close] = []
    changed: list[Close] = []
    findings: list[Finding] = []
    gaps: list[Gap] = []
    for asset, own in by_asset.items():
        known = stored.get(asset, {})
        new = [i for i in own if closes[i].day not in known]
        other = [i for i in own if known.get(closes[i].day, closes[i].close) != closes[i].close]
        fresh += [closes[i] for i in new]
        changed += [closes[i] for i in other]
        findings += [_changed(i, closes[i], known[closes[i].day]) for i in other]
        findings += _off_history(closes, [*new, *other], known, deviations_max)
        gaps += _gaps(asset, closes, own, known)
    findings.sort(key=lambda finding: finding.row)
    return Examined(fresh, changed, len(closes) - len(fresh) - len(changed), findings, gaps)


async def store(tx: Tx, examined: Examined) -> Posted:
    """Store what was examined in this transaction, with a line in the audit trail where some of it was confirmed."""
    rows = [*examined.fresh, *examined.changed]
    version = await bump_version(tx, HISTORY) if rows else await hold_version(tx, HISTORY)
    if rows:
        values = {
            "assets": [row.asset for row in rows],
            "days": [row.day for row in rows],
            "closes": [row.close for row in rows],
            "version": version,
            "now": tx.now,
        }
        await tx.connection.execute(_UPSERT, values)
    if examined.findings:
        first = examined.findings[0]
        flagged = len(examined.findings)
        await audit.record(tx, "history.confirmed", first.asset, version=version, flagged=flagged, first=first.detail)
    return Posted(
        version, len(examined.fresh), len(examined.changed), examined.unchanged, examined.findings, examined.gaps
    )


_UPSERT = text(
    """
    INSERT INTO daily_closes (asset, day, close, version, stored_at)
    SELECT asset, day, close, :version, :now FROM unnest(:assets, :days, :closes) AS posted (asset, day, close)
    ON CONFLICT (asset, day) DO UPDATE
    SET close = excluded.close, version = excluded.version, stored_at = excluded.stored_at
    """
).bindparams(
    bindparam("assets", type_=ARRAY(Text)),
    bindparam("days", type_=ARRAY(Date)),
    bindparam("closes", type_=ARRAY(Numeric)),
    bindparam("version", type_=BigInteger),
    bindparam("now", type_=DateTime(timezone=True)),
)

_AROUND = text(
    """
    SELECT stored.asset, stored.day, stored.close
    FROM unnest(:assets, :firsts, :lasts) AS posted (asset, first, last)
    JOIN daily_closes AS stored ON stored.asset = posted.asset AND stored.day BETWEEN posted.first AND posted.last
    ORDER BY stored.asset, stored.day
    """
).bindparams(
    bindparam("assets", type_=ARRAY(Text)),
    bindparam("firsts", type_=ARRAY(Date)),
    bindparam("lasts", type_=ARRAY(Date)),
)


def _check(closes: Sequence[Close], today: date) -> None:
    if len(closes) > CLOSES_A_POST_MAX:
        raise invalid("/closes", "too_many", f"At most {CLOSES_A_POST_MAX} closes a post.")
    errors = [error for i, close in enumerate(closes) for error in _errors(f"/closes/{i}", close, today)]
    times = Counter((close.asset, close.day) for close in closes)
    twice = (i for i, close in enumerate(closes) if times[close.asset, close.day] > 1)
    errors += [
        FieldError(f"/closes/{i}/date", "duplicate_day", f"{closes[i].asset} has {closes[i].day} twice in this post.")
        for i in twice
    ]
    rules.refuse(errors[:ERRORS_SHOWN_MAX])


def _errors(where: str, close: Close, today: date) -> Iterator[FieldError]:
    try:
        rules.check_symbol(f"{where}/asset", close.asset)
        rules.check_close(f"{where}/close", close.close)
    except InvalidError as error:
        yield from error.errors
    if close.day > today:
        yield FieldError(f"{where}/date", "in_the_future", f"{close.day} has not come yet: it is {today} (UTC).")
    if close.day < DAY_MIN:
        yield FieldError(f"{where}/date", "in_the_past", f"Closes are kept from {DAY_MIN} on.")


async def _around(tx: Tx, closes: Sequence[Close], by_asset: dict[str, list[int]]) -> dict[str, dict[date, Decimal]]:
    """Return what is stored of each asset from some time before the first of its posted days to some time after."""
    firsts = [closes[own[0]].day - AROUND for own in by_asset.values()]
    lasts = [closes[own[-1]].day + AROUND for own in by_asset.values()]
    if sum((last - first).days for first, last in zip(firsts, lasts, strict=True)) > DAYS_A_POST_MAX:
        detail = "Too many assets over too long a time for one post: send fewer assets at once."
        raise invalid("/closes", "too_many", detail)
    rows = await tx.connection.execute(_AROUND, {"assets": list(by_asset), "firsts": firsts, "lasts": lasts})
    found: dict[str, dict[date, Decimal]] = {}
    for asset, day, close in rows:
        found.setdefault(asset, {})[day] = close
    return found


def _changed(row: int, close: Close, before: Decimal) -> Finding:
    detail = f"{close.asset} on {close.day} is stored as {plain(before)}, and would become {plain(close.close)}"
    return Finding(row, close.asset, close.day, "close_changed", detail)


def _off_history(
    closes: Sequence[Close], posted: Sequence[int], known: dict[date, Decimal], deviations_max: float
) -> list[Finding]:
    """Return which of the posted closes of one asset are off what would then be its history."""
    if not posted:
        return []
    row = {closes[i].day: i for i in posted}
    merged = known | {closes[i].day: closes[i].close for i in posted}
    days = sorted(merged)
    found = outliers(
        np.array([day.toordinal() for day in days], dtype=np.float64),
        np.array([to_float(merged[day]) for day in days], dtype=np.float64),
        np.array([day not in row for day in days], dtype=np.bool_),
        deviations_max,
    )
    return [_off(row[days[o.row]], closes[row[days[o.row]]], days[o.other], merged[days[o.other]], o) for o in found]


def _off(row: int, close: Close, day: date, other: Decimal, found: Outlier) -> Finding:
    detail = (
        f"{close.asset} at {plain(close.close)} on {close.day} is {found.deviations:.1f} robust deviations"
        f" ({found.daily_deviation:.2%} a day) off {plain(other)} on {day}"
    )
    return Finding(row, close.asset, close.day, "close_off_history", detail)


def _gaps(asset: str, closes: Sequence[Close], own: Sequence[int], known: dict[date, Decimal]) -> list[Gap]:
    """Return the days that are missing next to and between the posted ones."""
    first, last = closes[own[0]].day, closes[own[-1]].day
    days = sorted(known.keys() | {closes[i].day for i in own})
    return [gap for gap in missing_days(asset, days) if gap.last >= first - _DAY and gap.first <= last + _DAY]


_DAY = timedelta(days=1)


def _unconfirmed(findings: Sequence[Finding]) -> ConflictError:
    errors = tuple(FieldError(f"/closes/{f.row}/close", f.code, f.detail) for f in findings[:ERRORS_SHOWN_MAX])
    detail = f"{len(findings)} closes ask for confirmation, nothing is stored; the first: {findings[0].detail}."
    return ConflictError(detail, code="confirmation_needed", errors=errors, figures={"flagged": len(findings)})


async def list_closes(
    tx: Tx,
    limit: int,
    *,
    asset: str | None = None,
    first: date | None = None,
    last: date | None = None,
    after: tuple[str, date] | None = None,
) -> list[Close]:
    """Return closes by asset and day, both ends of the days included, from past the asset and day `after`."""
    columns = daily_closes.c
    query = select(columns.asset, columns.day, columns.close).order_by(columns.asset, columns.day)
    if asset is not None:
        query = query.where(columns.asset == asset)
    if first is not None:
        query = query.where(columns.day >= first)
    if last is not None:
        query = query.where(columns.day <= last)
    if after is not None:
        query = query.where(tuple_(columns.asset, columns.day) > after)
    rows = await tx.connection.execute(query.limit(min(limit, CLOSES_A_PAGE_MAX)))
    return [Close(**row) for row in rows.mappings()]


async def load_panel(tx: Tx, assets: Sequence[str], days: int, last: date | None = None) -> Panel:
    """Return the panel of assets over a window of `days` daily returns, up to the day `last`.

    Left out, `last` is the latest day on which any of the assets has a close. The panel has a row for each day and says
    which returns are missing; where nothing is stored at all it is empty.
    """
    names = list(dict.fromkeys(assets))
    if last is None:
        query = select(func.max(daily_closes.c.day)).where(daily_closes.c.asset.in_(names))
        last = (await tx.connection.execute(query)).scalar_one()
    if last is None:
        return Panel(tuple(names), np.empty(0, dtype="datetime64[D]"), np.empty((0, len(names))))
    first = last - timedelta(days=days)
    levels = np.full((days + 1, len(names)), np.nan)
    found = await tx.connection.execute(_WINDOW, {"assets": names, "first": first, "last": last})
    for asset, rows, closes in found:
        levels[rows, names.index(asset)] = closes
    return Panel.from_closes(names, np.datetime64(first, "D") + np.arange(days + 1), levels)


# an asset a row: a million closes are two arrays of floats each, and not a million rows of decimals
_WINDOW = text(
    """
    SELECT asset, array_agg(day - :first), array_agg(close::float8) FROM daily_closes
    WHERE asset = ANY (:assets) AND day BETWEEN :first AND :last GROUP BY asset
    """
).bindparams(bindparam("assets", type_=ARRAY(Text)), bindparam("first", type_=Date), bindparam("last", type_=Date))


async def history_version(tx: Tx) -> int:
    """Return how far the history has come."""
    query = select(market_state.c.version).where(market_state.c.name == HISTORY)
    found: int = (await tx.connection.execute(query)).scalar_one()
    return found
