"""Margin calls: how many are live, how long they have left, which are late, what was lost."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from app.db.session import Tx
from app.domain.margin_calls import LIVE_STATES
from app.services import live_calls
from app.services.figures.keep import Figure, Values, gauge, seconds_since

GRACE_SECONDS = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0)
"""Upper bounds of the buckets of the time that is left; what is past its deadline is in the first."""
EVERY_SECONDS = 1.0


async def take(tx: Tx, _: Values) -> Values:
    """Return live calls by state, the time left of those open by bucket, the oldest that are late, the losses."""
    live = await live_calls.live_now(tx)
    grace, grace_sum = await live_calls.time_left(tx, GRACE_SECONDS)
    lost = await live_calls.losses(tx)
    states = {state: live[state].count if state in live else 0 for state in LIVE_STATES}
    deadline = live["open"].deadline_at if "open" in live else None
    actions = [of.next_action_at for of in live.values() if of.next_action_at is not None]
    return {
        "states": states,
        "grace": [*grace, states["open"]],
        "grace_sum": grace_sum,
        "deadline": None if deadline is None else deadline.timestamp(),
        "action": min(actions).timestamp() if actions else None,
        "lost": float(lost.deficit),
        "lossmakers": lost.calls,
    }


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of margin calls."""
    yield gauge("primerisk_margin_calls", "Live margin calls by state.", values["states"], "state")
    bounds = [*(str(bound) for bound in GRACE_SECONDS), "+Inf"]
    yield HistogramMetricFamily(
        "primerisk_margin_call_grace_remaining_seconds",
        "Time left to the deadline, of the calls that are open now: a picture of this moment, not a sum over time.",
        buckets=list(zip(bounds, values["grace"], strict=True)),
        sum_value=values["grace_sum"],
    )
    yield gauge(
        "primerisk_margin_call_overdue_seconds",
        "How long the open call that is most overdue has been past its deadline.",
        seconds_since(values["deadline"], now),
    )
    yield gauge(
        "primerisk_margin_call_action_late_seconds",
        "How long the step of a call that is most overdue has been due.",
        seconds_since(values["action"], now),
    )
    yield CounterMetricFamily(
        "primerisk_margin_call_deficit_usd", "Losses that margin calls did not cover, USD.", value=values["lost"]
    )
    yield CounterMetricFamily(
        "primerisk_margin_calls_with_deficit", "Margin calls that did not cover a loss.", value=values["lossmakers"]
    )


FIGURE = Figure("calls", EVERY_SECONDS, take, show)
