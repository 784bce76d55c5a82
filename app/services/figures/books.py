"""The ledger's self-check, some accounts at a time, and what agents owe the house."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal

from prometheus_client import Metric

from app.db.session import Tx
from app.services import accounts, ledger
from app.services.figures.keep import NAMED_MAX, Figure, Values, gauge, seconds_since

ACCOUNTS_A_TIME = 2_000


async def take(tx: Tx, before: Values, *, accounts_a_time: int) -> Values:
    """Check the next accounts in order of their ids; at the end of them a sweep is done, and the next begins.

    `found` is what this sweep has found so far, `last` what the one before it found, units off by asset.
    """
    agents = await accounts.list_ids(tx, before.get("after", ""), accounts_a_time)
    is_last = len(agents) < accounts_a_time
    found = _added(before.get("found", {}), await ledger.differences(tx, agents))
    owed = {asset: float(amount) for asset, amount in (await ledger.owed(tx)).items()}
    if not is_last:
        return {**before, "after": agents[-1], "found": found, "owed": owed}
    return {"after": "", "found": {}, "last": found, "swept_at": tx.now.timestamp(), "owed": owed}


def _added(sums: Mapping[str, str], more: Mapping[str, Decimal]) -> dict[str, str]:
    """Return the sums by asset as exact decimals in text."""
    total = {asset: Decimal(amount) for asset, amount in sums.items()}
    for asset, amount in more.items():
        total[asset] = total.get(asset, Decimal(0)) + amount
    return {asset: str(amount) for asset, amount in total.items()}


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of the ledger: of an imbalance the larger of this sweep's and the last one's."""
    last, found = values.get("last", {}), values.get("found", {})
    off = {asset: max(float(last.get(asset, 0)), float(found.get(asset, 0))) for asset in {*last, *found}}
    named = sorted(off, key=lambda asset: (-off[asset], asset))[:NAMED_MAX]
    yield gauge(
        "primerisk_ledger_imbalance",
        "Units by which balances differ from the sums of their entries, by asset: 0, or something is broken.",
        {asset: off[asset] for asset in named},
        "asset",
    )
    if "swept_at" in values:
        yield gauge(
            "primerisk_ledger_checked_seconds",
            "Time since every account's ledger had been checked.",
            seconds_since(values["swept_at"], now),
        )
    owed = dict.fromkeys(off, 0.0) | values["owed"]
    yield gauge(
        "primerisk_owed",
        "Units that agents owe the house beyond all that they have, by asset.",
        {asset: owed[asset] for asset in sorted(owed)[:NAMED_MAX]},
        "asset",
    )


def figure(every_seconds: float, accounts_a_time: int = ACCOUNTS_A_TIME) -> Figure:
    """Return the kind, so many accounts checked so often."""
    return Figure("ledger", every_seconds, functools.partial(take, accounts_a_time=accounts_a_time), show)
