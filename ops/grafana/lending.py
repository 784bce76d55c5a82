"""Loans: what is lent and at which rate, what is late or short of collateral, what the house advanced."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana.panels import board, figure, graph, row, rows, sql, stacked

OVERDUE = "max(primerisk_loan_recall_overdue_seconds)"
LATE = "max(primerisk_loan_action_late_seconds)"
UTILIZATION = "max by (asset) (primerisk_loans_utilization)"


def dashboard() -> Dashboard:
    """Return the dashboard of lending."""
    made = board("primerisk: lending", "lending", "What is lent, at which rate, what is late, what the house advanced.")
    for part in (_now, _markets, _loans):
        made = part(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Now"))
        .with_panel(figure("Live loans", "", "short", "sum(max by (state) (primerisk_loans))"))
        .with_panel(
            figure(
                "Borrowed",
                "Of the assets with the most loans.",
                "currencyUSD",
                "sum(max by (asset) (primerisk_loans_borrowed_usd))",
            )
        )
        .with_panel(
            figure(
                "Highest utilization",
                "At 1 nothing is left to borrow, nor for a lender to take back without a recall.",
                "percentunit",
                f"max({UTILIZATION})",
                0.95,
                1.0,
            )
        )
        .with_panel(figure("Recalls", "Loans asked back.", "short", 'max(primerisk_loans{state="recalled"})', 1.0))
        .with_panel(figure("Overdue", "Of the recalled loan that is most overdue.", "s", OVERDUE, 5.0, 30.0))
        .with_panel(
            figure(
                "Advanced",
                "What the house put in to make lenders whole, units of all assets.",
                "short",
                "sum(max by (asset) (primerisk_loan_deficit_total))",
                alarm=1e-18,
            )
        )
    )


def _markets(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Markets"))
        .with_panel(
            stacked(
                "Borrowed by asset",
                "USD at stored prices.",
                "currencyUSD",
                {"{{asset}}": "max by (asset) (primerisk_loans_borrowed_usd)"},
            )
        )
        .with_panel(
            graph(
                "Utilization by asset",
                "Share of what is lent or on offer that is borrowed.",
                "percentunit",
                {"{{asset}}": UTILIZATION},
            )
        )
        .with_panel(
            graph(
                "Rate by asset",
                "Annual borrow rate of the curve.",
                "percentunit",
                {"{{asset}}": "max by (asset) (primerisk_loans_rate)"},
            )
        )
    )


def _loans(made: Dashboard) -> Dashboard:
    events = "sum by (event) (rate(primerisk_loan_events_total[$__rate_interval])) * 60"
    table = """
        SELECT borrower, lender, asset, principal, collateral_asset, collateral, is_low, status, recalled,
               due_at - now() AS left, next_action_at, opened_at, loan_id
        FROM operator_loans ORDER BY due_at NULLS LAST, is_low DESC, opened_at LIMIT 200"""
    return (
        made.with_row(row("Loans"))
        .with_panel(stacked("Loans by state", "", "short", {"{{state}}": "max by (state) (primerisk_loans)"}))
        .with_panel(graph("What became of them", "Events a minute.", "short", {"{{event}}": events}))
        .with_panel(
            graph("Late", "Past the day it was due back; past its next step.", "s", {"recall": OVERDUE, "step": LATE})
        )
        .with_panel(
            graph(
                "Advanced by the house",
                "To make lenders whole, units by asset.",
                "short",
                {"{{asset}}": "max by (asset) (primerisk_loan_deficit_total)"},
            )
        )
        .with_panel(rows("Live loans", "Those first that are asked back or short of collateral.", sql(table), span=16))
    )
