"""Accounts in danger, margin calls and what becomes of them, webhooks, prices, VaR held to account."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana.panels import board, figure, graph, quantiles, row, rows, sql, stacked

OVERDUE = "max(primerisk_margin_call_overdue_seconds)"
LOST = "max(primerisk_margin_call_deficit_usd_total)"
UNDELIVERED = 'max(primerisk_webhook_oldest_undelivered_seconds{lane="margin_call"})'


def dashboard() -> Dashboard:
    """Return the dashboard of margins and calls."""
    made = board("primerisk: margins and calls", "margins", "Which agents are in danger, and what is done about it.")
    for part in (_now, _accounts, _calls, _webhooks, _risk):
        made = part(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    live = 'sum(max by (state) (primerisk_margin_calls{state!="noticed"}))'
    return (
        made.with_row(row("Now"))
        .with_panel(figure("In the red zone", "Accounts.", "short", 'max(primerisk_accounts{zone="RED"})', 1.0, 10.0))
        .with_panel(
            figure(
                "Worst margin ratio",
                "1 is liquidation; infinite: no equity.",
                "percentunit",
                "max(primerisk_margin_ratio_worst)",
                0.7,
                0.85,
            )
        )
        .with_panel(figure("Live calls", "Open, expired or liquidating.", "short", live, 1.0, 10.0))
        .with_panel(figure("Past the deadline", "Of the open call that is most overdue.", "s", OVERDUE, 1.0, 5.0))
        .with_panel(figure("Undelivered", "Oldest webhook of a margin call.", "s", UNDELIVERED, 2.0, 10.0))
        .with_panel(figure("Lost", "What margin calls did not cover, USD.", "currencyUSD", LOST, alarm=0.01))
    )


def _accounts(made: Dashboard) -> Dashboard:
    worst = """
        SELECT name, agent_id, margin_ratio, utilization, equity, zone, alert_level, stale, margin_call, deadline_at
        FROM operator_accounts ORDER BY margin_ratio DESC NULLS FIRST, equity LIMIT 100"""
    calls = """
        SELECT name, agent_id, state, cause, deadline_at - now() AS left, utilization, equity, shortfall, slices,
               deficit, opened_at, acknowledged_at, margin_call_id
        FROM operator_calls ORDER BY deadline_at NULLS LAST LIMIT 200"""
    return (
        made.with_row(row("Accounts"))
        .with_panel(stacked("By zone", "As last told.", "short", {"{{zone}}": "max by (zone) (primerisk_accounts)"}))
        .with_panel(
            stacked(
                "By alert level",
                "As last told; and those that can't be assessed.",
                "short",
                {
                    "{{level}}": "max by (level) (primerisk_accounts_by_alert_level)",
                    "no price": "max(primerisk_accounts_unpriced)",
                },
            )
        )
        .with_panel(
            stacked(
                "By margin ratio",
                "As last assessed.",
                "short",
                {"{{band}}": "max by (band) (primerisk_accounts_by_margin_ratio)"},
            )
        )
        .with_panel(rows("In the greatest danger", "As the workers' screens see them.", sql(worst)))
        .with_panel(rows("Live margin calls", "Figures of the last decision on each.", sql(calls)))
    )


def _calls(made: Dashboard) -> Dashboard:
    events = "sum by (event) (rate(primerisk_margin_events_total[$__rate_interval])) * 60"
    left = "max by (le) (primerisk_margin_call_grace_remaining_seconds_bucket)"
    return (
        made.with_row(row("Calls"))
        .with_panel(
            stacked("Live calls by state", "", "short", {"{{state}}": "max by (state) (primerisk_margin_calls)"})
        )
        .with_panel(
            graph(
                "From the price to the call",
                "From the arrival of the newest price that the account depends on to the call's commit.",
                "s",
                quantiles("primerisk_price_to_call_seconds", "", 0.5, 0.9, 0.99),
            )
        )
        .with_panel(
            graph(
                "Grace left",
                "Open calls with no more than so many seconds left.",
                "short",
                {"≤ {{le}}": left},
            )
        )
        .with_panel(graph("What is told", "Events a minute.", "short", {"{{event}}": events}))
        .with_panel(
            graph(
                "Late",
                "Past its deadline; past its next step.",
                "s",
                {"deadline": OVERDUE, "step": "max(primerisk_margin_call_action_late_seconds)"},
            )
        )
        .with_panel(
            graph(
                "Losses",
                "Deficits of calls, USD; calls with one; what agents owe, units; requests that a venue left unfilled.",
                "short",
                {
                    "lost, USD": LOST,
                    "calls with a loss": "max(primerisk_margin_calls_with_deficit_total)",
                    "owed {{asset}}": "max by (asset) (primerisk_owed)",
                    "escalated": "sum(primerisk_liquidations_escalated_total)",
                },
            )
        )
    )


def _webhooks(made: Dashboard) -> Dashboard:
    attempts = "sum by (result) (rate(primerisk_webhook_attempts_total[$__rate_interval]))"
    return (
        made.with_row(row("Webhooks and orders"))
        .with_panel(graph("Attempts", "A second, by result.", "ops", {"{{result}}": attempts}))
        .with_panel(
            graph(
                "Undelivered",
                "Age of the oldest, and how long the first has been due, by lane.",
                "s",
                {
                    "{{lane}} age": "max by (lane) (primerisk_webhook_oldest_undelivered_seconds)",
                    "{{lane}} due": "max by (lane) (primerisk_webhook_lag_seconds)",
                },
            )
        )
        .with_panel(
            graph(
                "Waiting",
                "Webhooks to be delivered by lane; faults of the delivery a second.",
                "short",
                {
                    "{{lane}}": "max by (lane) (primerisk_webhooks_pending)",
                    "faults/s": "sum(rate(primerisk_webhook_faults_total[$__rate_interval]))",
                },
            )
        )
        .with_panel(
            graph(
                "Orders",
                "A second, by result.",
                "ops",
                {"{{result}}": "sum by (result) (rate(primerisk_orders_total[$__rate_interval]))"},
            )
        )
        .with_panel(
            graph(
                "Age of prices",
                "Of those that most accounts depend on; the limit past which they are stale.",
                "s",
                {
                    "{{asset}}": "max by (asset) (primerisk_price_age_seconds)",
                    "stale": 'max(primerisk_limit{limit="price_age_seconds"})',
                },
            )
        )
        .with_panel(
            graph(
                "Ledger",
                "Units by which balances are off from their entries; time since all had been checked.",
                "short",
                {
                    "{{asset}} off": "max by (asset) (primerisk_ledger_imbalance)",
                    "checked": "min(primerisk_ledger_checked_seconds)",
                },
            )
        )
    )


def _risk(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Value at risk held to account"))
        .with_panel(
            graph(
                "Exceptions",
                "Days of accounts in 250 days on which more was lost than forecast, and how many there should be.",
                "short",
                {
                    "{{confidence}}": "max by (confidence) (primerisk_var_exceptions)",
                    "{{confidence}} expected": "max by (confidence) (primerisk_var_exceptions_expected)",
                },
            )
        )
        .with_panel(
            graph(
                "Exceptions in 250 days",
                "Of the average account; at 99 % the yellow zone begins at 5, the red one at 10.",
                "short",
                {
                    "{{confidence}}": "250 * max by (confidence) (primerisk_var_exceptions)"
                    " / on () group_left () clamp_min(max(primerisk_var_forecasts), 1)"
                },
            )
        )
        .with_panel(
            graph(
                "Forecasts and snapshots",
                "Forecasts that a day was held to; snapshots written.",
                "short",
                {
                    "forecasts": "max(primerisk_var_forecasts)",
                    "snapshots": "sum(primerisk_account_snapshots_total)",
                },
            )
        )
    )
