"""Accounts as the live workers' screens see them, the prices that they depend on, and the workers themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.db.session import Tx
from app.domain.tally import PRICES_MAX, WORST_MAX
from app.services import heartbeat, prices, shards
from app.services.figures.keep import Figure, Values, gauge, seconds_since

EVERY_SECONDS = 1.0
COUNTED = ("zones", "alert_levels", "bands")


async def take(tx: Tx, before: Values) -> Values:
    """Return the sums over the live workers; while there is none, the last ones with the workers' absence."""
    told = await heartbeat.told(tx)
    live = [worker for worker in told if worker.seen_at > tx.now - shards.LEASE]
    tallies = [worker.figures for worker in live if worker.figures is not None]
    sums = merged(tallies) if tallies else {n: before[n] for n in (*COUNTED, *_OTHERS) if n in before}
    return {
        **sums,
        "prices": await _moments(tx, list(sums.get("used", ()))),
        "workers": len(live),
        "seen_at": max((worker.seen_at.timestamp() for worker in told), default=before.get("seen_at")),
        "shards": await shards.held(tx),
    }


_OTHERS = ("accounts", "unpriced", "worst", "used")


def merged(tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several workers' tallies come to: each account is on one screen."""
    counted = {name: _total(tally[name] for tally in tallies) for name in COUNTED}
    worst = sorted((row for tally in tallies for row in tally["worst"]), key=_safety)
    used = Counter(_total(tally["prices"] for tally in tallies))
    return {
        **counted,
        "accounts": sum(tally["accounts"] for tally in tallies),
        "unpriced": sum(tally["unpriced"] for tally in tallies),
        "worst": worst[:WORST_MAX],
        "used": dict(used.most_common(PRICES_MAX)),
    }


def _total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in parts:
        total.update(part)
    return dict(total)


def _safety(row: Mapping[str, Any]) -> float:
    """Return what accounts are sorted by: the highest margin ratio first, before it those without equity."""
    ratio = row["margin_ratio"]
    return float("-inf") if ratio is None else -float(ratio)


async def _moments(tx: Tx, names: Sequence[str]) -> dict[str, float]:
    return {name: moment.timestamp() for name, moment in (await prices.moments(tx, names)).items()}


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of accounts, prices and workers."""
    if "zones" in values:
        yield from _of_accounts(values)
    ages = {name: seconds_since(moment, now) for name, moment in values["prices"].items()}
    yield gauge(
        "primerisk_price_age_seconds",
        f"Age of the stored prices in use, of the {PRICES_MAX} that most accounts depend on.",
        ages,
        "asset",
    )
    yield gauge("primerisk_workers", "Workers that were seen within their lease.", values["workers"])
    seen = values["seen_at"]
    age = float("inf") if seen is None else seconds_since(seen, now)
    yield gauge("primerisk_worker_seen_seconds", "Time since any worker was last seen; infinite: none ever was.", age)
    held = {"held": values["shards"], "free": shards.SHARDS - values["shards"]}
    yield gauge("primerisk_shards", "Shards of the accounts, by whether a worker holds them.", held, "state")


def _of_accounts(values: Values) -> Iterable[Metric]:
    yield gauge("primerisk_accounts", "Accounts by zone, as last told.", values["zones"], "zone")
    yield gauge(
        "primerisk_accounts_by_alert_level", "Accounts by alert level, as last told.", values["alert_levels"], "level"
    )
    yield gauge("primerisk_accounts_by_margin_ratio", "Accounts by band of the margin ratio.", values["bands"], "band")
    yield gauge("primerisk_accounts_unpriced", "Accounts that can't be assessed: a price lacks.", values["unpriced"])
    ratio = 0.0
    if values["worst"]:
        first = values["worst"][0]["margin_ratio"]
        ratio = float("inf") if first is None else first
    yield gauge("primerisk_margin_ratio_worst", "Highest margin ratio of any account; infinite: no equity.", ratio)


class Endangered(Collector):
    """Some accounts by id, those in the greatest danger: for an endpoint of its own, that is asked for."""

    def __init__(self, values: Values, most: int) -> None:
        self._worst = values.get("worst", [])[:most]

    def collect(self) -> Iterable[Metric]:
        """Give ratio, utilization and equity of each."""
        for name, key, help_text in _OF_AN_ACCOUNT:
            family = GaugeMetricFamily(name, help_text, labels=["agent_id"])
            for row in self._worst:
                family.add_metric([row["agent_id"]], float("inf") if row[key] is None else row[key])
            yield family


_OF_AN_ACCOUNT = (
    ("primerisk_account_margin_ratio", "margin_ratio", "Margin ratio of an account; infinite: no equity."),
    ("primerisk_account_utilization", "utilization", "Utilization of an account; infinite: no equity."),
    ("primerisk_account_equity_usd", "equity", "Equity of an account, USD."),
)

FIGURE = Figure("accounts", EVERY_SECONDS, take, show)
