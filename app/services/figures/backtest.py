"""How often accounts lost more than the VaR that was forecast of them, against how often they should have.

Pooled over all accounts: each account and day of the last 250 is one observation. They move together, so that this is
the average account's record and no test of significance.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timedelta

from prometheus_client import Metric

from app.db.session import Tx
from app.services import snapshots
from app.services.figures.keep import Figure, Values, gauge

EVERY_SECONDS = 60.0
DAYS = 250
"""The window of the traffic light of the Basel Committee (1996)."""
DAYS_AT_ONCE = 8
CONFIDENCES = {"0.95": 0.95, "0.99": 0.99}


async def take(tx: Tx, before: Values) -> Values:
    """Count the days that have not been counted, at most so many at once, and the last two anew."""
    today = snapshots.day_of(tx.now)
    first = max(today - timedelta(days=DAYS - 1), await snapshots.first_day(tx) or today)
    counted = date.fromisoformat(before["through"]) - timedelta(days=1) if "through" in before else first
    start = max(first, counted)
    through = min(today, start + timedelta(days=DAYS_AT_ONCE - 1))
    new = {day.isoformat(): list(tally) for day, tally in (await snapshots.tallies(tx, start, through)).items()}
    kept = {day: tally for day, tally in before.get("days", {}).items() if first <= date.fromisoformat(day) < start}
    return {"days": kept | new, "through": through.isoformat()}


def show(values: Values, _: datetime) -> Iterable[Metric]:
    """Return the series of the backtest."""
    days = values.get("days", {}).values()
    forecasts = sum(day[0] for day in days)
    exceptions = {"0.95": sum(day[1] for day in days), "0.99": sum(day[2] for day in days)}
    yield gauge(
        "primerisk_var_forecasts", f"Forecasts of accounts' VaR in {DAYS} days that a day was held to.", forecasts
    )
    yield gauge(
        "primerisk_var_exceptions",
        f"Days of accounts in {DAYS} on which the loss was larger than the VaR forecast, by confidence.",
        exceptions,
        "confidence",
    )
    yield gauge(
        "primerisk_var_exceptions_expected",
        "As many as there should be, by confidence.",
        {name: (1.0 - confidence) * forecasts for name, confidence in CONFIDENCES.items()},
        "confidence",
    )


FIGURE = Figure("backtest", EVERY_SECONDS, take, show)
