"""Every kind of figure that operators are shown. A capability adds its own here, its panels in `ops/grafana`."""

from __future__ import annotations

from dataclasses import replace

from app.services.figures import accounts, backtest, books, calls, clearing, fleets, lending, webhooks
from app.services.figures.keep import Figure


def kinds(poll_seconds: float, ledger_seconds: float) -> tuple[Figure, ...]:
    """Return them all, taken no more often than they are looked for; the ledger is checked so often."""
    ledger = books.figure(ledger_seconds)
    found = (
        calls.FIGURE,
        accounts.FIGURE,
        webhooks.FIGURE,
        lending.FIGURE,
        clearing.FIGURE,
        fleets.FIGURE,
        ledger,
        backtest.FIGURE,
    )
    return tuple(replace(kind, every_seconds=max(kind.every_seconds, poll_seconds)) for kind in found)
