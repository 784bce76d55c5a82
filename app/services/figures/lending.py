"""Loans: how many are live, what is borrowed of each asset and at which rate, what is late, what the house advanced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from app.db.session import Tx
from app.domain.money import to_float
from app.services import loans, prices
from app.services.figures.keep import NAMED_MAX, Figure, Values, earliest, gauge, seconds_since

EVERY_SECONDS = 2.0
MARKETS_MAX = 20
"""Assets that label a series, those with the most loans."""


async def take(tx: Tx, _: Values) -> Values:
    """Return the loans of the service by state, their earliest times, the markets with the most, the losses."""
    totals, lost = await loans.totals(tx), await loans.losses(tx)
    return {
        "states": {state: sum(getattr(total, state) for total in totals) for state in ("active", "recalled")},
        "due_at": earliest(total.due_at for total in totals),
        "action_at": earliest(total.next_action_at for total in totals),
        "markets": await _markets(tx, totals[:MARKETS_MAX]),
        "lost": {asset: to_float(amount) for asset, (_, amount) in lost.items()},
        "lossmakers": sum(count for count, _ in lost.values()),
    }


async def _markets(tx: Tx, totals: Sequence[loans.MarketTotal]) -> dict[str, dict[str, Any]]:
    """Return by asset what is borrowed, in units and USD (none without a price), the utilization and the rate."""
    worth = await prices.worth(tx, [total.market.asset for total in totals])
    return {
        market.asset: {
            "usd": to_float(market.borrowed) * worth[market.asset] if market.asset in worth else None,
            "utilization": to_float(market.utilization),
            "rate": to_float(market.rate),
        }
        for market in (total.market for total in totals)
    }


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of loans."""
    markets = values["markets"]
    yield gauge("primerisk_loans", "Live loans by state.", values["states"], "state")
    for name, key, help_text in _OF_A_MARKET:
        of = {asset: market[key] for asset, market in markets.items() if market[key] is not None}
        yield gauge(name, help_text, of, "asset")
    yield gauge(
        "primerisk_loan_recall_overdue_seconds",
        "How long the recalled loan that is most overdue should have been given back.",
        seconds_since(values["due_at"], now),
    )
    yield gauge(
        "primerisk_loan_action_late_seconds",
        "How long the step of a loan that is most overdue has been due.",
        seconds_since(values["action_at"], now),
    )
    lost = dict.fromkeys(markets, 0.0) | values["lost"]
    deficit = CounterMetricFamily(
        "primerisk_loan_deficit", "Units that the house advanced to make lenders whole, by asset.", labels=["asset"]
    )
    for asset in sorted(lost, key=lambda asset: (-lost[asset], asset))[:NAMED_MAX]:
        deficit.add_metric([asset], lost[asset])
    yield deficit
    yield CounterMetricFamily(
        "primerisk_loans_with_deficit", "Loans whose lender the house made whole.", value=values["lossmakers"]
    )


_OF_A_MARKET = (
    ("primerisk_loans_borrowed_usd", "usd", "What is borrowed, by asset, USD at stored prices."),
    (
        "primerisk_loans_utilization",
        "utilization",
        "Share of what is lent or on offer that is borrowed, by asset: U of the rate's curve.",
    ),
    ("primerisk_loans_rate", "rate", "Annual borrow rate of the curve, by asset."),
)

FIGURE = Figure("lending", EVERY_SECONDS, take, show)
