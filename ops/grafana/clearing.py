"""Escrows and netting agreements: what is open, what netting spares, what is late, in dispute or in default."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana.panels import board, figure, graph, row, rows, sql, stacked

DISPUTE = "max(primerisk_escrow_dispute_seconds)"
DEFAULT = "max(primerisk_netting_default_seconds)"
LATE = "max(primerisk_clearing_action_late_seconds)"


def dashboard() -> Dashboard:
    """Return the dashboard of clearing and settlement."""
    made = board(
        "primerisk: clearing", "clearing", "What waits between agents, what netting spares, what has gone wrong."
    )
    for part in (_now, _escrows, _netting):
        made = part(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    outstanding = "sum(max by (kind) (primerisk_escrow_outstanding_usd))"
    waits = "max(primerisk_netting_obligations_open)"
    return (
        made.with_row(row("Now"))
        .with_panel(figure("In escrow", "At stored prices.", "currencyUSD", outstanding))
        .with_panel(figure("Oldest dispute", "Since it was raised.", "s", DISPUTE, 3_600.0, 86_400.0))
        .with_panel(figure("Obligations", "That wait for a cut-off.", "short", waits))
        .with_panel(
            figure(
                "In default", "Agreements.", "short", 'max(primerisk_netting_agreements{state="defaulted"})', 1.0, 1.0
            )
        )
        .with_panel(figure("Late", "The time-out or cut-off that is most overdue.", "s", LATE, 5.0, 30.0))
        .with_panel(
            figure(
                "Failures",
                "Time-outs and cut-offs that a fault of ours prevented, in an hour.",
                "short",
                "sum(increase(primerisk_clearing_failures_total[1h]))",
                1.0,
                1.0,
            )
        )
    )


def _escrows(made: Dashboard) -> Dashboard:
    events = "sum by (event) (rate(primerisk_escrow_events_total[$__rate_interval])) * 60"
    table = """
        SELECT payer, payee, arbiter, asset, amount, state, now() - disputed_at AS disputed_for, dispute_reason,
               deadline_at - now() AS left, escrow_id
        FROM operator_escrows ORDER BY disputed_at NULLS LAST, deadline_at LIMIT 200"""
    return (
        made.with_row(row("Escrows"))
        .with_panel(stacked("By state", "", "short", {"{{state}}": "max by (state) (primerisk_escrows_open)"}))
        .with_panel(
            stacked(
                "Outstanding by kind",
                "USD at stored prices.",
                "currencyUSD",
                {"{{kind}}": "max by (kind) (primerisk_escrow_outstanding_usd)"},
            )
        )
        .with_panel(graph("What became of them", "Events a minute.", "short", {"{{event}}": events}))
        .with_panel(rows("Open escrows", "Those first that are in dispute.", sql(table), span=24))
    )


def _netting(made: Dashboard) -> Dashboard:
    table = """
        SELECT name, proposer, state, open_obligations, now() - defaulted_at AS defaulted_for,
               next_action_at - now() AS next, agreement_id
        FROM operator_agreements ORDER BY defaulted_at NULLS LAST, next_action_at LIMIT 200"""
    return (
        made.with_row(row("Netting"))
        .with_panel(
            stacked("Agreements by state", "", "short", {"{{state}}": "max by (state) (primerisk_netting_agreements)"})
        )
        .with_panel(
            graph(
                "Runs",
                "An hour, by outcome; obligations that wait.",
                "short",
                {
                    "{{outcome}}": "sum by (outcome) (increase(primerisk_netting_runs_total[1h]))",
                    "waiting": "max(primerisk_netting_obligations_open)",
                },
            )
        )
        .with_panel(
            graph(
                "Spared",
                "Payments, and fees in USD, that netting has spared in an hour.",
                "short",
                {
                    "payments": "sum(increase(primerisk_netting_movements_saved_total[1h]))",
                    "fees, USD": "sum(increase(primerisk_netting_fees_saved_usd_total[1h]))",
                },
            )
        )
        .with_panel(
            graph(
                "In trouble",
                "How long the oldest dispute, the oldest default and the most overdue timer have lasted.",
                "s",
                {"dispute": DISPUTE, "default": DEFAULT, "late": LATE},
            )
        )
        .with_panel(rows("Agreements", "Those first that are in default.", sql(table), span=16))
    )
